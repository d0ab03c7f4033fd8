"""The README of the methods: its example trains, and it is complete."""

import re
from pathlib import Path
from typing import Any

import torch

import fgfast.methods.base
from fgfast.cli.parse import parse
from fgfast.config import validate
from fgfast.methods.base import METHODS, Method
from fgfast.train.log import read_metrics
from fgfast.train.loop import pretrain
from tests.conftest import TINY

FILE = Path(fgfast.methods.base.__file__).with_name("README.md")
TEXT = FILE.read_text(encoding="utf-8")


def example() -> dict[str, Any]:
    """The names that the code of the README defines."""
    (code,) = re.findall(r"^```python\n(.*?)^```", TEXT, re.S | re.M)
    names: dict[str, Any] = {"__name__": "example"}
    exec(compile(code, str(FILE), "exec"), names)
    return names


def test_the_example_trains(drawn: Path, tmp_path: Path) -> None:
    """Two steps have finite losses and change the weights; the held-out accuracy is logged."""
    names = example()
    run = tmp_path / "run"
    config = names["RotationConfig"](
        data=str(drawn), out=str(run), model=TINY, size=32, batch_size=6, passes=2 * 6 * 4, log_every=1, device="cpu",
        threads=1, amp="off", smoothing=0.1,
    )  # fmt: skip
    validate(config)
    pretrain(names["Rotation"], config)
    rows, _ = read_metrics(run / "metrics.jsonl")
    assert [row["step"] for row in rows if "loss" in row] == [1, 2]
    assert all(torch.tensor(row["loss"]).isfinite() for row in rows if "loss" in row)
    assert 0 <= rows[-1]["held_out_accuracy"] <= 1
    init, last = (torch.load(run / f"{name}.pt", weights_only=True)["method"] for name in ("init", "last"))
    assert not torch.equal(init["classifier.weight"], last["classifier.weight"])


def test_the_options_of_the_example_are_flags() -> None:
    assert parse(example()["RotationConfig"], ["--smoothing", "0.2"], "pretrain rotation").smoothing == 0.2


def test_every_member_and_every_method_is_described() -> None:
    members = {name for name in vars(Method) | Method.__annotations__ if not name.startswith("_")}
    described = set(re.findall(r"`(\w+)", TEXT))
    assert members - {"config", "name", "Config"} <= described
    assert re.findall(r"^\| `(\w+)` \|", TEXT[TEXT.index("## The methods") :], re.M) == list(METHODS)


def test_it_is_short_and_its_links_exist() -> None:
    assert len(TEXT.splitlines()) < 150
    assert [line for line in TEXT.splitlines() if len(line) > 120 and "](" not in line] == []
    targets = [target for target in re.findall(r"\]\(([^)\s]+)\)", TEXT) if "://" not in target]
    assert [target for target in targets if not (FILE.parent / target).exists()] == []
