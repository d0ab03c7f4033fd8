"""Two gloo ranks train together: one run folder, the same weights on both, no image twice."""

import socket
from pathlib import Path

import pytest
import torch

from fgfast.errors import UserError
from fgfast.train.distributed import choose_device
from fgfast.train.log import read_metrics
from fgfast.train.optim import LAG
from tests import ranks

pytestmark = pytest.mark.slow


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def _train(rank: int, port: int, data: str, out: str, method: str, interrupt: bool = False) -> None:
    import os
    import signal

    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    from fgfast.config import TrainConfig
    from fgfast.methods.base import Method, method_class
    from fgfast.train import loop
    from tests.conftest import TINY

    made: list[Method] = []
    real = loop.method_class

    def kept(name: str) -> object:
        def build(config: TrainConfig) -> Method:
            made.append(real(name)(config))
            if interrupt and rank == 1:
                made[0].after_step = lambda progress: (
                    os.kill(os.getpid(), signal.SIGINT) if progress.step == 1 else None
                )  # type: ignore[method-assign]
            return made[-1]

        return build

    loop.method_class = kept  # type: ignore[assignment]
    nets = {"model": TINY, "model_args": "output_stride=8", "hidden": 16, "projection": 8}
    if method == "srgan":  # two steps in which the discriminator has no gradient, then one in which it has
        nets = {"width": 4, "blocks": 1, "gan_share": 0.4}
    config = method_class(method).Config(
        data=data, out=out, size=32, batch_size=4, epochs=1, log_every=1, knn_every=1, device="cpu", threads=1,
        amp="off", **nets,
    )  # fmt: skip
    if interrupt:
        config.epochs, config.knn_every = 20, 0
        with pytest.raises(KeyboardInterrupt):
            loop.pretrain(method, config)
    else:
        loop.pretrain(method, config)
    torch.save({k: v.detach() for k, v in made[0].named_parameters()}, f"{out}-rank{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("method", ["simclr", "particle", "srgan"])
def test_two_ranks_end_with_the_same_weights(drawn: Path, tmp_path: Path, method: str) -> None:
    """18 images over 2 ranks of 4 make 3 steps; both ranks hold the same parameters afterwards."""
    out = tmp_path / "run"
    ranks.start(_train, _free_port(), str(drawn), str(out), method, ranks=2)
    first, second = (torch.load(f"{out}-rank{r}.pt", weights_only=True) for r in (0, 1))
    assert all(torch.equal(first[k], second[k]) for k in first)
    rows, _ = read_metrics(out / "metrics.jsonl")
    assert [r["step"] for r in rows if "loss" in r] == [1, 2, 3]


@pytest.mark.parametrize("name", ["cuda:99", "nosuch", "meta"])
def test_devices_that_are_not_there_are_named(name: str) -> None:
    """The message names what was asked for."""
    with pytest.raises(UserError, match=name):
        choose_device(name)


def test_ranks_stop_at_the_same_step(drawn: Path, tmp_path: Path) -> None:
    """An interruption that one rank hears of stops both after the same step, with a checkpoint of it."""
    out = tmp_path / "run"
    ranks.start(_train, _free_port(), str(drawn), str(out), "simclr", True, ranks=2)
    first, second = (torch.load(f"{out}-rank{r}.pt", weights_only=True) for r in (0, 1))
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert torch.load(out / "last.pt", weights_only=True)["step"] == 2 + LAG  # the flags of step 2 carry it
