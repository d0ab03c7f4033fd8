"""The locks that ``make`` installs, and the messages of the set-up on machines where something is missing."""

import os
import re
import shutil
import stat
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
LOCKS = sorted((ROOT / ".ci" / "locks").glob("*.txt"))
PYTHONS = ("cp311", "cp312", "cp313")

# A fake interpreter: it answers the queries of the set-up from environment variables and installs nothing.
FAKE_PYTHON = """#!/bin/sh
echo "$*" | tr '\\n' ' ' >>"$CALLS"; echo >>"$CALLS"
case "$*" in
    *"import platform, sys"*) echo "$TAG" ;;
    *"version_info[:2])") case "$0" in *python3.13) echo 3.13 ;; *) echo 3.11 ;; esac ;;
    *version_info*) exit "$OUT_OF_RANGE" ;;
    "-m venv "*) [ "$VENV" = 0 ] && mkdir -p "$3/bin" && cp "$0" "$3/bin/python" && touch "$3/pyvenv.cfg" ;;
    "-m pip --version") ;;
    "-m pip install "*) echo "$PIP_ERROR"; [ -z "$PIP_ERROR" ] ;;
    *_native*) exit "$NO_NATIVE" ;;
    *platform.machine*) echo "Darwin arm64" ;;
    --version) echo "Python 3.11.7" ;;
esac
"""


def pinned(lock: Path) -> dict[str, Version]:
    """The versions in a lock by package."""
    matches = (re.match(r"([A-Za-z0-9._-]+)==([^ ]+) \\", line) for line in lock.read_text().splitlines())
    return {canonicalize_name(match[1]): Version(match[2]) for match in matches if match}


def test_every_python_has_its_locks() -> None:
    names = {lock.stem for lock in LOCKS}
    assert names == {f"{tag}{suffix}" for tag in PYTHONS for suffix in ("", "-oldest", "-newest")}


@pytest.mark.parametrize("lock", LOCKS, ids=lambda path: path.stem)
def test_a_lock_has_versions_and_hashes_and_no_urls(lock: Path) -> None:
    text = lock.read_text()
    records = re.sub(r" *\\\n +", " ", text).splitlines()[1:]
    assert len(records) > 30
    for record in records:
        name, *hashes = record.split()
        assert re.fullmatch(r"[a-z0-9-]+==[0-9][A-Za-z0-9.+]*", name), record
        assert hashes
        assert all(re.fullmatch(r"--hash=sha256:[0-9a-f]{64}", h) for h in hashes), record
    assert "/" not in text


