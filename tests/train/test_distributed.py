"""Two gloo ranks train together: one run folder, and the same weights on both."""

import os
from pathlib import Path

import pytest
import torch

from fgfast.errors import UserError
from fgfast.train.distributed import choose_device
from fgfast.train.log import read_metrics
from fgfast.train.optim import LAG
from tests import ranks

pytestmark = pytest.mark.slow


def _join(rank: int, port: int) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)


def _train(rank: int, port: int, data: str, out: str, name: str, interrupt: bool = False) -> None:
    import signal

    _join(rank, port)
    from fgfast.methods.base import Progress
    from fgfast.train.loop import pretrain
    from tests.conftest import TINY
    from tests.methods.common_checks import recording

    method, instances = recording(name)

    class Interrupted(method):  # type: ignore[misc,valid-type]
        def after_step(self, progress: Progress) -> None:
            super().after_step(progress)
            if rank == 1 and progress.step == 1:
                os.kill(os.getpid(), signal.SIGINT)

    nets = {"model": TINY, "model_args": "output_stride=8", "hidden": 16, "projection": 8}
    if name == "srgan":  # two steps in which the discriminator has no gradient, then one in which it has
        nets = {"width": 4, "blocks": 1, "gan_share": 0.4}
    config = method.Config(
        data=data, out=out, size=32, batch_size=4, epochs=1, log_every=1, knn_every=1, device="cpu", threads=1,
        amp="off", **nets,
    )  # fmt: skip
    if interrupt:
        config.epochs, config.knn_every = 20, 0
        with pytest.raises(KeyboardInterrupt):
            pretrain(Interrupted, config)
    else:
        pretrain(method, config)
    torch.save({k: v.detach() for k, v in instances[0].named_parameters()}, f"{out}-rank{rank}.pt")
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize("method", ["simclr", "particle", "srgan"])
def test_two_ranks_end_with_the_same_weights(drawn: Path, tmp_path: Path, method: str) -> None:
    """18 images in batches of 4 on 2 ranks make 3 steps, after which both ranks have the same parameters."""
    out = tmp_path / "run"
    ranks.start(_train, ranks.free_port(), str(drawn), str(out), method, ranks=2)
    first, second = (torch.load(f"{out}-rank{r}.pt", weights_only=True) for r in (0, 1))
    assert all(torch.equal(first[k], second[k]) for k in first)
    rows, _ = read_metrics(out / "metrics.jsonl")
    assert [r["step"] for r in rows if "loss" in r] == [1, 2, 3]


def _train_and_resume(rank: int, port: int, data: str, out: str) -> None:
    from contextlib import nullcontext
    from dataclasses import replace

    _join(rank, port)
    from fgfast.claim import claim_folder
    from fgfast.methods.simclr import SimCLRConfig
    from fgfast.train.loop import pretrain
    from tests.conftest import TINY

    config = SimCLRConfig(
        data=data, out=out, model=TINY, size=32, batch_size=4, epochs=1, log_every=1, knn_every=0, device="cpu",
        threads=1, amp="off", hidden=16, projection=8,
    )  # fmt: skip
    pretrain("simclr", config)
    config = replace(config, epochs=2, resume=True)
    pretrain("simclr", config)
    with (
        claim_folder(Path(out)) if rank == 0 else nullcontext(),
        pytest.raises(UserError, match="in use by process"),
    ):
        pretrain("simclr", replace(config, epochs=3))
    with pytest.raises(UserError, match="6 steps and --epochs 1 gives 3"):
        pretrain("simclr", replace(config, epochs=1))


def test_two_ranks_resume_and_are_refused_together(drawn: Path, tmp_path: Path) -> None:
    """What the first rank finds in the run folder ends the other one too, instead of leaving it to wait."""
    ranks.start(_train_and_resume, ranks.free_port(), str(drawn), str(tmp_path / "run"), ranks=2)
    assert torch.load(tmp_path / "run/last.pt", weights_only=True)["step"] == 6


@pytest.mark.parametrize("name", ["cuda:99", "nosuch", "meta"])
def test_missing_devices_are_refused(name: str) -> None:
    """The message names the device."""
    with pytest.raises(UserError, match=name):
        choose_device(name)


def test_ranks_stop_at_the_same_step(drawn: Path, tmp_path: Path) -> None:
    """A signal to one rank stops both after the same step, with a checkpoint of that step."""
    out = tmp_path / "run"
    ranks.start(_train, ranks.free_port(), str(drawn), str(out), "simclr", True, ranks=2)
    first, second = (torch.load(f"{out}-rank{r}.pt", weights_only=True) for r in (0, 1))
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert torch.load(out / "last.pt", weights_only=True)["step"] == 2 + LAG  # it is part of the flags of step 2
