"""The README: its code runs, its commands and links exist, and it stays short."""

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
PROSE = re.sub(r"^```.*?^```", "", TEXT, flags=re.S | re.M)
CODE = "\n".join(re.findall(r"^```\w*\n(.*?)^```", TEXT, re.S | re.M) + re.findall(r"(?<!`)`([^`\n]+)`", PROSE))
COMMAND_LINES = re.findall(r"^(?:\$ )?fgfast ([a-z][\w-]*)([^#\n]*)", CODE.replace("\\\n", " "), re.M)
PARSED_EARLIER = ("--config", "--debug")  # options that no help text of a command lists
PYTHON = re.findall(r"^```python\n(.*?)^```", TEXT, re.S | re.M)


@pytest.mark.parametrize("code", PYTHON, ids=range(len(PYTHON)))
def test_python_blocks_run(code: str) -> None:
    """Every block runs in an empty namespace; a loss is finite."""
    names: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), names)
    loss = names.get("loss")
    if isinstance(loss, torch.Tensor):
        assert torch.isfinite(loss)


def test_the_library_example_is_short_and_gives_a_gradient() -> None:
    """The first block has at most ten lines of code besides imports, and its loss reaches the feature maps."""
    code = PYTHON[0]
    assert len([line for line in code.splitlines() if line.strip() and not line.startswith(("import", "from"))]) <= 10
    names: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), names)
    tensors = [x for value in names.values() for x in (value if isinstance(value, list) else [value])]
    gradients = [x.grad for x in tensors if isinstance(x, torch.Tensor) and x.is_leaf and x.grad is not None]
    assert any(g.abs().sum() > 0 for g in gradients)


def test_commands_exist() -> None:
    """Every ``fgfast COMMAND`` in code blocks and backticks is a command of the program."""
    from fgfast.cli.commands import COMMANDS

    used = {name for name, _ in COMMAND_LINES}
    assert used
    assert used <= set(COMMANDS)


@pytest.mark.slow
def test_options_exist(capsys: pytest.CaptureFixture[str]) -> None:
    """Every --option of a command line is an option of that command."""
    from fgfast.cli import main

    for name, rest in COMMAND_LINES:
        options = re.findall(r"--[a-z][a-z-]*", rest)
        method = [word for word in rest.split()[:1] if name == "pretrain"]
        if options and method != ["METHOD"]:
            assert main([name, *method, "--help"]) == 0
            text = capsys.readouterr().out
            assert [option for option in options if option not in text and option not in PARSED_EARLIER] == []


def test_relative_links_exist() -> None:
    """Targets of links and sources of images that are not URLs are files or folders of the repository."""
    targets = re.findall(r"\]\(([^)\s]+)", PROSE) + re.findall(r"<img[^>]*src=\"([^\"]+)", PROSE)
    local = [t.split("#")[0] for t in targets if not re.match(r"[a-z]+:|#", t)]
    assert [t for t in local if not (ROOT / t).exists()] == []


def test_anchors_exist() -> None:
    """Links to a section of the README itself name one of its headings."""
    headings = re.findall(r"^#+ (.+)$", PROSE, re.M)
    anchors = {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}
    assert set(re.findall(r"\]\(#([^)\s]+)", PROSE)) <= anchors


def test_the_readme_is_short() -> None:
    assert len(TEXT.splitlines()) < 140


def test_lines_are_short() -> None:
    """At most 120 characters, except rows of tables and lines with a link or a URL."""
    lines = [line for line in TEXT.splitlines() if not line.startswith("|") and "](" not in line and "://" not in line]
    assert [line for line in lines if len(line) > 120] == []
