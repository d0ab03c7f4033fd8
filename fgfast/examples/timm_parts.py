"""Parts by any network of timm: k-means of its feature pyramid in each image of a folder, drawn into a PNG.

python -m fgfast.examples.timm_parts FOLDER --model resnet50 --pretrained    (needs fgfast[train])
"""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import fgfast


def main(argv: Sequence[str] | None = None) -> torch.Tensor:
    """Write images and their parts side by side; returns the id maps [B, 56, 56]."""
    import numpy as np
    import timm
    from PIL import Image
    from timm.data.config import resolve_model_data_config
    from timm.data.transforms_factory import create_transform

    from fgfast.data.decode import read_image
    from fgfast.data.imageset import images_below
    from fgfast.data.normalise import InputStats
    from fgfast.data.panels import overlay, to_uint8
    from fgfast.data.synthetic import generate

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, help="folder of images; without it birds are drawn")
    parser.add_argument("--model", default="resnet18", help="a network of timm")
    parser.add_argument("--pretrained", action="store_true", help="download weights; without it they are random")
    parser.add_argument("--parts", type=int, default=6, help="parts of each image")
    parser.add_argument("--out", type=Path, default=Path("parts.png"), help="the picture")
    args = parser.parse_args(argv)

    torch.manual_seed(0)
    net: Any = timm.create_model(args.model, pretrained=args.pretrained, num_classes=0).eval()
    given = resolve_model_data_config(net)  # the size and the statistics that its weights were trained with
    transform, stats = create_transform(**given), InputStats(given["mean"], given["std"])
    folder = args.folder or generate(Path(tempfile.mkdtemp()) / "birds", classes=4, images=8, size=224) / "images"
    paths = [folder / name for name in images_below(folder)[:8]]
    if not paths:
        parser.error(f"{folder} holds no images.")
    images = torch.stack([transform(Image.fromarray(read_image(path))) for path in paths])  # [B, 3, S, S]

    with torch.no_grad():
        pyramid = net.forward_intermediates(images, indices=4, intermediates_only=True)  # the last four maps
    parts = fgfast.kmeans(pyramid, args.parts, size=56, seed=0).labels

    shown = [to_uint8(image, stats) for image in images]
    drawn = [overlay(image, ids) for image, ids in zip(shown, parts, strict=True)]
    Image.fromarray(np.vstack([np.hstack(shown), np.hstack(drawn)])).save(args.out)
    print(f"{args.model}: maps of {', '.join(str(list(level.shape[1:])) for level in pyramid)}")
    print(f"{args.parts} parts in each of {len(parts)} images: {args.out}")
    return parts


if __name__ == "__main__":
    main()
