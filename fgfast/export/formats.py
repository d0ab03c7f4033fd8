"""Writing of encoders for other programs; what is written is loaded again and compared before it gets its name."""

import json
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fgfast.errors import UserError
from fgfast.export.card import Format, describe_network, describe_training, write_card
from fgfast.files import check_folder, write_atomic
from fgfast.info import require
from fgfast.methods.run_folder import Checkpoint, load_run_encoder, read_run
from fgfast.models.backbone import Backbone
from fgfast.models.rationale import RationaleEncoder
from fgfast.models.srgan import SRGANEncoder
from fgfast.run import save_encoder

PROGRAMS = {"onnx": "model.onnx", "torch-export": "model.pt2"}
BATCHES = (1, 3)  # images in the batches on which what is written is compared with the run; tracing takes two
WRONG = 1e-3  # difference, as a fraction of the largest value, that roundings do not explain


@dataclass(frozen=True)
class Export:
    """What is written, and what its card says of it."""

    encoder: Backbone
    size: int  # side of the images in pixels
    to: Format
    rows: dict[str, str]  # name and value of each line of the card's table

    @property
    def texts(self) -> dict[str, str]:
        """The input of the network as texts, for the metadata of a file."""
        return {"model": self.encoder.name, "size": str(self.size), **self.encoder.stats.texts()}


