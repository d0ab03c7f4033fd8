"""Claims on folders: one holder at a time, whatever ended the one before."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from fgfast import claim as claims
from fgfast.claim import NAME, SILENT, Claim, claim_folder
from fgfast.errors import UserError

HOLD = """
import pathlib, sys, time, types
sys.modules["fgfast"] = types.ModuleType("fgfast")  # without torch, whose import takes seconds
sys.modules["fgfast"].__path__ = [sys.argv[1]]
from fgfast.claim import claim_folder
with claim_folder(pathlib.Path(sys.argv[2])):
    print("held", flush=True)
    time.sleep(60)
"""


@contextmanager
def other_process(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the folder."""
    command = [sys.executable, "-c", HOLD, str(Path(claims.__file__).parent), str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.kill()


def written(folder: Path, name: str = NAME, **changes: Any) -> Claim:
    """A claim of this process, with other values, in a folder."""
    claim = replace(claims._of_this_process(), **changes)
    (folder / name).write_text(json.dumps(asdict(claim)))
    return claim


def age(file: Path, seconds: float) -> None:
    """Let the last heartbeat of a claim be some time ago."""
    os.utime(file, (file.stat().st_mtime - seconds,) * 2)


def test_the_folder_of_a_running_process_is_refused_and_that_of_a_killed_one_taken_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The refusal names the process; the killed one is not waited for, so that it keeps its number."""
    with other_process(tmp_path) as process:
        with pytest.raises(UserError, match=rf"in use by process {process.pid} on .+ since .+: .*another --out"):
            claim_folder(tmp_path).__enter__()
        process.send_signal(signal.SIGKILL)
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        with claim_folder(tmp_path):
            (message,) = [record.message for record in caplog.records]
            assert f"process {process.pid}" in message
            assert "has ended" in message
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_claim_ends_with_its_block(tmp_path: Path, error: type[BaseException]) -> None:
    def fail() -> None:
        with claim_folder(tmp_path / "new"):
            assert [f.name for f in (tmp_path / "new").iterdir()] == [NAME]
            raise error

    with pytest.raises(error):
        fail()
    assert not list((tmp_path / "new").iterdir())


@pytest.mark.parametrize(
    "changes",
    [{"started": 1}, {"pid": 2**22 + 1}, {"machine": "before the restart"}, {"machine": "another", "host": "another"}],
)
def test_a_claim_of_a_process_that_ended_is_taken_over(tmp_path: Path, changes: dict[str, object]) -> None:
    """The number of a process may be used again; what happens on another machine is told by the heartbeat alone."""
    written(tmp_path, **changes)
    age(tmp_path / NAME, SILENT + 5)
    with claim_folder(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("machine", "seconds"), [(None, 10 * SILENT), ("another", SILENT - 60)])
def test_a_claim_holds_while_its_process_runs(tmp_path: Path, machine: str | None, seconds: float) -> None:
    """On this machine a process counts as running however old its heartbeat, on another one if it was minutes ago."""
    written(tmp_path, machine=machine or claims.machine())
    age(tmp_path / NAME, seconds)
    before = (tmp_path / NAME).read_bytes()
    with pytest.raises(UserError, match="in use"):
        claim_folder(tmp_path).__enter__()
    assert [(f.name, f.read_bytes()) for f in tmp_path.iterdir()] == [(NAME, before)]


def test_of_many_that_take_over_one_wins(tmp_path: Path) -> None:
    """Round after round, of eight that find the claim of an ended process just one gets the folder."""
    for _ in range(20):
        written(tmp_path, started=1)
        ready, done, held, refused = threading.Barrier(8), threading.Barrier(8), [], []

        def take(ready: threading.Barrier, done: threading.Barrier, held: list[Claim], refused: list[str]) -> None:
            ready.wait()
            try:
                with claim_folder(tmp_path) as claim:
                    held.append(claim)
                    done.wait()
            except UserError as error:
                refused.append(str(error))
                done.wait()

        threads = [threading.Thread(target=take, args=(ready, done, held, refused)) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (len(held), len(refused)) == (1, 7)
        assert not list(tmp_path.iterdir())


def test_a_late_taker_of_a_released_folder_starts_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that still takes over a claim after its folder was released and claimed anew is refused."""
    stale = written(tmp_path, started=1)
    real, calls = claims._chain, 0

    def slow(folder: Path) -> tuple[list[Path], Claim | None, Path]:
        nonlocal calls
        chain = real(folder)
        calls += 1
        if calls == 1:  # meanwhile another process took the folder over, released it, and a third one claimed it
            written(folder)
        return chain

    monkeypatch.setattr(claims, "_chain", slow)
    with pytest.raises(UserError, match="in use"):
        claim_folder(tmp_path).__enter__()
    assert not (tmp_path / f"{NAME}.{stale.token}").exists()


def test_a_holder_that_was_taken_over_notices(tmp_path: Path) -> None:
    """It raises, and its end leaves the claim of the other process in place."""
    with claim_folder(tmp_path) as mine:
        mine.confirm(tmp_path)
        written(tmp_path, f"{NAME}.{mine.token}")
        with pytest.raises(UserError, match="taken over by process"):
            mine.confirm(tmp_path)
    assert len([f for f in tmp_path.iterdir() if claims.is_claim(f)]) == 2


def test_a_holder_touches_its_claim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "HEARTBEAT", 0.01)
    with claim_folder(tmp_path):
        age(tmp_path / NAME, 1000)
        before = (tmp_path / NAME).stat().st_mtime
        for _ in range(500):
            if (tmp_path / NAME).stat().st_mtime > before + 900:
                break
            time.sleep(0.01)
        assert (tmp_path / NAME).stat().st_mtime > before + 900


