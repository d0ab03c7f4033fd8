"""The tables of all parts, on the terminal and between markers in RESULTS.md."""

import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks import record

RESULTS = Path(__file__).resolve().parents[1] / "RESULTS.md"


class Part(NamedTuple):
    """What a part measured: its name, tables in Markdown, and the faults that it found, a sentence each."""

    name: str
    text: str
    faults: list[str]


def markdown(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def block(part: Part, command: str, seconds: float) -> str:
    """The text of a part for RESULTS.md: the command, where and when it ran, its tables and the number of faults."""
    cuda = torch.cuda.is_available()
    here = record.setting(torch.device("cuda" if cuda else "cpu"))
    faults = f"{len(part.faults)} fault{'s' * (len(part.faults) != 1)}" if part.faults else "no fault"
    return (
        f"`{command}`, {time.strftime('%Y-%m-%d')}, {seconds:.0f} s, {faults}; {here['device']}, {here['versions']}, "
        f"commit {here['commit'] or 'unknown'}.\n\n{part.text}"
    )


def write(name: str, text: str, path: Path = RESULTS) -> None:
    """Replace what stands between the two markers of a part.

    Raises:
        ValueError: the file lacks the markers.
    """
    first, last = f"<!-- endurance: {name} -->", f"<!-- end of endurance: {name} -->"
    before = path.read_text(encoding="utf-8")
    found = re.compile(f"(?<={re.escape(first)}\n).*?(?={re.escape(last)}\n)", re.DOTALL)
    after, n = found.subn(lambda _: f"\n{text}\n\n", before)
    if n != 1:
        raise ValueError(f"{path} does not have the lines {first} and {last} once: add them where the table belongs.")
    path.write_text(after, encoding="utf-8")
