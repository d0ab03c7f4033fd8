"""Steps in chunks, in parts and with recomputed activations give the gradients of a plain step."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fgfast.cli import main
from fgfast.config import TrainConfig, validate
from fgfast.data.views import Batch
from fgfast.errors import UserError
from fgfast.methods.base import METHODS, Method, method_class
from fgfast.ranks import Ranks
from fgfast.train.micro_batch import can_split, split_batch
from fgfast.train.step import Step, check_step
from tests import ranks
from tests.methods.method_cases import CASES, build, joined_batch
from tests.train.short_runs import simclr_config

SPLIT = [case for case in CASES if can_split(method_class(case.split()[0])) and case != "particle online"]
ADDED = [case for case in CASES if method_class(case.split()[0]).adds_up and case != "jigsaw"]  # draws other puzzles


def set_options(method: Method, **options: Any) -> Method:
    method.config = replace(method.config, **options)
    return method


def step_of(
    case: str, part: Callable[[Batch], Batch] = lambda batch: batch, world: Ranks | None = None, **options: Any
) -> Any:
    """The method after two of its steps, the terms, and the gradients with zeros for those that are missing."""
    method = set_options(build(case), **options)
    if world is not None and world.world > 1:
        method.set_group(torch.distributed.group.WORLD)
        method.set_rng(torch.Generator().manual_seed(1))
    torch.manual_seed(1)
    check_step(method)
    if method.config.grad_checkpoint:
        method.checkpoint_activations()
    step = Step(method, world or Ranks())
    rows: list[Tensor] = []
    for number in (0, 1):  # all images are valid, then seven of twelve
        method.zero_grad(set_to_none=True)
        terms = step(part(joined_batch(number, getattr(method.config, "local_crops", 0))))
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in method.parameters() if p.requires_grad]
        rows += [torch.cat([g.flatten() for g in grads]), *(value.detach()[None] for value in terms.values())]
    return method, rows


def check_equal(found: list[Tensor], expected: list[Tensor], tolerance: float = 1e-5) -> None:
    for x, y in zip(found, expected, strict=True):
        assert (x - y).norm() <= tolerance * y.norm(), (float((x - y).norm()), float(y.norm()))


@pytest.mark.parametrize("chunk", [5, 12])
@pytest.mark.parametrize("case", SPLIT)
def test_micro_batches_give_the_gradients_terms_and_buffers_of_the_batch(case: str, chunk: int) -> None:
    """Queues and centres too; the batch holds padding."""
    expected, rows = step_of(case)
    found, in_chunks = step_of(case, micro_batch=chunk)
    check_equal(in_chunks, rows)
    torch.testing.assert_close(dict(found.named_buffers()), dict(expected.named_buffers()), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", ADDED)
def test_parts_add_up_to_the_gradients_of_the_batch(case: str) -> None:
    """Though their numbers of valid images differ."""
    check_equal(step_of(case, accumulate=5)[1], step_of(case)[1])


def test_parts_of_jigsaw_have_puzzles_of_their_own() -> None:
    method, labels = set_options(build("jigsaw"), accumulate=2), []
    puzzles = method.puzzles

    def record(batch: Batch) -> tuple[Tensor, Tensor]:
        tiles, label = puzzles(batch)
        labels.append(label.tolist())
        return tiles, label

    method.puzzles = record
    Step(method, Ranks())(joined_batch(0))
    assert len(labels) == 2
    assert labels[0] != labels[1]
    method(joined_batch(0))
    assert labels[2][:6] == labels[0]  # a plain step draws as ever


@pytest.mark.parametrize("case", ["simclr", "dino", "mocov3", "lcr moco", "srgan", "synthpair simclr"])
@pytest.mark.parametrize("chunk", [0, 5])
def test_recomputed_activations_give_the_same_gradients(case: str, chunk: int) -> None:
    """Of timm's networks and our own; also inside chunks, where the method has them."""
    if chunk and case not in SPLIT:
        chunk = 0
    check_equal(step_of(case, grad_checkpoint=True, micro_batch=chunk)[1], step_of(case)[1])


