"""Weights divided between two ranks: the run of one process, with checkpoints that either can go on from."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fgfast.config import TrainConfig
from fgfast.errors import UserError
from fgfast.methods.base import method_class
from fgfast.train.log import read_metrics
from fgfast.train.loop import pretrain
from fgfast.train.step import check_step
from tests import ranks
from tests.methods.method_cases import build

CASES: dict[str, dict[str, Any]] = {"simclr": {"sync_bn": True}, "particle": {"parts": "grid", "max_parts": 0}}


def config_of(name: str, data: str, out: Path, **options: Any) -> TrainConfig:
    """Two epochs of three steps; a network without BatchNorm, whose statistics would be those of a rank."""
    values = {
        "model": "test_vit",
        "size": 32,
        "epochs": 1,
        "log_every": 1,
        "knn_every": 1,
        "hidden": 16,
        "projection": 8,
    }
    values |= {
        "device": "cpu",
        "optimizer": "sgd",
        "threads": 1,
        "amp": "off",
        "lr": 1e-2,
        "prototypes": 32,
        "batch_size": 6,
    }
    kind = method_class(name).Config
    values = {k: v for k, v in (values | CASES.get(name, {}) | options).items() if hasattr(kind, k)}
    return kind(data=data, out=str(out), **values)


def _train(rank: int, port: int, data: str, folder: str) -> None:
    ranks.join(rank, 2, port)
    for name in CASES:

        def train(run: str, name: str = name, **options: Any) -> None:
            pretrain(name, config_of(name, data, Path(folder) / name / run, batch_size=3, **options))

        for run, first, then in (
            ("whole", "none", "none"), ("then whole", "fsdp", "none"), ("then sharded", "none", "fsdp"),
        ):  # fmt: skip
            train(run, shard=first)
            train(run, shard=then, epochs=2, resume=True)
        train("sharded", shard="fsdp", epochs=1)
    accumulated = config_of("supervised", data, Path(folder) / "accumulated", batch_size=3, accumulate=2, shard="fsdp")
    pretrain("supervised", accumulated)
    pretrain("simclr", config_of("simclr", data, Path(folder) / "average", batch_size=3, average=0.9))


@pytest.fixture(scope="module")
def folder(drawn: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of two ranks that divide the weights, and that go from whole weights to divided ones and back."""
    out = tmp_path_factory.mktemp("sharded")
    ranks.start(_train, ranks.free_port(), str(drawn), str(out), ranks=2)
    for name in CASES:
        pretrain(name, config_of(name, str(drawn), out / name / "one"))
    return out


def check_equal(found: Path, expected: Path) -> None:
    """The weights, and the states of the optimiser."""
    a, b = (torch.load(run / "last.pt", weights_only=True) for run in (found, expected))
    assert a["step"] == b["step"]
    assert a["method"].keys() == b["method"].keys()
    for name, value in b["method"].items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            assert (a["method"][name] - value).norm() <= 1e-5 * max(1.0, float(value.norm())), name
    for i, values in b["optimizer"]["state"].items():
        for name, value in values.items():
            if isinstance(value, torch.Tensor):
                torch.testing.assert_close(a["optimizer"]["state"][i][name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_two_ranks_that_share_the_weights_train_as_one_process(name: str, folder: Path) -> None:
    """The same checkpoint, export, and scores of the images."""
    check_equal(folder / name / "sharded", folder / name / "one")
    from safetensors.torch import load_file

    found, expected = (load_file(folder / name / run / "encoder.safetensors") for run in ("sharded", "one"))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    rows = [
        [r for r in read_metrics(folder / name / run / "metrics.jsonl")[0] if "knn" in r] for run in ("sharded", "one")
    ]
    assert [r["step"] for r in rows[0]] == [r["step"] for r in rows[1]] == [3]


@pytest.mark.slow
def test_divided_weights_take_a_batch_in_parts(folder: Path, drawn: Path, tmp_path: Path) -> None:
    """Of two images and one on each rank, as one process takes all six at once."""
    pretrain("supervised", config_of("supervised", str(drawn), tmp_path / "one"))
    check_equal(folder / "accumulated", tmp_path / "one")


@pytest.mark.slow
def test_ranks_average_their_weights_as_one_process(folder: Path, drawn: Path, tmp_path: Path) -> None:
    """The average over steps, which is what they export."""
    from safetensors.torch import load_file

    pretrain("simclr", config_of("simclr", str(drawn), tmp_path / "one", average=0.9))
    runs = folder / "average", tmp_path / "one"
    found, expected = (torch.load(run / "last.pt", weights_only=True)["average"] for run in runs)
    exported = load_file(runs[0] / "encoder.safetensors")
    for name, value in expected.items():
        assert (found[name] - value).norm() <= 1e-5 * max(1.0, float(value.norm())), name
        assert torch.equal(exported[name], found[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("run", ["then whole", "then sharded"])
def test_a_run_goes_on_with_its_weights_divided_or_whole(name: str, run: str, folder: Path) -> None:
    check_equal(folder / name / run, folder / name / "whole")


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"micro_batch": 2}, "--micro-batch"), ({"compile": True}, "--compile"), ({"average": 0.9}, "--average"),
        ({"optimizer": "lars"}, "--optimizer lars"),
    ],
)  # fmt: skip
def test_options_that_need_whole_parameters_are_one_sentence(options: dict[str, Any], name: str) -> None:
    method = build("simclr")
    method.config = replace(method.config, shard="fsdp", **options)
    with pytest.raises(UserError, match=f"^--shard fsdp divides the parameters that {name} needs whole: leave one of"):
        check_step(method)


def test_one_process_has_nothing_to_divide(drawn: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is one: start several by torchrun"):
        pretrain("simclr", config_of("simclr", str(drawn), tmp_path / "run", shard="fsdp"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("case", ["lcr byol", "detcon", "srgan", "synthpair simclr"])
def test_methods_that_need_whole_parameters_are_refused_by_name(case: str) -> None:
    """Those with gradients inside their forward pass, and those that prepare parts by the weights."""
    method = build(case)
    method.config = replace(method.config, shard="fsdp")
    with pytest.raises(UserError, match=f"^--shard fsdp divides the parameters that the method {case.split()[0]} with"):
        check_step(method)