@pytest.mark.parametrize(
    "changes",
    [
        {"token": "a\0b"}, {"token": "a" * 300}, {"token": "../../abcdef"}, {"token": 5}, {"token": "A" * 16},
        {"pid": "1"}, {"pid": 10**30}, {"pid": 0}, {"pid": True}, {"host": None}, {"started": "1"}, {"more": 1}, None,
    ],
)  # fmt: skip
def test_what_is_no_claim_holds_until_it_is_silent(
    tmp_path: Path, changes: dict[str, Any] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the file holds, or if it is a link to nothing."""
    monkeypatch.setattr(claims.time, "sleep", lambda _: None)
    file = tmp_path / NAME
    if changes is None:
        file.symlink_to("/nowhere/x")
    else:
        file.write_text(json.dumps(asdict(claims._of_this_process()) | {"started": 1} | changes))
    with pytest.raises(UserError, match=rf"in use by .* not known: .*remove {file}"):
        claim_folder(tmp_path).__enter__()
    past = file.lstat().st_mtime - SILENT - 5
    os.utime(file, (past, past), follow_symlinks=False)
    with claim_folder(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_a_circle_of_claims_is_refused(tmp_path: Path) -> None:
    token = written(tmp_path, started=1).token
    written(tmp_path, f"{NAME}.{token}", started=1, token=token)
    with pytest.raises(UserError, match=rf"{NAME}\.{token} names itself .*: remove it"):
        claim_folder(tmp_path).__enter__()


def test_a_folder_that_is_never_free_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / NAME).touch()
    monkeypatch.setattr(claims, "_chain", lambda folder: ([], None, folder / NAME))
    with pytest.raises(UserError, match="changes hands all the time"):
        claim_folder(tmp_path).__enter__()


def test_an_unreadable_claim_holds_until_it_is_silent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as one that another process is just writing, or that other users may not read."""
    monkeypatch.setattr(claims.time, "sleep", lambda _: None)
    (tmp_path / NAME).write_text('{"token": ')
    with pytest.raises(UserError, match="in use"):
        claim_folder(tmp_path).__enter__()
    age(tmp_path / NAME, SILENT + 5)
    with claim_folder(tmp_path):
        pass
    assert not list(tmp_path.iterdir())