@pytest.mark.parametrize(("options", "calls"), [({}, 1), ({"grad_checkpoint": True}, 2), ({"micro_batch": 6}, 4)])
def test_the_running_statistics_are_updated_once(options: dict[str, Any], calls: int) -> None:
    """However often the layers run: by the first run of every chunk."""
    from fgfast.methods.simclr import SimCLR, SimCLRConfig

    torch.manual_seed(0)
    config = SimCLRConfig(model="test_resnet", size=32, batch_size=12, amp="off", hidden=16, projection=8)
    method = SimCLR(replace(config, micro_bn="chunk", **options)).train()
    if method.config.grad_checkpoint:
        method.checkpoint_activations()
    count: list[None] = []
    hook = method.encoder.net.layer2[0].register_forward_pre_hook(lambda *_: count.append(None))
    batch, before = joined_batch(0), {name: b.clone() for name, b in method.encoder.named_buffers()}
    Step(method, Ranks())(batch)
    found = {name: b.clone() for name, b in method.encoder.named_buffers()}
    hook.remove()
    assert len(count) == calls
    method.encoder.load_state_dict(before, strict=False)
    for chunk in split_batch(batch, options.get("micro_batch", 12)):
        method.represent(chunk)
    torch.testing.assert_close(found, dict(method.encoder.named_buffers()), rtol=1e-6, atol=1e-6)
    assert int(found["net.bn1.num_batches_tracked"]) == 12 // options.get("micro_batch", 12)


def _work(rank: int, port: int, folder: str, world: int) -> None:
    ranks.join(rank, world, port)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world)

    def mine(batch: Batch) -> Batch:
        return split_strided(batch, rank, world)

    results = {}
    for case, options in OF_RANKS.items():
        found = step_of(case, mine, Ranks(rank, world), **options)[1]
        for value in found:
            torch.distributed.all_reduce(value)  # gradients are the same on all ranks, terms are averaged
        results[case] = [value / world for value in found]
    if rank == 0:
        torch.save(results, f"{folder}/{world}.pt")
    torch.distributed.destroy_process_group()


def split_strided(batch: Batch, rank: int, world: int) -> Batch:
    """The images of a rank."""

    def cut(value: Any) -> Any:
        return [cut(x) for x in value] if isinstance(value, list) else value if value is None else value[rank::world]

    return Batch(**{name: cut(value) for name, value in vars(batch).items()})


