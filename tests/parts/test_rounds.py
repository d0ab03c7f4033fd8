"""The parts of a run: lost maps are made again exactly, and nothing but training writes what training reads."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fgfast.errors import UserError
from fgfast.methods.particle import PARTICLEConfig
from fgfast.parts.rounds import WEIGHTS
from fgfast.train.loop import pretrain
from tests.conftest import TINY
from tests.methods.common_checks import metrics, stopping

pytestmark = pytest.mark.slow

N_STEPS = 4  # two epochs of 18 images, of which each is a round


def config_for(data: Path, out: Path) -> PARTICLEConfig:
    return PARTICLEConfig(
        data=str(data), out=str(out), model=TINY, model_args="output_stride=8", size=32, batch_size=9, epochs=2,
        rounds=2, log_every=1, knn_every=0, n_parts=4, max_parts=3, map_size=16, hidden=16, projection=8,
        device="cpu", threads=1, amp="off",
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole(drawn: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pretrain("particle", config_for(drawn, tmp_path_factory.mktemp("rounds") / "run"))


@pytest.fixture(scope="module")
def stopped(drawn: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Runs that were stopped in the middle of each round."""
    runs = {}
    for step in (1, 3):
        runs[step] = tmp_path_factory.mktemp("rounds") / "run"
        with pytest.raises(KeyboardInterrupt):
            pretrain(stopping("particle", step), config_for(drawn, runs[step]))
    return runs


def maps_of(run: Path) -> dict[str, bytes]:
    return {str(p.relative_to(run)): p.read_bytes() for p in sorted(run.glob("parts_*/**/*.png"))}


def resume(run: Path, data: Path, to: Path, damage: Callable[[Path], object]) -> Path:
    shutil.copytree(run, to)
    damage(to)
    return pretrain("particle", replace(config_for(data, to), resume=True))


def check_equal(a: Path, b: Path) -> None:
    assert maps_of(a) == maps_of(b)
    assert metrics(a) == metrics(b)
    one, two = (torch.load(run / "last.pt", weights_only=True) for run in (a, b))
    assert one["step"] == two["step"] == N_STEPS
    torch.testing.assert_close(one["method"], two["method"], rtol=0, atol=0)
    torch.testing.assert_close(one["optimizer"]["state"], two["optimizer"]["state"], rtol=0, atol=0)


def cut_one(run: Path) -> None:
    path = next(run.glob("parts_1/*/*.png"))
    path.write_bytes(path.read_bytes()[:-1])


def lose_maps(run: Path) -> None:
    for path in run.glob("parts_1/*/*.png"):
        path.unlink()


def of_another_network(run: Path) -> None:
    """The maps of the first round in place of those of the second."""
    shutil.copytree(run / "parts_0", run / "parts_1", dirs_exist_ok=True)


@pytest.mark.parametrize(
    ("step", "damage"),
    [(1, lambda run: shutil.rmtree(run / "parts_0")), (3, cut_one), (3, lose_maps), (3, of_another_network)],
    ids=["all of the first round", "one is cut", "all of the second round", "of another network"],
)
def test_a_run_whose_maps_were_lost_ends_as_if_they_were_not(
    drawn: Path, tmp_path: Path, whole: Path, stopped: dict[int, Path], step: int, damage: Callable[[Path], Any]
) -> None:
    """They are made again with the weights of the start of the round, bit for bit."""
    check_equal(whole, resume(stopped[step], drawn, tmp_path / "run", damage))


def test_maps_are_never_made_with_later_weights(drawn: Path, tmp_path: Path, stopped: dict[int, Path]) -> None:
    """Without the weights of the start of the round a lost map ends the run; the checkpoint is kept."""

    def lose(run: Path) -> None:
        cut_one(run)
        (run / "parts_1" / WEIGHTS).unlink()

    with pytest.raises(UserError, match=r"parts of round 1 are lost, and so are the weights .*: restore .*parts_1"):
        resume(stopped[3], drawn, tmp_path / "run", lose)
    assert torch.load(tmp_path / "run" / "last.pt", weights_only=True)["step"] == 3
