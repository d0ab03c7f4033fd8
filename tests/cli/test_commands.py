"""The command line as a user sees it: output, files and exit status."""

import errno
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fgfast.backend import missing
from fgfast.cli import main, parse
from fgfast.cli.commands import COMMANDS
from tests.conftest import TINY

pytestmark = pytest.mark.slow

COMMON = ["--model", TINY, "--model-args", "output_stride=8", "--size", "32", "--batch-size", "6", "--device", "cpu"]
COMMON += ["--threads", "1", "--amp", "off", "--hidden", "16", "--projection", "8", "--log-every", "1"]


@pytest.fixture(scope="module")
def run(drawn: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two epochs, trained through the command line."""
    out = tmp_path_factory.mktemp("cli") / "run"
    argv = ["pretrain", "particle", "--data", str(drawn), "--out", str(out), "--epochs", "2", "--n-parts", "4"]
    assert main([*argv, *COMMON]) == 0
    return out


@pytest.mark.quick
def test_every_command_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    """--help exits with 0 and lists the flags, no default of which is None; without arguments fgfast lists commands."""
    assert main([]) == 0
    listed = capsys.readouterr().out
    assert all(c in listed for c in COMMANDS)
    for command in COMMANDS:
        argv = [command, "simclr", "--help"] if command == "pretrain" else [command, "--help"]
        assert main(argv) == 0
        words = " ".join(capsys.readouterr().out.replace("│", " ").split())
        assert "--help" in words
        assert "default: None" not in words


def test_pretrain_writes_a_report(run: Path) -> None:
    """The report is self-contained."""
    text = (run / "report.html").read_text()
    assert "particle" in text
    assert "data:image/webp;base64" in text


@pytest.mark.parametrize("protocol", ["knn", "linear"])
def test_eval_prints_json_and_stores_it(
    run: Path, drawn: Path, protocol: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The score of each checkpoint is printed, and stored once in eval.json however often it is computed."""
    for checkpoint in ("init", "last", "last"):
        argv = ["eval", protocol, str(run), "--data", str(drawn), "--checkpoint", checkpoint, "--json"]
        assert main([*argv, "--device", "cpu"]) == 0
        row = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert row["checkpoint"] == checkpoint
        assert 0 <= row["low"] <= row["top1"] <= row["high"] <= 1
        assert (row["n"], row["n_train"]) == (18, 18)
    stored = [r for r in json.loads((run / "eval.json").read_text()) if r["protocol"] == protocol]
    assert [r["checkpoint"] for r in stored] == ["init", "last"]


def test_discover_and_pictures(run: Path, drawn: Path, tmp_path: Path) -> None:
    """``discover`` writes a map for every image and no other folder; ``pictures`` draws parts, views and neighbours."""
    assert main(["discover", str(run), "--data", str(drawn), "--out", str(tmp_path / "maps"), "--n-parts", "3"]) == 0
    maps = list((tmp_path / "maps").rglob("*.png"))
    assert len(maps) == 36
    assert set(np.unique(np.asarray(Image.open(maps[0])))) <= {0, 1, 2}
    before = sorted(drawn.rglob("*"))
    assert main(["discover", str(run), "--data", str(drawn), "--out", str(drawn / "images")]) == 2
    assert sorted(drawn.rglob("*")) == before
    assert main(["pictures", str(run), "--data", str(drawn), "--device", "cpu"]) == 0
    assert (run / "parts.png").is_file()
    assert {p.name for p in (run / "pictures").glob("*.png")} >= {"views.png", "pca.png", "neighbours.png"}


def test_info_gives_the_reason_for_a_missing_backend(capsys: pytest.CaptureFixture[str]) -> None:
    """Every backend is ready or has a reason."""
    assert main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["backends"]["torch"] == "ready"
    for name in ("native", "triton"):
        state, reason = found["backends"][name], missing(name)
        assert state.startswith("ready") if reason is None else state == reason


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["nosuch"], "no command 'nosuch'"),
        (["pretrain", "nosuch"], "no method 'nosuch'"),
        (["pretrain", "simclr", "--nosuch", "1"], "does not know '--nosuch'"),
        (["pretrain", "simclr", "--amp", "fp8"], "invalid choice 'fp8' for argument '--amp'"),
        (["pretrain", "simclr", "--epochs", "x"], "Error parsing --epochs"),
        (["eval", "knn", "RUN"], "--data"),
        (["pretrain", "simclr", "--out", "o"], "give --data"),
        (["pretrain", "simclr", "--data", "/no/such", "--out", "OUT"], "/no/such"),
        (["pretrain", "simclr", "--data", "DATA", "--out", "OUT", "--model", "nosuch"], "no model 'nosuch'"),
        (["pretrain", "simclr", "--data", "DATA", "--out", "OUT", "--init", "/no/such"], "/no/such"),
        (["pretrain", "simclr", "--data", "DATA", "--out", "OUT", "--device", "cuda:77"], "--device"),
        (["pretrain", "simclr", "--data", "DATA", "--out", "OUT", "--temperature", "-1"], "temperature"),
        (["pretrain", "particle", "--data", "DATA", "--out", "OUT", "--n-parts", "0"], "--n-parts"),
        (["eval", "knn", "/no/run", "--data", "DATA"], "/no/run is not a run folder"),
        (["eval", "knn", "RUN", "--data", "DATA", "--set", "size=3"], "--set sets size, which is 3"),
        (["eval", "knn", "RUN", "--data", "DATA", "--set", "model=resnet18"], "of another network"),
        (["eval", "mlp", "RUN", "--data", "DATA", "--lr", "inf"], "lr of fgfast eval mlp is inf: give a finite"),
        (["compare", "--out", "OUT", "--data", "DATA", "--methods", "--seeds", "0"], "--methods is empty"),
        (["discover", "/no/run", "--data", "DATA", "--out", "OUT"], "/no/run"),
        (["discover", "RUN", "--data", "DATA", "--out", "DATA"], "holds other files, such as "),
        (["discover", "RUN", "--data", "DATA", "--out", "OUT", "--n-parts", "300"], "--n-parts is 300"),
        (["discover", "RUN", "--data", "DATA", "--out", "OUT", "--image-size", "-3"], "--image-size is -3"),
        (["discover", "RUN", "--data", "DATA", "--out", "OUT", "--n-parts", "5", "--map-size", "2"], "2 x 2 pixels"),
        (
            ["discover", "RUN", "--data", "DATA", "--out", "OUT", "--metric", "cosine", "--position", "1"],
            "--position cannot be combined with --metric cosine",
        ),
        (["generate", "OUT", "--classes", "1"], "classes"),
        (["compare", "--out", "OUT", "--data", "DATA", "--methods", "nosuch"], "no method 'nosuch'"),
        (["compare", "--out", "OUT", "--data", "DATA", "--methods", "simclr:lr"], "name:setting=value"),
        (["compare", "--out", "OUT", "--data", "DATA", "--methods", "simclr", "--set", "nosuch=1"], "nosuch"),
        (["report", "/no/run"], "/no/run"),
        (["demo", "--minutes", "0"], "--minutes"),
        (["demo", "--minutes", "nan"], "--minutes"),
        (["pretrain", "simclr", "--data", "DATA", "--out", "OUT", "--lr", "inf"], "--lr is inf"),
        (["pretrain", "simclr", "--data", "DATA", "--out", "OUT", "--passes", "3"], "--passes 3"),
        (["pretrain", "particle", "--data", "DATA", "--out", "OUT", "--maps", "m", "--parts", "grid"], "--maps"),
        (
            [
                "pretrain",
                "particle",
                "--data",
                "DATA",
                "--out",
                "OUT",
                "--parts",
                "online",
                "--map-size",
                "8",
                "--n-parts",
                "5",
            ],
            "more than the 2 x 2 pixels",
        ),
        (
            ["pretrain", "particle", "--data", "DATA", "--out", "OUT", "--parts", "truth", "--unlabelled", "EXTRA"],
            "no masks of images without a label",
        ),
    ],
)
def test_user_errors_are_one_sentence_with_exit_status_2(
    argv: list[str], message: str, drawn: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line on standard error that names the cause, no traceback, and nothing written."""
    extra = tmp_path / "extra"
    extra.mkdir()
    Image.new("RGB", (64, 64)).save(extra / "a.png")
    names = {"DATA": str(drawn), "EXTRA": str(extra), "RUN": str(run), "OUT": str(tmp_path / "out")}
    capsys.readouterr()  # drop the output of the run
    assert main([names.get(argument, argument) for argument in argv]) == 2
    assert not (tmp_path / "out").exists()
    error = capsys.readouterr().err.strip()
    assert message in error
    assert "Traceback" not in error
    assert len(error.splitlines()) == 1


def test_resuming_a_run_of_another_method_is_refused(
    run: Path, drawn: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The checkpoint stays as it was."""
    before = (run / "last.pt").read_bytes()
    file = run.parent / "options.toml"
    file.write_text("threads = 1")
    for argv, message in (
        (["--resume"], "is a run of particle, not of simclr"),
        (["--resume", "--data", str(drawn), *COMMON], "is a run of particle, not of simclr"),
        (["--resume", "--config", str(file), "--data", str(drawn), *COMMON], "of the method 'particle', not 'simclr'"),
    ):
        assert main(["pretrain", "simclr", "--out", str(run), *argv]) == 2
        assert message in capsys.readouterr().err
    assert (run / "last.pt").read_bytes() == before


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "last.pt"), 2, "last.pt"),
        (
            NotADirectoryError(errno.ENOTDIR, "Not a directory", "file/run"),
            2,
            "file/run cannot be used",
        ),
        (OSError(errno.EIO, "Input/output error", "set/1.jpg"), 2, "set/1.jpg cannot be used: Input/output error"),
        (ModuleNotFoundError("No module named 'tyro'", name="tyro"), 2, "tyro is not installed: pip install"),
        (ModuleNotFoundError("No module named 'fgfast.x'", name="fgfast.x"), 1, "bug in fgfast"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (ZeroDivisionError("internal"), 1, "bug in fgfast"),
    ],
)
def test_exit_status_by_cause(
    error: BaseException, status: int, text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """2 for a full disk, a broken file or a missing package, 130 for an interrupt, 1 with a traceback for a bug."""

    def fail(_argv: list[str]) -> None:
        raise error

    monkeypatch.setitem(COMMANDS, "info", fail)
    assert main(["info"]) == status
    stderr = capsys.readouterr().err
    assert text in stderr
    assert ("Traceback" in stderr) == (status == 1)


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    """--debug adds the traceback to the message of a user error."""
    assert main(["--debug", "nosuch"]) == 2
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("workers", ["1", "2"])
def test_sigterm_leaves_no_partial_files(tmp_path: Path, workers: str) -> None:
    """A terminated ``generate`` removes its partial data set."""
    argv = ["generate", str(tmp_path / "set"), "--images", "20000", "--workers", workers]
    process = subprocess.Popen([sys.executable, "-m", "fgfast", *argv], stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 60
        while not any(tmp_path.rglob("*.jpg")) and time.monotonic() < deadline:
            time.sleep(0.1)  # only the files show its progress
        assert any(tmp_path.rglob("*.jpg"))
        process.terminate()
        _, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (process.returncode, "interrupted" in stderr) == (130, True)
    assert not list(tmp_path.iterdir())


def test_a_closed_pipe_is_no_error() -> None:
    """`fgfast --help | true` prints nothing on standard error and exits with 0."""
    code = "import sys; from fgfast.cli import main; sys.stdin.read(); sys.exit(main(['pretrain', 'simclr', '-h']))"
    with subprocess.Popen(
        [sys.executable, "-u", "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.close()
        process.stdout = None
        _, stderr = process.communicate(b"")
    assert (process.returncode, stderr) == (0, b"")


@pytest.mark.parametrize(
    "error",
    [
        "╭─ Value error ─╮\n│ no number     │\n│ ───────────── │\n│ more          │\n╰───────────────╯\n",
        " Value error \n ----------- \n  no number  \n  -----------\n  more  \n",
        "no number",
    ],
)
def test_the_message_of_the_parser_is_cut_to_its_first_sentence(error: str) -> None:
    """The text before the rule is kept, with and without box characters."""
    assert parse._first_sentence(error) == "no number"


def test_the_module_runs_as_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "fgfast", "nosuch"], capture_output=True, text=True, check=False)
    assert (done.returncode, "no command 'nosuch'" in done.stderr) == (2, True)


def test_resuming_without_a_checkpoint_is_announced(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pretrain", "simclr", "--data", "/no/such", "--out", "/no/run", "--resume"]) == 2
    assert "/no/run has no checkpoint to resume from" in capsys.readouterr().err
