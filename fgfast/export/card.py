"""What a model card says of an exported encoder: where it comes from, what it takes and gives, and how to load it."""

from pathlib import Path
from typing import Literal

from fgfast.config import TrainConfig
from fgfast.info import versions
from fgfast.methods.run_folder import Checkpoint
from fgfast.models.backbone import Backbone
from fgfast.run import load_newest
from fgfast.train.log import read_metrics

Format = Literal["onnx", "torch-export", "timm", "transformers"]

UNKNOWN = "unknown: ask their authors"
PACKAGES = ("fgfast", "torch", "timm", "python")

PREPARE = """\
image = Image.open("image.jpg").convert("RGB").resize(({size}, {size}), Image.Resampling.{filter})
values = (np.asarray(image) / 255 - {mean}) / {std}
images = values.astype(np.float32).transpose(2, 0, 1)[None]
"""
LOAD: dict[Format, str] = {
    "onnx": """\
import numpy as np
import onnxruntime
from PIL import Image

""" + PREPARE + """\
session = onnxruntime.InferenceSession("model.onnx")
features = session.run(["features"], {{"images": images}})[0]
""",
    "torch-export": """\
import numpy as np
import torch
from PIL import Image

""" + PREPARE + """\
module = torch.export.load("model.pt2").module()
features = module(torch.from_numpy(images))[0]
""",
    "timm": """\
import timm
from PIL import Image
from timm.data import create_transform, resolve_model_data_config

net = timm.create_model("local-dir:.", pretrained=True).eval()  # from timm 1.0.16
transform = create_transform(**resolve_model_data_config(net))
features = net(transform(Image.open("image.jpg").convert("RGB"))[None])
""",
    "transformers": """\
from PIL import Image
from transformers import AutoImageProcessor, AutoModel

model = AutoModel.from_pretrained(".").eval()
processor = AutoImageProcessor.from_pretrained(".")
features = model(**processor(Image.open("image.jpg").convert("RGB"))).pooler_output
""",
}  # fmt: skip


def describe_training(run: Path, checkpoint: Checkpoint, method: str, config: TrainConfig) -> dict[str, str]:
    """How the weights of a checkpoint came about, by the name of what is said.

    Passes that discover parts before or between the steps are not counted; those within a step (--parts online) are.
    """
    state = load_newest(run, method)[0] if checkpoint == "last" else {}
    step = int(state.get("step", 0))
    data = Path(config.data).name + (f"; without labels: {Path(config.unlabelled).name}" if config.unlabelled else "")
    length = f"{step:,} of {int(state['total']):,} steps" if "total" in state else f"{step:,} steps"
    images = step * int(state.get("images_per_step", config.batch_size))
    weights = "of the last step" if step else "initial"
    if state.get("average"):
        weights = f"averaged over the steps with decay {config.average:g}"
    return {
        "method": method,
        "data": data or "unknown",
        "training": f"{length}, {images:,} images" if step else "none",
        "encoder passes of the steps": _count_passes(run, images),
        "weights": weights,
    }


def _count_passes(run: Path, images: int) -> str:
    """The encoder passes of training on a number of images, from the ratio of the two in metrics.jsonl."""
    file = run / "metrics.jsonl"
    rows = read_metrics(file)[0] if images and file.is_file() else []
    ratios = [row["passes_per_s"] / row["images_per_s"] for row in rows if row.get("images_per_s")]
    return f"{round(images * ratios[-1]):,}" if ratios else "unknown" if images else "0"


def describe_network(encoder: Backbone, config: TrainConfig) -> dict[str, str]:
    """The network, its initial weights, and its input and output, by the name of what is said."""
    known = getattr(encoder.net, "pretrained_cfg", {})
    start, licence = f"those of {Path(config.init).name}", UNKNOWN
    if config.init == "none":
        start, licence = "random", "none is needed"
    elif config.init == "timm":
        start = "timm's " + ".".join(filter(None, (known.get("architecture"), known.get("tag"))))
        licence = known.get("license") or UNKNOWN
    return {
        "network": f"{encoder.name} ({config.model_args})" if config.model_args else encoder.name,
        "initial weights": start,
        "licence of the initial weights": licence,
        "size": f"{config.size} x {config.size} pixels",
        "input statistics": f"{encoder.stats}, for values in [0, 1]",
        "features": f"{encoder.dim} numbers, those that fgfast eval scores",
        "versions": ", ".join(f"{name} {versions()[name]}" for name in PACKAGES),
    }


def write_card(to: Format, encoder: Backbone, size: int, rows: dict[str, str]) -> str:
    """A model card in Markdown.

    Args:
        to: the format that it is beside.
        encoder: the network.
        size: side of the images in pixels.
        rows: name and value of each line of its table.
    """
    mean, std, interpolation = encoder.stats
    code = LOAD[to].format(size=size, filter=interpolation.upper(), mean=[*mean], std=[*std])
    cells = "\n".join(f"| {name} | {text.replace('|', '/')} |" for name, text in rows.items())
    lightness = " The network converts them to their lightness itself." if encoder.grey else ""
    return f"""\
---
pipeline_tag: image-feature-extraction
tags: [fgfast, {to}]
---

# {encoder.name}, trained by {rows["method"]}

An encoder of images from fgfast: it turns a normalised image into a vector of {encoder.dim} numbers.

| | |
|---|---|
{cells}

## Input

Float32 [N, 3, {size}, {size}], for any N: RGB images, the whole of each resized to the square without keeping its
aspect ratio ({interpolation}, with antialiasing), divided by 255, then less the mean and divided by the standard
deviation of each channel.{lightness}

## Loading

In this folder:

```python
{code}```
"""
