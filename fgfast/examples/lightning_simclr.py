"""SimCLR as a LightningModule with the NT-Xent of fgfast, over all devices that Lightning is given.

python -m fgfast.examples.lightning_simclr    (needs lightning)
"""

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fgfast import NTXentLoss


def main() -> dict[str, float]:
    """Train for a few epochs on random images; two noisy copies of an image are its views."""
    import lightning

    class SimCLR(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Sequential(nn.Conv2d(3, 32, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten())
            self.projector = nn.Sequential(nn.Linear(512, 128), nn.ReLU(), nn.Linear(128, 64))
            # With several devices the negatives come from all of them, and the gradient is that of the joined batch.
            self.criterion = NTXentLoss(temperature=0.1, gather_distributed=True)

        def training_step(self, batch: list[Tensor], _: int) -> Tensor:
            z0, z1 = (self.projector(self.encoder(x + 0.2 * torch.randn_like(x))) for x in (batch[0], batch[0]))
            loss: Tensor = self.criterion(z0, z1)
            self.log("loss", loss, on_step=False, on_epoch=True)
            history.append(loss.item())
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters(), lr=1e-3)

    lightning.seed_everything(0, verbose=False)
    history: list[float] = []
    loader = DataLoader(TensorDataset(torch.rand(512, 3, 32, 32)), batch_size=128, shuffle=True, drop_last=True)
    trainer = lightning.Trainer(
        max_epochs=5, logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False
    )
    trainer.fit(SimCLR(), loader)
    mean = float(trainer.callback_metrics["loss"])
    print(f"loss of the first batch {history[0]:.3f}, mean of epoch {trainer.current_epoch} {mean:.3f}")
    return {"before": history[0], "after": mean}


if __name__ == "__main__":
    main()
