"""The guard against losses that are not finite, the schedule of the learning rate, and weight decay."""

import pytest
import torch
from torch import nn

from fgfast.config import TrainConfig
from fgfast.errors import UserError
from fgfast.train.optim import LAG, MAX_SKIPPED_IN_A_ROW, FiniteGuard, make_optimizer


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1))


def guarded_step(module: nn.Module, guard: FiniteGuard, x: torch.Tensor, step: int) -> None:
    loss = module(x).square().mean()
    loss.backward()
    norm = nn.utils.clip_grad_norm_(module.parameters(), 5.0)
    guard.step(loss, norm, torch.arange(len(x)), step)
    guard.optimizer.zero_grad()


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "lars"])
def test_bad_step_has_no_effect(optimizer: str) -> None:
    """Weights, moments and BatchNorm statistics equal those of the same run without the bad batch."""
    good = [torch.randn(6, 4, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    bad = torch.full((6, 4), float("nan"))
    ends = []
    for batches in (good, [bad, good[0], bad, good[1], good[2], bad, good[3]]):
        module = net()
        guard = FiniteGuard(module, make_optimizer(module, TrainConfig(optimizer=optimizer, lr=0.1)))
        for step, x in enumerate(batches):
            guarded_step(module, guard, x, step)
        ends.append({k: v for k, v in module.state_dict().items() if v.is_floating_point()})
    for key, value in ends[0].items():
        torch.testing.assert_close(ends[1][key], value, rtol=0, atol=0)


def test_sgd_makes_the_steps_of_pytorch() -> None:
    """Bit for bit, the first step and those after a checkpoint included; a parameter may join later."""
    ends = []
    for ours in (True, False):
        module, late = net(), nn.Parameter(torch.ones(3, 2))
        module.register_parameter("late", late)
        made = [make_optimizer(module, TrainConfig(optimizer="sgd", lr=0.1, weight_decay=0.01))]
        if not ours:  # its fused step takes all parameters from the first one on, or none
            decays = [(p, 0.01 if p.ndim > 1 else 0.0) for p in module.parameters()]
            made = [torch.optim.SGD([p], lr=0.1, momentum=0.9, weight_decay=d, fused=True) for p, d in decays]
        for step in range(4):
            loss = module(torch.ones(2, 4) * torch.arange(4)).square().mean() + (late.square().sum() if step > 1 else 0)
            loss.backward()
            for optimizer in made:
                optimizer.step()
                optimizer.zero_grad()
                optimizer.load_state_dict(optimizer.state_dict())
        ends.append(dict(module.named_parameters()))
    torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=0)


def test_lars_makes_the_steps_of_its_definition() -> None:
    """In float64, with momentum and a schedule of weight decay: rates for matrices, none for vectors and zeros."""
    module = net().double()
    nn.init.zeros_(module.get_submodule("3").weight)  # type: ignore[arg-type]
    lr = 20.0
    weights = {name: p.detach().clone() for name, p in module.named_parameters()}
    moments = {name: torch.zeros_like(w) for name, w in weights.items()}
    optimizer = make_optimizer(module, TrainConfig(optimizer="lars", lr=lr, weight_decay=1.0))
    for step in range(4):
        optimizer.param_groups[0]["weight_decay"] = decay = 0.01 * (step + 1)  # as the trainer does
        x = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        module(x).square().mean().backward()
        for name, p in module.named_parameters():
            assert p.grad is not None
            update = p.grad.clone()
            if p.ndim > 1:
                update += decay * weights[name]
                if weights[name].norm() > 0 and update.norm() > 0:
                    update *= 0.001 * weights[name].norm() / update.norm()
            moments[name] = 0.9 * moments[name] + update
            weights[name] -= lr * moments[name]
        optimizer.step()
        optimizer.zero_grad()
        optimizer.load_state_dict(optimizer.state_dict())
        torch.testing.assert_close(dict(module.named_parameters()), weights, rtol=1e-12, atol=1e-12)


def test_lars_makes_the_steps_of_timm() -> None:
    """Without weight decay, which timm adds outside the norm; in float64, as the bias before BatchNorm gets noise."""
    from timm.optim import Lars

    ends = []
    for ours in (True, False):
        module = net().double()
        matrices, vectors = ([p for p in module.parameters() if (p.ndim > 1) == m] for m in (True, False))
        made: list[torch.optim.Optimizer] = [
            Lars(matrices, lr=5.0, momentum=0.9, eps=0.0, always_adapt=True),
            torch.optim.SGD(vectors, lr=5.0, momentum=0.9),
        ]
        if ours:
            made = [make_optimizer(module, TrainConfig(optimizer="lars", lr=5.0, weight_decay=0.0))]
        for step in range(4):
            x = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
            module(x).square().mean().backward()
            for optimizer in made:
                optimizer.step()
                optimizer.zero_grad()
        ends.append(dict(module.named_parameters()))
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-9, atol=1e-12)


