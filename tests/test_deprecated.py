"""Names of the previous version stay as aliases with a DeprecationWarning, and public import paths keep working."""

import importlib

import pytest

ALIASES = [
    ("fgfast.train.config.TrainConfig", "fgfast.config.TrainConfig"),
    ("fgfast.train.splits.training_images", "fgfast.data.splits.training_images"),
    ("fgfast.testing.checked", "fgfast.kernels.sanitizer.checked"),
    ("fgfast.testing.fewest", "fgfast.kernels.sanitizer.fewest"),
    ("fgfast.testing.MemoryFault", "fgfast.kernels.sanitizer.MemoryFault"),
    ("fgfast.data.manifest.read_picture", "fgfast.data.manifest.read_image"),
]


def get(path: str) -> object:
    """The object at a dotted path: module, then name."""
    module, _, name = path.rpartition(".")
    if module in ("fgfast.testing", "fgfast.kernels.sanitizer"):
        pytest.importorskip("triton")
    return getattr(importlib.import_module(module), name)


@pytest.mark.parametrize(("alias", "successor"), ALIASES)
def test_an_old_name_warns_and_gives_its_successor(alias: str, successor: str) -> None:
    with pytest.warns(DeprecationWarning, match=f"use {successor}"):
        value = get(alias)
    assert value is get(successor)


@pytest.mark.parametrize("module", ["train.config", "train.splits", "testing", "data.manifest"])
def test_an_unknown_name_is_an_attribute_error(module: str) -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        get(f"fgfast.{module}.no_such_name")


@pytest.mark.parametrize(
    "path",
    [
        "fgfast.cli.main",
        "fgfast.data.layouts.open_images",
        "fgfast.data.loader.make_loader",
        "fgfast.data.manifest.check_images",
        "fgfast.data.views.ViewSpec",
        "fgfast.errors.UserError",
        "fgfast.kmeans",
        "fgfast.losses.DINOLoss",
        "fgfast.losses.NTXentLoss",
        "fgfast.losses.SupConLoss",
        "fgfast.models.backbone.Backbone",
        "fgfast.models.weights.load_encoder",
        "fgfast.models.weights.read_checkpoint",
        "fgfast.part_pool",
    ],
)
def test_names_for_users_can_be_imported(path: str) -> None:
    assert callable(get(path))
