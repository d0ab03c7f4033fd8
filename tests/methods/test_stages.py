"""Every method with every optimiser trains through its stages, and goes on from each as if it had not stopped."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from fgfast.methods.base import Method, Progress
from fgfast.train.optim import FiniteGuard, make_optimizer
from tests.methods.method_cases import build, joined_batch

pytestmark = pytest.mark.slow

# Of 4 steps the last 2 or 3 are those of a later stage: an adversary, pairs of decoded images, another temperature.
CASES = (
    "byol", "color", "jigsaw", "lcr moco", "lodisc sample", "mocov2", "mocov3", "particle random", "simclr", "simsiam",
    "srgan", "supervised", "synthpair moco",
)  # fmt: skip
STEPS = 4


class Run:
    """A method and its optimiser, without files."""

    def __init__(self, case: str, optimizer: str) -> None:
        self.method: Method = build(case)
        self.method.config.optimizer = optimizer  # type: ignore[assignment]
        self.optimizer = make_optimizer(self.method, self.method.config)
        self.guard = FiniteGuard(self.method, self.optimizer)

    def train(self, first: int, last: int) -> None:
        """Steps ``first`` to ``last`` - 1."""
        for step in range(first, last):
            self.method.before_step(Progress(step, STEPS))
            batch = joined_batch(step)
            batch.valid[:2] = True  # a last batch may hold few images, but not none
            loss = self.method(batch)["loss"]
            loss.backward()
            norm = nn.utils.clip_grad_norm_(self.method.parameters(), 5.0)
            self.guard.step(loss, norm, batch.index, step)
            self.optimizer.zero_grad()
            self.method.after_step(Progress(step + 1, STEPS))

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        state = {"method": self.method.state_dict(), "optimizer": self.optimizer.state_dict()}
        return copy.deepcopy(state | {"random": torch.get_rng_state()})

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.method.load_state_dict(state["method"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.guard = FiniteGuard(self.method, self.optimizer)
        torch.set_rng_state(state["random"])


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "lars"])
@pytest.mark.parametrize("case", CASES)
def test_a_run_goes_on_bit_for_bit_from_every_stage(case: str, optimizer: str) -> None:
    """Weights, buffers and moments after four steps, also when stopped after the first and after the third."""
    whole = Run(case, optimizer)
    start, stops = whole.state()["method"], []
    for step in range(STEPS):
        whole.train(step, step + 1)
        stops.append(whole.state())
    assert any(not torch.equal(start[k], v) for k, v in stops[-1]["method"].items() if isinstance(v, torch.Tensor))
    assert not whole.guard.verdicts(wait=True)
    for step in (1, 3):
        resumed = Run(case, optimizer)
        resumed.load(stops[step - 1])
        resumed.train(step, STEPS)
        torch.testing.assert_close(resumed.state(), stops[-1], rtol=0, atol=0)


def test_the_adversary_may_join_an_earlier_checkpoint() -> None:
    """SGD's state of earlier versions holds no momentum of parameters that had no gradient yet."""
    run, resumed = Run("srgan", "sgd"), Run("srgan", "sgd")
    run.train(0, 1)
    state = run.state()
    moments = state["optimizer"]["state"]
    order = {id(p): i for i, p in enumerate(p for g in run.optimizer.param_groups for p in g["params"])}
    generator = {order[id(p)] for p in run.method.get_submodule("generator").parameters()}
    state["optimizer"]["state"] = {i: s for i, s in moments.items() if i in generator}
    assert 0 < len(state["optimizer"]["state"]) < len(moments)
    resumed.load(state)
    resumed.train(1, STEPS)
    run.train(1, STEPS)
    torch.testing.assert_close(resumed.state()["method"], run.state()["method"], rtol=0, atol=0)
