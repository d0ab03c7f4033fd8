"""Sets with hardly any images, and failures after the work is done."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fgfast.cli import main
from fgfast.cli.finished import finished
from fgfast.errors import UserError
from fgfast.evaluate.finetune import FinetuneOptions
from fgfast.evaluate.mlp import MLPOptions
from fgfast.evaluate.options import Options, Protocol
from fgfast.evaluate.protocols import check_protocol, online_knn
from fgfast.methods.simclr import SimCLRConfig
from fgfast.models.backbone import Backbone
from fgfast.report import draw, html
from fgfast.train import loop
from tests.conftest import TINY

pytestmark = pytest.mark.slow

COMMON = ["--model", TINY, "--size", "32", "--batch-size", "8", "--device", "cpu", "--threads", "1", "--amp", "off"]
COMMON += ["--hidden", "16", "--projection", "8", "--epochs", "1"]
ENCODER = Backbone(TINY, size=32)


def write(root: Path, files: Sequence[str]) -> Path:
    rng = np.random.default_rng(0)
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(root / file)
    return root


def pretrain(data: Path, out: Path) -> int:
    return main(["pretrain", "simclr", "--data", str(data), "--out", str(out), *COMMON])


def test_a_set_of_one_image_trains_and_has_a_report(tmp_path: Path) -> None:
    """What cannot be drawn of it is left out, and the report says so, also when it is written again."""
    data, run = write(tmp_path / "data", ["1.png"]), tmp_path / "run"
    assert pretrain(data, run) == 0
    assert {path.name.replace("-init", "") for path in (run / "pictures").glob("*.png")} == {"views.png", "pca.png"}
    for _ in range(2):
        assert "nearest neighbours are left out" in (run / "report.html").read_text()
        assert main(["report", str(run)]) == 0


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    files = [f"{split}/{name}/{i}.png" for split in ("train", "test") for name in ("a", "b") for i in range(2)]
    return write(tmp_path_factory.mktemp("small") / "data", files)


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("small") / "run"
    assert pretrain(data, out) == 0
    return out


@pytest.mark.parametrize(("module", "name"), [(draw, "draw_run"), (html, "write_report")])
def test_a_failure_after_training_leaves_a_finished_run(
    module: object, name: str, run: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def fail(*_: object, **__: object) -> None:
        raise ValueError("there is nothing to draw.")

    monkeypatch.setattr(loop, "pretrain", lambda *_: run)
    monkeypatch.setattr(module, name, fail)
    capsys.readouterr()
    assert pretrain(data, tmp_path / "run") == 0
    output = capsys.readouterr()
    assert output.err.splitlines()[-1].startswith(f"fgfast: {run} is complete without its ")
    assert "(there is nothing to draw)" in output.err
    assert (str(run / "report.html") in output.out) == (name == "draw_run")


def test_a_score_is_printed_and_kept_if_the_report_fails(
    run: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(html, "write_report", fail)
    assert main(["eval", "knn", str(run), "--data", str(data), "--device", "cpu", "--json"]) == 0
    output = capsys.readouterr()
    assert json.loads(output.out)["n"] == 4
    assert "is complete without a new report" in output.err
    assert [row["protocol"] for row in json.loads((run / "eval.json").read_text())] == ["knn"]


@pytest.mark.parametrize(("error", "shown"), [(KeyError("slug"), 1), (UserError("none."), 0), (OSError("full"), 0)])
def test_a_bug_after_the_work_shows_its_traceback(
    error: Exception, shown: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with finished(tmp_path, "its report"):
        raise error
    printed = capsys.readouterr().err
    assert printed.count("Traceback") == shown
    assert printed.splitlines()[-1].startswith(f"fgfast: {tmp_path} is complete without its report (")


TRAIN = ("train/a/1.png", "train/b/1.png", "train/b/2.png")


@pytest.mark.parametrize(
    ("protocol", "options", "files", "message"),
    [
        ("knn", None, ("1.png", "2.png"), "has no test images"),
        ("knn", None, ("a/1.png", "b/1.png"), "has no test images"),
        ("knn", None, ("train/a/1.png", "test/a/1.png"), "training images of 1 class"),
        ("retrieval", None, (*TRAIN, "test/a/1.png"), "has one test image"),
        ("retrieval", None, (*TRAIN, "test/a/1.png", "test/b/1.png"), "No class .* two test images"),
        ("parts", None, (*TRAIN, "test/a/1.png"), "has no part masks"),
        ("finetune", FinetuneOptions(stages="99"), (*TRAIN, "test/a/1.png"), "--stages is 99: test_resnet has 4"),
    ],
)
def test_a_protocol_that_cannot_score_is_refused_before_any_work(
    protocol: Protocol, options: Options | None, files: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        check_protocol(protocol, ENCODER, SimCLRConfig(size=32), write(tmp_path, files), options)


@pytest.mark.parametrize("options", [MLPOptions(), FinetuneOptions()])
def test_a_class_that_loses_all_its_training_images_is_found_before_any_work(options: Options, data: Path) -> None:
    protocol: Protocol = "mlp" if isinstance(options, MLPOptions) else "finetune"
    with pytest.raises(UserError, match="training image"):
        check_protocol(protocol, ENCODER, SimCLRConfig(size=32, holdout=0.9), data, options)


def test_a_test_split_that_cannot_be_read_does_not_end_the_training(tmp_path: Path) -> None:
    write(tmp_path, TRAIN)
    (tmp_path / "test/a").mkdir(parents=True)
    (tmp_path / "test/a/1.png").write_bytes(b"no image")
    config = SimCLRConfig(data=str(tmp_path), size=32, threads=1)
    assert online_knn(ENCODER, config, torch.device("cpu")) is None


@pytest.mark.parametrize(
    "argv",
    [
        ["pretrain", "simclr", "--data", "DATA", "--out", "FILE/run"],
        ["discover", "RUN", "--data", "DATA", "--out", "FILE/maps"],
        ["upscale", "RUN", "image.png", "--out", "FILE/out"],
        ["compare", "--data", "DATA", "--methods", "simclr", "--out", "FILE/cmp"],
    ],
)
def test_an_output_below_a_file_is_refused_in_one_sentence(
    argv: list[str], run: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    names = {"DATA": str(data), "RUN": str(run)}
    words = [names.get(word, word).replace("FILE", str(tmp_path / "file")) for word in argv]
    capsys.readouterr()
    assert main(words) == 2
    assert capsys.readouterr().err == f"fgfast: {tmp_path / 'file'} is a file: give another folder.\n"