@pytest.mark.parametrize("tag", PYTHONS)
def test_the_lock_is_within_the_ranges_of_the_project(tag: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"]
    wanted = [
        *project["project"]["dependencies"],
        *extras["train"],
        *extras["dev"],
        *project["build-system"]["requires"],
    ]
    versions = pinned(ROOT / ".ci" / "locks" / f"{tag}.txt")
    for text in wanted:
        need = Requirement(text)
        assert versions[canonicalize_name(need.name)] in need.specifier, text


@pytest.mark.parametrize("tag", PYTHONS)
def test_the_oldest_torch_is_the_oldest_that_the_project_allows(tag: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    (least,) = (Requirement(text).specifier for text in project["project"]["dependencies"])
    oldest, locked, newest = (pinned(ROOT / ".ci" / "locks" / f"{tag}{s}.txt") for s in ("-oldest", "", "-newest"))
    assert str(least) == f">={oldest['torch'].major}.{oldest['torch'].minor}"
    assert oldest["torch"] < locked["torch"] <= newest["torch"]
    assert oldest["triton"] < locked["triton"] <= newest["triton"]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with .ci, and a fake interpreter on the PATH under every name that the set-up looks for."""
    shutil.copytree(ROOT / ".ci", tmp_path / "checkout" / ".ci")
    (tmp_path / "path").mkdir()
    for name in ("python3", "python3.11", "python3.12", "python3.13"):
        file = tmp_path / "path" / name
        file.write_text(FAKE_PYTHON)
        file.chmod(file.stat().st_mode | stat.S_IXUSR)
    return tmp_path / "checkout"


def set_up(checkout: Path, *arguments: str, **answers: str) -> tuple[int, str, str, list[str]]:
    """Run the set-up: exit status, standard output and error, and the arguments of each call of the interpreter."""
    calls = checkout.parent / "calls"
    calls.touch()
    known = {"TAG": "cp311", "OUT_OF_RANGE": "0", "VENV": "0", "PIP_ERROR": "", "NO_NATIVE": "0", "CALLS": str(calls)}
    environment = {
        "PATH": f"{checkout.parent / 'path'}:/usr/bin:/bin", "HOME": str(checkout.parent), **known, **answers
    }  # fmt: skip
    done = subprocess.run(
        ["bash", str(checkout / ".ci" / "setup"), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr, calls.read_text().splitlines()


def test_only_the_lock_of_the_interpreter_is_installed(checkout: Path) -> None:
    status, stdout, stderr, calls = set_up(checkout)
    assert (status, stdout, stderr) == (0, "", "")
    installed = [call.split("install --disable-pip-version-check ")[1].strip() for call in calls if " install " in call]
    assert installed == [
        "--require-hashes --no-deps -r .venv/build-tools.txt",
        "--require-hashes --no-deps --no-build-isolation -r .ci/locks/cp311.txt",
        "--no-deps --no-build-isolation -e .",
    ]
    tools = (checkout / ".venv" / "build-tools.txt").read_text()
    assert set(re.findall(r"^([a-z0-9]+)==", tools, re.M)) == {"pybind11", "setuptools", "wheel"}
    assert (checkout / ".venv" / ".installed").exists()


def test_another_platform_installs_the_ranges_with_a_notice(checkout: Path) -> None:
    status, stdout, stderr, calls = set_up(checkout, TAG="")
    assert (status, stderr) == (0, "")
    assert stdout.count("\n") == 1
    assert "There is no lock for Darwin arm64" in stdout
    assert [call.strip().endswith("-e .[train,weights,dev]") for call in calls if " install " in call] == [True]


@pytest.mark.parametrize(
    ("arguments", "answers", "sentence"),
    [
        (
            (),
            {"OUT_OF_RANGE": "1"},
            "No Python 3.11, 3.12 or 3.13 was found: install one, or give it with make PYTHON=",
        ),
        (("python3.13",), {"OUT_OF_RANGE": "1"}, "python3.13 is not a Python 3.11, 3.12 or 3.13: give one with"),
        (("/no/such",), {}, "/no/such is not a Python 3.11, 3.12 or 3.13: give one with"),
        ((), {"VENV": "1"}, "install its venv module (on Debian: apt-get install python3-venv)"),
        ((), {"TAG": "cp314"}, ".ci/locks/cp314.txt is missing: restore it from git"),
        ((), {"PIP_ERROR": "NewConnectionError('..')"}, "No package index can be reached: check the network"),
        ((), {"PIP_ERROR": "THESE PACKAGES DO NOT MATCH THE HASHES"}, "differs from its hash in the lock"),
        ((), {"PIP_ERROR": "OSError: No space left on device"}, "The disk is full: .venv needs 8 GB"),
        (
            (),
            {"PIP_ERROR": "No matching distribution found for torch==9"},
            "found for torch==9: check the network",
        ),
        (
            (),
            {"PIP_ERROR": "The user requested (constraint) torch<=2.1"},
            "excludes what the lock names (torch<=2.1): lift it",
        ),
        (("oldest",), {}, "There is no .venv, whose Python is needed: run make test first."),
    ],
)
def test_an_error_is_one_sentence_with_the_remedy(
    checkout: Path, arguments: tuple[str, ...], answers: dict[str, str], sentence: str
) -> None:
    status, _, stderr, _ = set_up(checkout, *arguments, **answers)
    assert status == 2
    assert sentence in stderr
    assert stderr.count("\n") == 1
    assert not (checkout / ".venv" / ".installed").exists()


def test_an_unknown_error_of_pip_is_quoted(checkout: Path) -> None:
    status, _, stderr, _ = set_up(checkout, PIP_ERROR="error: something else")
    assert status == 2
    assert stderr.splitlines()[0] == "error: something else"
    assert "pip failed as shown above" in stderr.splitlines()[-1]


def test_an_incomplete_environment_is_created_again(checkout: Path) -> None:
    (checkout / ".venv" / "bin").mkdir(parents=True)
    (checkout / ".venv" / "pyvenv.cfg").touch()
    status, stdout, stderr, _ = set_up(checkout)
    assert (status, stdout) == (0, "")
    assert stderr == ".venv is incomplete and is created again.\n"


def test_a_python_that_differs_from_the_environment_is_refused(checkout: Path) -> None:
    assert set_up(checkout)[0] == 0
    assert set_up(checkout, "python3.11")[0] == 0
    status, _, stderr, _ = set_up(checkout, "python3.13")
    assert status == 2
    assert ".venv has Python 3.11.7, another version than python3.13: run make clean" in stderr


def test_a_folder_that_is_not_an_environment_is_not_removed(checkout: Path) -> None:
    (checkout / ".venv").mkdir()
    (checkout / ".venv" / "thesis.txt").touch()
    status, _, stderr, _ = set_up(checkout)
    assert status == 2
    assert ".venv is not a virtual environment: move it away" in stderr
    assert (checkout / ".venv" / "thesis.txt").exists()


def test_without_a_compiler_the_extension_is_left_out_with_a_notice(checkout: Path) -> None:
    status, stdout, stderr, _ = set_up(checkout, NO_NATIVE="1")
    assert (status, stderr) == (0, "")
    assert "The compiled extension (mask sampler, k-means of pyramids) was not built" in stdout
    assert "install a C++ compiler" in stdout


def test_the_oldest_torch_has_a_separate_cached_environment(checkout: Path) -> None:
    set_up(checkout)
    folders = []
    for _ in range(2):
        status, stdout, stderr, _ = set_up(checkout, "oldest")
        assert (status, stderr) == (0, "")
        folders.append(stdout)
    assert folders[0] == folders[1]
    folder = Path(folders[0].strip())
    assert folder.parent == checkout.parent / ".cache" / "fgfast" / "environments"
    assert folder.name.startswith("cp311-oldest-")
    assert not os.path.samefile(folder, checkout / ".venv")