OF_RANKS: dict[str, dict[str, Any]] = {
    "simclr": {"micro_batch": 2}, "particle": {"micro_batch": 2}, "mocov2": {"micro_batch": 1},
    "particle random": {"micro_batch": 2}, "byol": {"accumulate": 2}, "supervised": {"accumulate": 3},
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_chunks_and_parts_on_several_ranks_give_the_gradients_of_one_process(world: int, tmp_path: Path) -> None:
    ranks.start(_work, ranks.free_port(), str(tmp_path), world, ranks=world)
    results = torch.load(tmp_path / f"{world}.pt")
    for case in OF_RANKS:
        if case != "particle random":  # one process draws by PyTorch's own generator
            check_equal(results[case], step_of(case)[1])


@pytest.mark.parametrize("case", ["supervised", "synthpair simclr", "lcr byol", "lodisc", "srgan", "color", "jigsaw"])
def test_a_method_that_cannot_split_its_step_is_refused_by_name(case: str) -> None:
    name = case.split()[0]
    with pytest.raises(UserError, match=f"^--micro-batch is given and {name} cannot split its step: .* particle, simc"):
        check_step(set_options(build(case), micro_batch=2))


def test_the_clustering_of_a_step_is_not_split() -> None:
    with pytest.raises(UserError, match=r"^--micro-batch cannot split the clustering of --parts online: choose other"):
        check_step(set_options(build("particle online"), micro_batch=2))


@pytest.mark.parametrize(
    ("case", "remedy"),
    [("simclr", "give --micro-batch 2 instead"), ("particle", "give --micro-batch 2 instead"), ("lodisc", "or choose")],
)
def test_a_contrast_over_the_batch_is_not_added_up(case: str, remedy: str) -> None:
    with pytest.raises(UserError, match=f"^--accumulate is given and the loss of {case} is not a mean .*{remedy}"):
        check_step(set_options(build(case), accumulate=3))


@pytest.mark.parametrize(
    ("name", "options", "layer"),
    [
        ("simclr", {"micro_batch": 2}, "encoder.net.conv1.1"),
        ("byol", {"accumulate": 2}, "encoder.net.conv1.1"),
        ("byol", {"accumulate": 2, "model": "test_vit"}, "base.projector.layers.1"),
    ],
)
def test_batch_norm_that_would_see_a_part_is_refused_by_its_name(
    name: str, options: dict[str, Any], layer: str
) -> None:
    kind, sizes = method_class(name), {"model": "test_resnet", "size": 32, "hidden": 16, "projection": 8}
    config = kind.Config(**(sizes | options))
    with pytest.raises(UserError, match=rf"would give the BatchNorm {re.escape(layer)} the statistics of a part"):
        check_step(kind(config))
    check_step(kind(replace(config, micro_bn="chunk")))


def test_a_network_that_timm_cannot_checkpoint_is_refused_by_name() -> None:
    from fgfast.models.backbone import Backbone

    with pytest.raises(UserError, match=r"^timm cannot checkpoint inception_v3: leave out --grad-checkpoint"):
        Backbone("inception_v3", size=80).checkpoint_activations()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"micro_batch": 7}, "--micro-batch is 7: give at most --batch-size, 6."),
        ({"accumulate": 7}, "--accumulate is 7: give at most --batch-size, 6."),
        ({"accumulate": 0}, "--accumulate is 0: give at least 1."),
        ({"micro_batch": 2, "accumulate": 2}, "--micro-batch and --accumulate both divide a batch: leave one of them"),
    ],
)
def test_chunks_that_do_not_fit_are_one_sentence(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=re.escape(sentence)):
        validate(TrainConfig(data="data", out="run", batch_size=6, **options))


@pytest.mark.parametrize(
    "arguments",
    [["simclr", "--micro-batch", "7"], ["simclr", "--micro-batch", "2"], ["simclr", "--accumulate", "2"],
     ["supervised", "--micro-batch", "2"]],
)  # fmt: skip
def test_the_command_refuses_with_status_2_and_writes_nothing(
    arguments: list[str], drawn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    common = ["--data", str(drawn), "--out", str(out), "--model", "test_resnet", "--batch-size", "6", "--size", "32"]
    assert main(["pretrain", *arguments, *common, "--device", "cpu"]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert not out.exists()


@pytest.mark.slow
def test_a_run_may_be_resumed_in_chunks(drawn: Path, tmp_path: Path) -> None:
    """It gives the weights of a run without them."""
    from fgfast.train.loop import pretrain

    options: dict[str, Any] = {"optimizer": "sgd", "model": "test_vit"}
    for name, other in (("plain", {}), ("run", {"micro_batch": 4, "grad_checkpoint": True})):
        config = simclr_config(drawn, tmp_path / name, epochs=1, **options)
        pretrain("simclr", config)
        pretrain("simclr", replace(config, epochs=2, resume=True, **other))
    found, expected = (torch.load(tmp_path / name / "last.pt")["method"] for name in ("run", "plain"))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_every_method_says_how_its_step_is_divided() -> None:
    """By itself, or not at all: no method does both wrongly by inheritance."""
    split = {name for name in METHODS if can_split(method_class(name))}
    added = {name for name in METHODS if method_class(name).adds_up}
    assert split == {"byol", "detcon", "dino", "mocov2", "mocov3", "particle", "simclr", "simsiam"}
    assert added == {"byol", "color", "jigsaw", "simsiam", "srgan", "supervised"}
