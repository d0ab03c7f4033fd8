"""The README's code runs as it stands."""

import re
from pathlib import Path

import torch

README = Path(__file__).parent.parent / "README.md"


def test_library_example_runs() -> None:
    """The Python block runs in an empty namespace, gives a finite loss and a gradient, in ten lines of code."""
    block = re.search(r"```python\n(.*?)```", README.read_text(), re.S)
    assert block is not None
    code = block.group(1)
    assert len([line for line in code.splitlines() if line.strip() and not line.startswith("import")]) <= 10
    names: dict[str, object] = {}
    exec(compile(code, str(README), "exec"), names)
    loss, maps = names["loss"], names["maps"]
    assert isinstance(loss, torch.Tensor)
    assert torch.isfinite(loss)
    assert isinstance(maps, list)
    assert maps[0].grad.abs().sum() > 0


def test_commands_of_the_readme_exist() -> None:
    """Every fgfast command and flag that the README shows is one that the program has."""
    from fgfast.cli.commands import COMMANDS

    used = set(re.findall(r"^fgfast (\w+)", README.read_text(), re.M))
    assert used
    assert used <= set(COMMANDS)
