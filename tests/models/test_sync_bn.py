"""Synchronised batch norms on two ranks equal plain ones of one process on the joined batch."""

import copy
import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fgfast.models.heads import MLP
from fgfast.models.statistics import freeze_bn_stats
from fgfast.models.sync_bn import synchronise_batch_norm
from tests import ranks

pytestmark = pytest.mark.slow

SIZES = (5, 2)  # images of each rank


def make(case: str) -> nn.Module:
    """A network with batch norms of one kind."""
    from timm.layers import BatchNormAct2d

    torch.manual_seed(0)
    if case == "vectors":
        return MLP((4, 8, 3), bias=False, last_norm=True)  # the gradient of a bias before a norm is 0
    cumulative = nn.BatchNorm2d(6, momentum=None)
    act = BatchNormAct2d(6, act_layer=nn.GELU)
    net = nn.Sequential(nn.Conv2d(4, 6, 3, bias=False), cumulative, nn.GELU(), nn.Conv2d(6, 6, 3, bias=False), act)
    return net.to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


def batches(case: str) -> list[Tensor]:
    """Two joined batches with a mean far from zero, for which a difference of squares would lose digits."""
    shape = (sum(SIZES), 4) if case == "vectors" else (sum(SIZES), 4, 8, 8)
    g = torch.Generator().manual_seed(1)
    found = [torch.randn(shape, generator=g) + 10 for _ in range(2)]
    return found if case == "vectors" else [x.to(memory_format=torch.channels_last) for x in found]


def run(net: nn.Module, case: str, own: slice, group: Any) -> dict[str, Any]:
    """Outputs, gradients (summed over ranks) and buffers after two batches, the second with frozen statistics."""
    first, second = (x[own].requires_grad_() for x in batches(case))
    out = net(first)
    with freeze_bn_stats(net):
        frozen = net(second)
    (out.sin().sum() + frozen.cos().sum()).backward()
    grads = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    for grad in grads.values() if group else ():
        torch.distributed.all_reduce(grad)
    with torch.autocast("cpu", torch.bfloat16):
        half = copy.deepcopy(net)(batches(case)[0][own] - 10)
    evaluated = net.eval()(first)
    return {
        "rows": [x.detach() for x in (out, frozen, first.grad, second.grad, evaluated) if x is not None],
        "half": half.detach(), "shared": grads | dict(net.named_buffers()), "state": list(net.state_dict()),
    }  # fmt: skip


def _run_all(rank: int, port: int, folder: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    group = torch.distributed.group.WORLD
    for case in ("vectors", "maps"):
        own = slice(0, SIZES[0]) if rank == 0 else slice(SIZES[0], None)
        net = synchronise_batch_norm(make(case), group)
        torch.save(run(net, case, own, group), f"{folder}/{case} {rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of both ranks."""
    out = tmp_path_factory.mktemp("sync_bn")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    ranks.start(_run_all, port, str(out), ranks=2)
    return out


@pytest.mark.parametrize("case", ["vectors", "maps"])
def test_two_ranks_equal_one_process(folder: Path, case: str) -> None:
    """Outputs, gradients and statistics, for unequal batches, frozen statistics and evaluation; the same names."""
    expected = run(make(case), case, slice(None), None)
    found = [torch.load(folder / f"{case} {rank}.pt", weights_only=True) for rank in range(2)]
    for rows, joined in zip(zip(*(f["rows"] for f in found), strict=True), expected["rows"], strict=True):
        torch.testing.assert_close(torch.cat(rows), joined, rtol=1e-5, atol=1e-5 * float(joined.abs().max()))
    half = torch.cat([f["half"] for f in found])
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half, expected["half"], rtol=0.03, atol=0.03)
    for f in found:
        assert f["state"] == expected["state"]
        for name, value in f["shared"].items():
            wanted = expected["shared"][name]
            atol = 1e-5 * float(wanted.abs().max())
            torch.testing.assert_close(value, wanted, rtol=1e-5, atol=atol, msg=name)


def test_evaluation_needs_no_other_rank() -> None:
    """A synchronised norm in evaluation mode is the plain one, without a process group."""
    net = make("maps").eval()
    expected = net(batches("maps")[0])
    assert torch.equal(synchronise_batch_norm(net)(batches("maps")[0]), expected)
