"""Leftovers of processes that were killed: which files are some, and which of them may be removed."""

import os
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fgfast.files import ABANDONED, clear_leftovers, is_leftover, write_atomic


@pytest.fixture
def ended() -> int:
    """The number of a process that has ended."""
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def test_the_file_of_a_process_that_has_ended_is_removed_at_once(
    tmp_path: Path, ended: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "getpid", lambda: ended)
    names = []

    def write(partial: Path) -> None:
        partial.touch()
        names.append(partial)

    write_atomic(tmp_path / "parts_0/birds/a.png", write)
    names[0].touch()
    assert is_leftover(names[0])
    assert clear_leftovers(tmp_path) == names
    assert [file.name for file in names[0].parent.iterdir()] == ["a.png"]


def test_a_file_that_is_being_written_stays(tmp_path: Path) -> None:
    write_atomic(tmp_path / "a.txt", lambda p: (p.write_text("complete"), clear_leftovers(tmp_path)))
    assert (tmp_path / "a.txt").read_text() == "complete"


@pytest.mark.parametrize("name", [".a.txt.0123abcd-1-1.partial", ".a.txt.1.1.partial"], ids=["other", "earlier"])
@pytest.mark.parametrize("age", [0, ABANDONED - 60, ABANDONED + 60])
def test_a_file_whose_process_is_not_known_is_removed_once_nothing_is_written_to_it(
    tmp_path: Path, name: str, age: float
) -> None:
    (tmp_path / name).touch()
    os.utime(tmp_path / name, (time.time() - age,) * 2)
    assert is_leftover(tmp_path / name)
    clear_leftovers(tmp_path)
    assert (tmp_path / name).exists() == (age < ABANDONED)


@pytest.mark.parametrize(
    "name", ["a.partial", ".a.partial", ".a.1.partial", "a.txt.1.1.partial", ".a.txt.1.1.partial.png", ".1.1.partial"]
)
def test_a_file_of_another_name_is_none(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    os.utime(tmp_path / name, (0, 0))
    assert not is_leftover(tmp_path / name)
    assert clear_leftovers(tmp_path) == []
    assert (tmp_path / name).exists()


def test_threads_that_write_one_file_do_not_meet(tmp_path: Path) -> None:
    barrier = threading.Barrier(2, timeout=10)

    def write(text: str) -> None:
        write_atomic(tmp_path / "a.txt", lambda p: (p.write_text(text), barrier.wait()))

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(write, ("one", "two"))) == [None, None]
    assert (tmp_path / "a.txt").read_text() in ("one", "two")
    assert len(list(tmp_path.iterdir())) == 1
