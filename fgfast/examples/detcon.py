"""DetCon in a plain PyTorch loop: segments of even colour, pooled features, the contrast of segments of two views.

python -m fgfast.examples.detcon
"""

import torch
from torch import Tensor, nn

import fgfast


def main(parts: int = 5) -> dict[str, float]:
    """Train on random blobs; each view is a noisy copy, the second one mirrored."""
    torch.manual_seed(0)
    images = nn.functional.interpolate(torch.rand(32, 3, 4, 4), size=32, mode="bicubic")  # [B, 3, H, W]
    segments = fgfast.kmeans(images, parts, seed=0).labels  # [B, H, W], ids 0 to 4

    backbone = nn.Sequential(nn.Conv2d(3, 32, 3, 2, 1), nn.ReLU(), nn.Conv2d(32, 64, 3, 2, 1), nn.ReLU())
    projector = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 32))
    predictor = nn.Sequential(nn.Linear(32, 128), nn.ReLU(), nn.Linear(128, 32))
    networks = nn.ModuleList([backbone, projector, predictor])
    optimizer = torch.optim.Adam(networks.parameters(), lr=3e-3)
    criterion = fgfast.DetConBLoss(temperature=0.1)

    def embed(view: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        pool = fgfast.part_pool(backbone(view), ids, parts)  # the map is 8 x 8, the ids are 32 x 32
        present = torch.where(pool.area > 0, torch.arange(parts), -1)  # [B, K]; -1 is left out of the loss
        return projector(pool.pooled), present  # [B, K, 32]

    losses = []
    for _ in range(30):
        view0, view1 = (images + 0.1 * torch.randn_like(images) for _ in range(2))
        z0, ids0 = embed(view0, segments)
        z1, ids1 = embed(view1.flip(-1), segments.flip(-1))  # id maps move with the pixels
        loss = criterion(predictor(z0), predictor(z1), z0.detach(), z1.detach(), ids0, ids1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    print(f"{parts} segments in each of {len(images)} images, {(ids0 < 0).sum()} of them absent at 8 x 8")
    print(f"loss {losses[0]:.3f}, after {len(losses)} steps {losses[-1]:.3f}")
    return {"before": losses[0], "after": losses[-1]}


if __name__ == "__main__":
    main()