class Features(nn.Module):
    """The features of images that ``fgfast eval`` scores and, if an encoder has one that they average, its final map.

    Args:
        encoder: the network.

    Example:
        >>> [list(x.shape) for x in Features(Backbone("test_resnet", size=64))(torch.zeros(2, 3, 64, 64))]
        [[2, 96], [2, 96, 2, 2]]
    """

    def __init__(self, encoder: Backbone) -> None:
        super().__init__()
        self.encoder = encoder
        has_map = encoder.layout.kind != "none" and not _weights_features(encoder)
        self.names = ("features", "map") if has_map else ("features",)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Features [N, D], and the map [N, D', h, w], of images [N, 3, S, S]."""
        if len(self.names) == 1:
            return (self.encoder(images),)
        unpooled = self.encoder.features(images)
        return self.encoder.pool(unpooled), self.encoder.to_map(unpooled, (images.shape[-2], images.shape[-1]))


def _weights_features(encoder: Backbone) -> bool:
    return isinstance(encoder, RationaleEncoder) and encoder.weighted


def export_run(
    run: Path, to: Format, out: Path, *, checkpoint: Checkpoint = "last", settings: dict[str, str] | None = None
) -> Path:
    """Write the encoder of a run, or the average of its weights if it has one, to a new folder, with a model card.

    The folder holds README.md and

    - "onnx": model.onnx, for any number of normalised images [N, 3, S, S]; its outputs are ``features`` [N, D] and, if
      the encoder has one, ``map`` [N, D', h, w]. Its metadata hold the input statistics and the size;
    - "torch-export": model.pt2, a program of torch.export with the same input, outputs and metadata (extra file
      "input.json");
    - "timm", "transformers": config.json and model.safetensors, which both libraries read.

    What is written is loaded again and compared with the encoder before the folder gets its name.

    Args:
        run: run folder.
        to: the format.
        out: the folder, which must not exist.
        checkpoint: "init" or "last".
        settings: options that replace those of the run, as text.

    Returns:
        The folder.

    Raises:
        UserError: the folder exists, a package is missing, the run or the checkpoint cannot be used, the format cannot
            hold the encoder, or it does not give the features of the encoder.
    """
    if out.exists() or out.is_symlink():
        raise UserError(f"{out} exists: give another --out.")
    check_folder(out)
    require("timm", "safetensors")
    if to == "onnx":
        require("onnx", "onnxscript", "onnxruntime", extra="export")
    method, _ = read_run(run)
    encoder, config = load_run_encoder(run, checkpoint, torch.device("cpu"), settings)
    if to not in PROGRAMS:
        _check_plain(encoder, to)
    encoder.to(memory_format=torch.contiguous_format)
    rows = describe_training(run, checkpoint, method, config) | describe_network(encoder, config)
    item = Export(encoder, config.size, to, rows)
    write_atomic(out, lambda partial: _write(item, partial))
    return out


def _check_plain(encoder: Backbone, to: str) -> None:
    """Raise a UserError if an encoder computes more than its timm network."""
    if isinstance(encoder, SRGANEncoder):
        why, remedy = "is a network of fgfast, not of timm", ""
    elif _weights_features(encoder):
        why, remedy = "weights its features by an attention that timm does not have", " or --set pooling=mean"
    elif encoder.grey:
        why, remedy = "sees the lightness of images, which timm does not compute", ""
    else:
        return
    raise UserError(f"--to {to}: the encoder {encoder.name} {why}: give --to {' or '.join(PROGRAMS)}{remedy}.")


def _write(item: Export, folder: Path) -> None:
    """Write all files to a new folder, which is removed if that fails."""
    folder.mkdir()
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of exporters about their own calls
            difference = _write_and_compare(item, folder)
        rows = item.rows | {"largest difference after loading": f"{difference:.1e} of the largest feature"}
        (folder / "README.md").write_text(write_card(item.to, item.encoder, item.size, rows), encoding="utf-8")
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _write_and_compare(item: Export, folder: Path) -> float:
    """Write the weights, and return how far the features differ as a fraction of the largest."""
    model = Features(item.encoder).eval()
    generator = torch.Generator().manual_seed(0)
    shape = (3, item.size, item.size)
    model(torch.zeros(2, *shape))  # checks the size, which a tracer cannot
    if item.to in PROGRAMS:
        _write_program(item, model, torch.randn(2, *shape, generator=generator), folder)
    else:
        _write_folder(item, folder)
    load = _load_program if item.to in PROGRAMS else _load_folder
    loaded, differences = load(item, folder), []
    for n in BATCHES:
        images = torch.randn(n, *shape, generator=generator)
        wanted = model(images)[0]
        differences.append((loaded(images) - wanted).abs().max() / wanted.abs().max().clamp(min=1e-12))
    worst = float(torch.stack(differences).max())  # NaN if one is
    if not worst < WRONG:
        raise UserError(
            f"--to {item.to} gives other features than {item.encoder.name} (by {worst:.1e} of the largest): give "
            "another format."
        )
    return worst


def _write_program(item: Export, model: Features, images: Tensor, folder: Path) -> None:
    """Trace a network for batches of any number of images."""
    path = folder / PROGRAMS[item.to]
    axes = {"images": {0: torch.export.Dim("batch", min=1)}}
    names: dict[str, Any] = {"input_names": ["images"], "output_names": model.names, "dynamic_shapes": axes}
    try:
        program = torch.export.export(model, (images,), dynamic_shapes=axes)
        converted = torch.onnx.export(program, dynamo=True, verbose=False, **names) if item.to == "onnx" else None
    except MemoryError:
        raise
    except Exception as error:  # of various types, as any code of timm is traced
        raise UserError(
            f"--to {item.to}: {item.encoder.name} cannot be traced ({type(error).__name__}, see --debug): give another "
            "format."
        ) from error
    if converted is None:
        torch.export.save(program, path, extra_files={"input.json": json.dumps(item.texts)})
    else:
        converted.model.metadata_props.update(item.texts)
        converted.save(path)


def _load_program(item: Export, folder: Path) -> Callable[[Tensor], Tensor]:
    """The features that a program computes."""
    path = folder / PROGRAMS[item.to]
    if item.to == "torch-export":
        module = torch.export.load(path).module()
        return lambda images: module(images)[0]
    import onnxruntime

    session = onnxruntime.InferenceSession(path)
    return lambda images: torch.from_numpy(session.run(["features"], {"images": images.numpy()})[0])


def _write_folder(item: Export, folder: Path) -> None:
    """Write config.json, as timm's models on Hugging Face have it, and the weights."""
    net, stats = item.encoder.net, item.encoder.stats
    known = net.pretrained_cfg
    config = {
        "architecture": known["architecture"],
        "num_classes": 0,
        "num_features": item.encoder.dim,
        "model_args": {k: v for k, v in net.created_with.items() if k not in ("num_classes", "pretrained_cfg")},
        "pretrained_cfg": {
            "input_size": [3, item.size, item.size], "fixed_input_size": known.get("fixed_input_size", False),
            "mean": stats.mean, "std": stats.std, "interpolation": stats.interpolation, "crop_pct": 1.0,
            "crop_mode": "squash", "num_classes": 0, "first_conv": known.get("first_conv"),
            "classifier": known.get("classifier"),
        },
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config, indent=2, default=list) + "\n", encoding="utf-8")
    save_encoder(folder / "model.safetensors", net, item.encoder.name, stats=stats)


def _load_folder(item: Export, folder: Path) -> Callable[[Tensor], Tensor]:
    """The network that timm builds from a folder; by its parts, because timm before 1.0.16 takes no folder."""
    import timm

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    weights = folder / "model.safetensors"
    net = timm.create_model(config["architecture"], checkpoint_path=weights, num_classes=0, **config["model_args"])
    return net.eval()
