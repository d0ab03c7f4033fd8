"""Refinement on several ranks: held stages, and statistics of clean images that one rank cannot read."""

import shutil
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from fgfast.methods.run_folder import load_run_encoder
from fgfast.models.stages import last_stages
from tests import ranks
from tests.train.short_runs import simclr_config

pytestmark = pytest.mark.slow
CPU = torch.device("cpu")


def _hold(rank: int, port: int, world: int, data: str, folder: str) -> None:
    """A run from pretrained weights whose networks are whole on every rank, and one that shards them."""
    ranks.join(rank, world, port)
    from fgfast.train.loop import pretrain

    for shard in ("none", "fsdp"):
        config = simclr_config(
            Path(data), Path(folder) / shard, init=f"{folder}/weights.pth", stages="1", shard=shard, optimizer="sgd"
        )
        pretrain("simclr", config)


def test_held_stages_stay_on_every_rank(drawn: Path, tmp_path: Path) -> None:
    from fgfast.train.loop import pretrain

    pretrain("simclr", simclr_config(drawn, tmp_path / "start", lr=1e-2))
    torch.save(load_run_encoder(tmp_path / "start", "last", CPU)[0].net.state_dict(), tmp_path / "weights.pth")
    ranks.start(_hold, ranks.free_port(), 2, str(drawn), str(tmp_path), ranks=2)
    start, whole, sharded = (load_run_encoder(tmp_path / n, "last", CPU)[0] for n in ("start", "none", "fsdp"))
    learning = last_stages(start, "1")
    for name, value in start.net.named_parameters():
        assert torch.equal(whole.net.get_parameter(name), value) == (name not in learning), name
    for name, value in start.net.named_buffers():
        assert torch.equal(whole.net.get_buffer(name), value), name
    torch.testing.assert_close(sharded.net.state_dict(), whole.net.state_dict(), rtol=1e-5, atol=1e-6)


def _clean(rank: int, port: int, world: int, folders: list[str], out: str) -> None:
    """The statistics of an encoder whose batch norms wait for those of the other rank."""
    ranks.join(rank, world, port)
    from fgfast.data.splits import training_images
    from fgfast.methods.base import method_class
    from fgfast.models.sync_bn import synchronise_batch_norm
    from fgfast.ranks import Ranks
    from fgfast.train.average import take_clean_statistics

    if world > 1:
        dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    config = simclr_config(Path(folders[rank]), Path(out), clean_stats=6, batch_size=2)
    torch.manual_seed(0)
    encoder = method_class("simclr")(config).encoder
    if world > 1:
        synchronise_batch_norm(encoder)
    images = training_images(config)[0]
    assert take_clean_statistics(encoder, images, config, Ranks(rank, world)) > 0
    found = {n: x for n, x in encoder.state_dict().items() if "running" in n}
    torch.save(found, f"{out}-{world}-{rank}.pt")


def test_an_image_that_one_rank_cannot_read_is_left_out_on_all(drawn: Path, tmp_path: Path) -> None:
    from fgfast.data.splits import training_images

    damaged = shutil.copytree(drawn, tmp_path / "damaged")
    first = training_images(simclr_config(damaged, tmp_path / "run"))[0].sample(6).file(0)
    assert isinstance(first, str)
    Path(first).write_bytes(Path(first).read_bytes()[:100])
    out = str(tmp_path / "statistics")
    ranks.start(_clean, ranks.free_port(), 2, [str(drawn), str(damaged)], out, ranks=2)
    ranks.start(_clean, ranks.free_port(), 1, [str(damaged)], out, ranks=1)
    one, first_rank, last_rank = (torch.load(f"{out}-{n}.pt", weights_only=True) for n in ("1-0", "2-0", "2-1"))
    torch.testing.assert_close(first_rank, last_rank, rtol=0, atol=0)
    means = [{name: x for name, x in found.items() if "mean" in name} for found in (one, first_rank)]
    torch.testing.assert_close(means[1], means[0], rtol=1e-4, atol=1e-5)  # variances: n / (n - 1) of twice the pixels
