"""A part loss inside someone else's ViT: clusters of its patches are the parts, contrasted between two views.

python -m fgfast.examples.vit_parts --model vit_tiny_patch16_224    (needs timm; random weights)
"""

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

import fgfast


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Train the ViT for a few steps on random blobs."""
    import timm

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="test_vit", help="a ViT of timm")
    parser.add_argument("--parts", type=int, default=6, help="parts of each image")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    vit: Any = timm.create_model(args.model, num_classes=0)
    side, dim, height_width = vit.patch_embed.img_size[0], vit.embed_dim, vit.patch_embed.grid_size
    projector = nn.Sequential(nn.Linear(dim, 64), nn.GELU(), nn.Linear(64, 32))
    criterion = fgfast.PartContrastiveLoss(args.parts, projector)  # its projector is trained with the network
    optimizer = torch.optim.AdamW([*vit.parameters(), *criterion.parameters()], lr=1e-3)
    images = nn.functional.interpolate(torch.rand(8, 3, 5, 5), size=side, mode="bicubic")

    def features(x: Tensor) -> Tensor:
        patches = vit.forward_features(x)[:, vit.num_prefix_tokens :]  # [B, h w, D] without CLS and registers
        return patches.transpose(1, 2).unflatten(2, height_width)  # [B, D, h, w]

    losses = []
    for _ in range(10):
        with torch.no_grad():
            parts = fgfast.kmeans(features(images), args.parts, seed=0).labels  # [B, h, w]
        view1, view2 = (images + 0.2 * torch.randn_like(images) for _ in range(2))
        loss = criterion(features(view1), features(view2.flip(-1)), parts, parts.flip(-1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    print(f"{args.model}: {args.parts} parts on a grid of {height_width[0]} x {height_width[1]} patches")
    print(f"loss {losses[0]:.3f}, after {len(losses)} steps {losses[-1]:.3f}")
    return {"before": losses[0], "after": losses[-1]}


if __name__ == "__main__":
    main()