def test_verdict_is_read_later_and_names_the_batch() -> None:
    """The host learns of a skipped step a few steps later, with the positions of its images."""
    module = net()
    guard = FiniteGuard(module, make_optimizer(module, TrainConfig()))
    seen = []
    for step in range(LAG + 2):
        x = torch.full((3, 4), float("inf")) if step == 1 else torch.randn(3, 4)
        guarded_step(module, guard, x, step)
        seen.append(guard.verdicts())
    assert [i for i, v in enumerate(seen) if v] == [LAG + 1]
    assert seen[-1] == [(1, [0, 1, 2])]
    assert guard.skipped == 1


def test_stop_is_read_with_the_verdict_of_its_step() -> None:
    """A request to stop takes effect LAG steps later, when every rank reads the flags of the same step."""
    module = net()
    guard = FiniteGuard(module, make_optimizer(module, TrainConfig()))
    seen = []
    for step in range(LAG + 2):
        loss = module(torch.randn(3, 4)).square().mean()
        loss.backward()
        guard.step(loss, torch.tensor(1.0), torch.arange(3), step, stop=step == 1)
        assert guard.verdicts() == []
        seen.append(guard.stop)
    assert seen == [False] * (LAG + 1) + [True]


def test_ten_in_a_row_stop_the_run() -> None:
    """Ten skipped steps in a row raise an error; nine and a good one do not."""
    for bad_steps, stops in ((MAX_SKIPPED_IN_A_ROW - 1, False), (MAX_SKIPPED_IN_A_ROW, True)):
        module = net()
        guard = FiniteGuard(module, make_optimizer(module, TrainConfig()))
        for step in range(bad_steps + 1):
            x = torch.full((3, 4), float("nan")) if step < bad_steps else torch.randn(3, 4)
            guarded_step(module, guard, x, step)
        if stops:
            with pytest.raises(UserError, match="10 steps in a row"):
                guard.verdicts(wait=True)
        else:
            assert len(guard.verdicts(wait=True)) == bad_steps


def test_schedule_warms_up_and_falls_to_zero() -> None:
    """It rises linearly to the peak, then falls as a cosine to 0."""
    config = TrainConfig(lr=1.0, warmup=0.1)
    rates = [config.learning_rate(s, 100) for s in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == pytest.approx(1.0)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[55] == pytest.approx(0.5)
    assert config.learning_rate(100, 100) == pytest.approx(0.0)


def test_norms_and_biases_get_no_weight_decay() -> None:
    """Only matrices decay."""
    groups = make_optimizer(net(), TrainConfig(weight_decay=0.1)).param_groups
    assert {g["weight_decay"]: {p.ndim for p in g["params"]} for g in groups} == {0.1: {2}, 0.0: {1}}


def test_bad_first_step_restores_loaded_buffers() -> None:
    """A guard that is built after loading restores the loaded buffers after a non-finite first step."""
    net = nn.BatchNorm1d(2)
    optimizer = make_optimizer(net, TrainConfig())
    net.load_state_dict(net.state_dict() | {"running_mean": torch.tensor([3.0, 4.0])})
    guard = FiniteGuard(net, optimizer)
    net(torch.randn(5, 2)).sum().backward()
    guard.step(torch.tensor(float("nan")), torch.tensor(1.0), torch.arange(5), 0)
    assert net.running_mean.tolist() == [3.0, 4.0]
