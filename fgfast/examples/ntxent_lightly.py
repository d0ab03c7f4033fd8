"""SimCLR as lightly writes it, with the NT-Xent of fgfast: only one import changes.

python -m fgfast.examples.ntxent_lightly    (needs lightly)
"""

import torch
from torch import nn


def main() -> dict[str, float]:
    """Compare the two losses on one batch, then train with that of fgfast."""
    from lightly.loss import NTXentLoss as LightlyNTXentLoss
    from lightly.models.modules import SimCLRProjectionHead

    from fgfast import NTXentLoss  # instead of: from lightly.loss import NTXentLoss

    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Conv2d(3, 32, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten())
    model = nn.Sequential(backbone, SimCLRProjectionHead(512, 512, 128))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    criterion = NTXentLoss(temperature=0.1)
    images = torch.rand(128, 3, 32, 32)

    losses = []
    for step in range(10):
        view0, view1 = (images + 0.2 * torch.randn_like(images) for _ in range(2))
        z0, z1 = model(view0), model(view1)  # [128, 128] each
        loss = criterion(z0, z1)
        if step == 0:
            theirs = LightlyNTXentLoss(temperature=0.1)(z0, z1)
            ours_dz, theirs_dz = (torch.autograd.grad(x, z0, retain_graph=True)[0] for x in (loss, theirs))
            difference = float((ours_dz - theirs_dz).norm() / theirs_dz.norm())
            print(f"one batch: lightly {theirs:.6f}, fgfast {loss:.6f}; gradients differ by {difference:.1e}")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    print(f"loss {losses[0]:.3f}, after {len(losses)} steps {losses[-1]:.3f}")
    return {"lightly": theirs.item(), "difference": difference, "before": losses[0], "after": losses[-1]}


if __name__ == "__main__":
    main()
