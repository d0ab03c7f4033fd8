"""A set and its shards serve every command alike, and data-bench says what a trainer waits for."""

import csv
import json
import shutil
from pathlib import Path

import pytest

from fgfast.cli.main import main
from fgfast.data.layouts import open_images
from fgfast.data.maps import read_maps_info
from fgfast.data.synthetic import generate
from tests.conftest import TINY

SMALL = [
    "--model",
    TINY,
    "--size",
    "32",
    "--epochs",
    "1",
    "--knn-every",
    "0",
    "--threads",
    "1",
    "--device",
    "cpu",
    "--amp",
    "off",
]

TINIER = ["--model", TINY, "--size", 32, "--batch-size", 8]


@pytest.fixture
def birds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FGFAST_CACHE", str(tmp_path / "cache"))
    return generate(tmp_path / "birds", classes=2, images=48, size=32)


def run(*words: object) -> int:
    return main([str(word) for word in words])


@pytest.mark.slow
def test_a_run_trains_discovers_and_is_scored_on_shards(
    birds: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    shards, out = tmp_path / "shards", tmp_path / "run"
    assert run("shard", birds, shards) == 0
    shutil.move(birds, tmp_path / "gone")
    assert run("pretrain", "simclr", "--data", shards, "--out", out, "--batch-size", "8", *SMALL) == 0
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert rows
    assert (out / "report.html").is_file()
    assert run("eval", "knn", out, "--data", shards, "--device", "cpu") == 0
    assert run("eval", "parts", out, "--data", shards, "--device", "cpu") == 0  # the ground-truth maps travel inside
    maps = shards / "parts"  # beside the shards
    assert (
        run("discover", out, "--data", shards, "--out", maps, "--n-parts", "3", "--map-size", "8", "--device", "cpu")
        == 0
    )
    assert read_maps_info(maps)["n_parts"] == 3
    images = open_images(shards)
    assert all((maps / f"{rel}.png").is_file() for rel in images.paths)
    second = tmp_path / "second"
    words = ["--data", shards, "--maps", maps, "--out", second, "--batch-size", "8", *SMALL]
    assert run("pretrain", "particle", *words) == 0
    packed = tmp_path / "packed"
    assert run("shard", shards, packed, "--maps", maps) == 0
    words[1], words[5] = packed, tmp_path / "third"
    assert run("pretrain", "particle", *words) == 0
    capsys.readouterr()


@pytest.mark.slow
def test_a_run_goes_on_with_the_shards_of_its_set(birds: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    shards, out = tmp_path / "shards", tmp_path / "run"
    assert run("shard", birds, shards) == 0
    words = ["pretrain", "simclr", "--out", out, "--batch-size", "8", *SMALL]
    assert run(*words, "--data", birds) == 0
    assert run(*words, "--data", shards, "--resume", "--epochs", "2") == 0
    capsys.readouterr()


@pytest.mark.slow
@pytest.mark.parametrize("loader", ["dali", "torchvision"])
def test_data_bench_prints_and_stores_a_table(
    birds: Path, tmp_path: Path, capsys: pytest.CaptureFixture, loader: str
) -> None:
    if loader == "dali":
        pytest.importorskip("nvidia.dali")
    file = tmp_path / "table.csv"
    words = ["--threads", 1, 2, "--seconds", 0.05, *TINIER, "--loader", loader, "--csv", file]
    assert run("data-bench", birds, "--images-per-second", "0.001", *words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "the trainer takes 0 images/s (given)" in lines[1]
    assert lines[2].split() == ["threads", "reading", "decoding", "augmenting", "copying", "all", "trainer"]
    assert [line.split()[0] for line in lines[3:]] == ["1", "2"]
    assert all(line.endswith("  fed") for line in lines[3:])
    with file.open() as stream:
        rows = list(csv.DictReader(stream))
    assert [row["loader"] for row in rows] == [loader] * 2
    assert all(float(row[name]) > 0 for row in rows for name in ("reading", "decoding", "augmenting", "copying", "all"))


@pytest.mark.slow
def test_data_bench_times_a_trainer(birds: Path, capsys: pytest.CaptureFixture) -> None:
    words = ["--threads", 1, "--seconds", 0.05, *TINIER, "--device", "cpu"]
    assert run("data-bench", birds, "--method", "supervised", *words) == 0
    assert f"images/s (supervised, {TINY}, cpu)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--images-per-second", "0"], "--images-per-second is 0"),
        (["--seconds", "nan"], "--seconds is nan"),
        (["--threads", "0"], "--threads is 0"),
        (["--method", "none"], "There is no method 'none'"),
        (["--method", "particle"], "need id maps"),
        (["--size", "3"], "size"),
        (["--model", "nosuch"], "nosuch"),
    ],
)
def test_bad_arguments_of_data_bench_are_one_sentence(
    birds: Path, words: list[str], message: str, capsys: pytest.CaptureFixture
) -> None:
    assert run("data-bench", birds, *words) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("fgfast: ")
    assert error.count("\n") == 1


def test_a_table_that_cannot_be_written_is_said_first(birds: Path, capsys: pytest.CaptureFixture) -> None:
    assert run("data-bench", birds, "--csv", birds / "images.txt" / "table.csv") == 2
    assert "images.txt is a file: give another folder" in capsys.readouterr().err
    assert run("data-bench", birds, "--csv", birds) == 2
    assert "is a folder: give the file of the table" in capsys.readouterr().err


def test_a_trainer_waits_for_the_slowest_stage() -> None:
    from fgfast.data.bench import Speeds

    speeds = Speeds(1, reading=900.0, decoding=400.0, augmenting=300.0, copying=9000.0, all=150.0)
    assert speeds.verdict(151) == "starved by augmenting"
    assert speeds.verdict(150) == "fed"
