"""Plans of the memory of a step: sums of what is known, the same for chunks left out, and the peaks of processes."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks import plan as recorded
from fgfast.cli import main
from fgfast.config import TrainConfig
from fgfast.methods.base import METHODS, method_class
from fgfast.train import plan
from fgfast.train.memory import KINDS, Plan
from fgfast.train.plan import largest_batch, plan_step
from tests.conftest import TINY
from tests.methods.method_cases import CASES, build


def config_of(name: str, **options: Any) -> TrainConfig:
    kind = method_class(name).Config
    values: dict[str, Any] = {
        "model": TINY,
        "size": 32,
        "batch_size": 8,
        "device": "cpu",
        "hidden": 16,
        "projection": 8,
    }
    return kind(**{k: v for k, v in (values | options).items() if hasattr(kind, k)})


def step_of(name: str, world: int = 1, **options: Any) -> Plan:
    return plan_step(method_class(name), config_of(name, **options), world)


def test_kinds_are_the_bytes_of_their_tensors() -> None:
    found = step_of("byol")
    method = method_class("byol")(config_of("byol"))
    trained = [p for p in method.parameters() if p.requires_grad]
    weights = sum(p.nbytes for p in trained)
    assert found.most["parameters"] == found.most["gradients"] == weights
    assert found.most["optimiser"] == 2 * weights + 4 * len(trained)  # AdamW: two moments, and a count of steps
    copies = sum(p.nbytes for p in method.parameters()) - weights
    buffers = sum(b.nbytes for b in method.buffers())
    assert copies > 0
    assert copies + buffers <= found.most["momentum copies, buffers"] <= copies + 2 * buffers
    assert found.most["images"] == 8 * (2 * 3 * 32 * 32 * 4 + 2 * 5 * 4 + 8 + 8 + 1)
    assert found.most["representations"] >= 2 * 2 * 8 * method.encoder.dim * 2  # online and momentum, bfloat16
    assert sum(found.at_peak.values()) == found.peak
    assert found.most["gradient buckets"] == found.most["ring blocks"] == 0


def test_ranks_add_buckets_and_the_blocks_of_the_ring() -> None:
    one, three = step_of("simclr"), step_of("simclr", 3)
    assert three.most["gradient buckets"] == one.most["gradients"]
    assert three.peak == one.peak + one.most["gradients"]
    assert three.most["ring blocks"] == 2 * (16 * 8 * 2 + 3 * 16 * 8) + 2 * 16 * 8 * 4  # bfloat16 keys, three ids
    assert not torch.distributed.is_initialized()


@pytest.mark.slow
def test_divided_weights_are_a_part_of_the_whole() -> None:
    whole, divided = (step_of("simclr", 2, shard=shard, model="test_vit") for shard in ("none", "fsdp"))
    for kind in ("parameters", "gradients", "optimiser"):
        assert 0.5 <= divided.most[kind] / whole.most[kind] < 0.52  # rows that two do not divide are padded
    assert 0 < divided.most["gathered parameters"] < whole.most["parameters"]
    assert divided.most["gradient buckets"] == 0
    assert sum(divided.at_peak.values()) == divided.peak


@pytest.mark.slow
def test_chunks_that_are_left_out_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """And a batch of four chunks takes less than half of what it takes at once, but for what does not depend on it."""
    options: dict[str, Any] = {"batch_size": 32, "size": 64, "micro_bn": "chunk"}
    quick = step_of("byol", micro_batch=6, **options)
    monkeypatch.setattr(plan, "_skip_repeats", lambda *_: None)
    assert step_of("byol", micro_batch=6, **options) == quick
    assert quick.at_peak["activations"] < 0.5 * step_of("byol", **options).at_peak["activations"]


@pytest.mark.slow
def test_recomputed_activations_take_less() -> None:
    found = [step_of("simclr", grad_checkpoint=c, model="test_vit", size=64).peak for c in (True, False)]
    assert found[0] < found[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_a_plan(name: str) -> None:
    """On two ranks, also where a step reads numbers of rows, or on a CPU its features."""
    case = next(case for case in CASES if case.split()[0] == name)
    options = {"model_args": "output_stride=8"} | CASES[case]
    options |= {"parts": "grid"} if name == "particle" else {}
    found = step_of(name, 2, **options)
    assert found.most["gradients"] > 0
    assert sum(found.at_peak.values()) == found.peak
    assert set(found.most) == set(KINDS)


def test_norms_keep_what_they_keep_on_a_gpu() -> None:
    """A forward pass under autocast on a GPU that is not there leaves tensors of the same sizes."""

    def saved(device: str) -> dict[int, int]:
        torch.set_autocast_dtype(device, torch.bfloat16)
        net = build("lodisc").encoder.net.train()
        sizes: dict[int, int] = {}

        def pack(x: Tensor) -> Tensor:
            if x.is_floating_point() and x.shape[:2] == (4, 5):  # tokens; attention takes another way without a device
                sizes[x.untyped_storage()._cdata] = x.untyped_storage().nbytes()
            return x

        if device == "cpu":
            plan.cast_norms(net)
        with FakeTensorMode(), torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            plan.empty_tensors(net, device)
            torch.set_autocast_enabled(device, True)  # torch.autocast asks for a device that is there
            try:
                net.forward_features(torch.empty(4, 3, 32, 32, device=device))
            finally:
                torch.set_autocast_enabled(device, False)
        return sizes

    kept = {device: sorted(saved(device).values()) for device in ("cpu", "cuda")}
    assert kept["cpu"] == kept["cuda"]
    assert len(kept["cpu"]) > 4


@pytest.mark.parametrize("start", [2, 70, 5000])
def test_the_largest_batch_fits_and_one_per_cent_more_does_not(start: int) -> None:
    """Where other moments of the step are the peak at other batches."""
    calls: list[int] = []

    def peak(n: int) -> int:
        calls.append(n)
        return max(10_000 + n, 5_000 + 20 * n, 70 * n - 9_000)

    for capacity in (10_050, 12_000, 30_000, 999_999):
        calls.clear()
        n = largest_batch(peak, 2, start, capacity)
        assert len(calls) <= 32  # every third one halves the interval, from 2,000 to 1% of 300
        assert peak(n) <= capacity < peak(n + max(1, n // 100))
    assert largest_batch(peak, 2, start, 10_001) == 0


@pytest.mark.slow
def test_a_plan_is_within_a_fifth_of_the_peak_of_two_processes() -> None:
    """benchmarks/results/plan.csv has more cases."""
    case = {"model": "resnet10t", "size": 48, "batch_size": 32}
    assert abs(recorded.row("simclr", 2, case)["ratio"] - 1) <= recorded.TOLERANCE


@pytest.mark.slow
def test_the_command_prints_kinds_and_the_largest_batch(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["simclr", "--model", TINY, "--size", "32", "--device", "cpu", "--batch", "16", "--gpus", "2"]
    assert main(["plan", *argv, "--card", "0.05GB"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0] == f"simclr, {TINY}, 32 px, 8 images on each of 2 GPUs"
    words = {line[:26].strip(): line[26:].split() for line in out[2:-1]}
    found = plan_step(method_class("simclr"), replace(method_class("simclr").Config(), model=TINY, size=32,
                                                      device="cpu", batch_size=8), 2)  # fmt: skip
    assert words["parameters"][0] == f"{found.most['parameters'] / 2**20:.1f}"
    assert words["all, at the peak"] == [f"{found.peak / 2**20:,.1f}"]
    n = int(out[-1].partition(": ")[2].split()[0])
    assert n > 8
    assert f"{2 * n:,} in all" in out[-1]
    assert main(["plan", *argv, "--card", "0.01GB"]) == 0
    assert "no batch fits 0.01GB: 2 images take" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["simclr", "--batch-size", "8", "--micro-batch", "9"], "--micro-batch is 9: give at most --batch-size, 8."),
        (["simclr", "--batch", "9", "--gpus", "2"], "--batch is 9 on 2 GPUs: give a positive multiple of 2"),
        (["simclr", "--batch", "8", "--batch-size", "8"], "leave one of them out."),
        (["simclr", "--gpus", "0"], "--gpus is 0: give at least 1."),
        (["simclr", "--gpus", "two"], "fgfast plan --help lists the flags."),
        (["simclr", "--card", "voodoo2"], "--card is 'voodoo2': give its memory, as in 80GB or 80GiB, or one of t4,"),
        (["simclr", "--card", "0GB"], "--card is '0GB': give its memory"),
        (["simclr", "--shard", "fsdp"], "give --gpus 2 or more"),
        (["simclr", "--compile"], "plan without it."),
        (["lodisc", "--micro-batch", "4", "--model", "test_vit", "--size", "32"], "lodisc cannot split its step"),
        (["supervised"], "give it by --data DIR."),
        (["nothing"], "There is no method 'nothing'"),
        ([], "fgfast plan expects a method as its first argument"),
        (["--batch", "8"], "fgfast plan expects a method as its first argument"),
        (["simclr", "--batch", "x"], "--batch got 'x' and takes INT"),
        (["simclr", "--model", "resnet1"], "timm has no model 'resnet1'"),
    ],
)
def test_user_errors_are_one_sentence(
    argv: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["plan", *argv]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert len(error.splitlines()) == 1
    assert not list(tmp_path.iterdir())
