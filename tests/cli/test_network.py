"""Commands on a network without a run: features, parts, pictures and scores of weights, also of unlabelled images."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fgfast.cli import main
from fgfast.config import TrainConfig
from fgfast.data.layouts import open_images
from fgfast.evaluate.features import extract
from fgfast.methods.run_folder import load_network, size_of_weights
from fgfast.methods.simclr import SimCLRConfig
from fgfast.report import draw
from fgfast.train.loop import pretrain
from tests.conftest import TINY

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def run(drawn: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run before its first step."""
    out = tmp_path_factory.mktemp("network") / "run"
    config = SimCLRConfig(
        data=str(drawn), out=str(out), model=TINY, size=32, batch_size=6, device="cpu", threads=1, hidden=16,
        projection=8,
    )  # fmt: skip
    return pretrain("simclr", config, train=False)


@pytest.fixture(scope="module")
def network(run: Path) -> list[str]:
    """The weights of the run as those of a network without one."""
    return ["--model", TINY, "--init", str(run / "init.pt"), "--size", "32", "--device", "cpu"]


@pytest.fixture(scope="module")
def photos(drawn: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of nothing but images, one of which is broken."""
    folder = tmp_path_factory.mktemp("photos")
    for file in open_images(drawn).files()[:21]:
        shutil.copy(str(file), folder)
    (folder / "000.jpg").write_bytes(b"no image")
    return folder


def read(file: Path) -> dict[str, Any]:
    """The columns of a file of features, as every reader sees them."""
    if file.suffix == ".npz":
        return dict(np.load(file))
    if file.suffix == ".parquet":
        from pyarrow import parquet

        table = parquet.read_table(file).to_pydict()
        return {name: np.array([("" if name == "class" else -1) if v is None else v for v in column])
                for name, column in table.items()}  # fmt: skip
    head, *rows = (line.split(",") for line in file.read_text().splitlines())
    assert head[:5] == ["path", "split", "target", "class", "feature_0"]
    columns: dict[str, Any] = {name: np.array([row[i] for row in rows]) for i, name in enumerate(head[:4])}
    columns["target"] = np.array([int(value or -1) for value in columns["target"]])
    return columns | {"features": np.array([row[4:] for row in rows], np.float32)}


@pytest.mark.parametrize("ending", [".npz", ".parquet", ".csv"])
def test_features_are_those_of_an_evaluation(drawn: Path, network: list[str], tmp_path: Path, ending: str) -> None:
    """Bit for bit, with paths that lead to the images."""
    out = tmp_path / f"features{ending}"
    assert main(["embed", str(drawn), *network, "--out", str(out)]) == 0
    images, columns = open_images(drawn), read(out)
    encoder, _ = load_network(TrainConfig(model=TINY, init=network[3], size=32), CPU)
    expected, targets = extract(encoder, images, 32, threads=2)
    np.testing.assert_array_equal(columns["features"].astype(np.float32), expected.numpy())
    np.testing.assert_array_equal(columns["target"], targets)
    assert columns["class"].tolist() == [images.classes[i] for i in targets]
    assert columns["split"].tolist() == ["train" if train else "test" for train in images.train]
    assert [(drawn / path).resolve() for path in columns["path"]] == [Path(str(file)) for file in images.files()]


def test_features_of_unlabelled_images(photos: Path, network: list[str], tmp_path: Path) -> None:
    """A folder without classes has none in the file, and what cannot be read has no row."""
    out = tmp_path / "features.npz"
    assert main(["embed", str(photos), *network, "--out", str(out)]) == 0
    columns = read(out)
    assert columns["path"].tolist() == sorted(file.name for file in photos.iterdir())[1:]
    assert set(columns["target"]) == {-1}
    assert set(columns["class"]) == {""}


def test_a_split_of_a_run_has_its_features_only(drawn: Path, run: Path, network: list[str], tmp_path: Path) -> None:
    """The run and its weights without it give the same; --force replaces the file."""
    out = tmp_path / "features.npz"
    assert main(["embed", str(drawn), *network, "--out", str(out)]) == 0
    everything = read(out)
    words = ["embed", str(drawn), "--run", str(run), "--checkpoint", "init", "--device", "cpu", "--split", "test"]
    assert main([*words, "--out", str(out), "--force"]) == 0
    test, rows = read(out), everything["split"] == "test"
    assert len(test["path"]) == 18
    assert test["path"].tolist() == everything["path"][rows].tolist()
    torch.testing.assert_close(torch.tensor(test["features"]), torch.tensor(everything["features"][rows]))


def test_discovery_gives_the_maps_of_the_run(drawn: Path, run: Path, network: list[str], tmp_path: Path) -> None:
    options = ["--data", str(drawn), "--n-parts", "4", "--map-size", "16", "--device", "cpu"]
    options += ["--levels", "4", "--border", "0", "--position", "0.3", "--first-parts", "0"]
    assert main(["discover", str(run), "--checkpoint", "init", *options, "--out", str(tmp_path / "run")]) == 0
    assert main(["discover", *network, *options, "--out", str(tmp_path / "network")]) == 0
    files = [{str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*.png")}
             for folder in (tmp_path / "run", tmp_path / "network")]  # fmt: skip
    assert len(files[0]) == 36
    assert files[0] == files[1]


@pytest.mark.slow
def test_scores_are_those_of_the_run_and_each_network_keeps_its_own(
    drawn: Path, run: Path, network: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They are printed, and stored only where a folder is given."""
    words = ["--data", str(drawn), "--json"]
    assert main(["eval", "knn", str(run), "--checkpoint", "init", *words, "--device", "cpu"]) == 0
    expected = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert main(["eval", "knn", *network, *words]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == expected
    out = tmp_path / "scores"
    for size in ("32", "32", "64"):
        assert main(["eval", "knn", *network, "--size", size, *words, "--out", str(out)]) == 0
    assert [path.name for path in out.iterdir()] == ["eval.json"]
    rows = json.loads((out / "eval.json").read_text())
    assert [row["network"].split(", ")[-1] for row in rows] == ["size 32", "size 64"]
    assert rows[0]["top1"] == expected["top1"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("protocol", "flags"),
    [
        ("linear", []), ("parts", []), ("retrieval", []), ("mlp", ["--epochs", "2"]),
        ("finetune", ["--epochs", "1"]), ("linear", ["--recipe", "lcr", "--epochs", "1"]),
        ("segmentation", ["--epochs", "2", "--every", "1", "--n-labelled", "4", "--folds", "2"]),
    ],
)  # fmt: skip
def test_every_protocol_scores_a_network(
    drawn: Path, network: list[str], protocol: str, flags: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "scores"
    assert main(["eval", protocol, *network, "--data", str(drawn), "--out", str(out), *flags]) == 0
    assert [path.name for path in out.iterdir()] == ["eval.json"]


def test_pictures_of_a_folder_of_photographs(
    photos: Path, network: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parts, components and neighbours, each of eight images or for six, with the names of the files."""
    found: dict[str, Any] = {}
    monkeypatch.setattr(draw, "write_grid", lambda rows, path, description: found.update({path: rows}) or path)
    out = tmp_path / "pictures"
    options = ["--ids", "set", "--n-parts", "3", "--levels", "2", "--position", "0.3"]
    assert main(["pictures", *network, "--data", str(photos), "--out", str(out), *options]) == 0
    assert [path.name for path in found] == ["parts.png", "pca.png", "neighbours.png"]
    names = {file.stem for file in photos.iterdir()} - {"000"}
    for name, n_images in (("parts", 8), ("pca", 8), ("neighbours", 36)):
        panels = [panel for row in found[out / f"{name}.png"] for panel in row]
        shown = [panel.caption for panel in panels if panel.caption not in ("parts", "components")]
        assert len(shown) >= n_images - 1  # one may be the broken one
        assert set(shown) <= names


@pytest.mark.slow
def test_pictures_of_a_run_can_have_discovered_parts(drawn: Path, run: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(run, tmp_path / "run")
    words = ["pictures", str(copied), "--data", str(drawn), "--checkpoint", "init", "--device", "cpu"]
    assert main([*words, "--n-parts", "3"]) == 0
    names = {path.name for path in (copied / "pictures").glob("*.png")}
    assert names >= {f"{name}-init.png" for name in ("views", "discovered-parts", "pca", "neighbours")}


def test_one_photograph_has_no_neighbours(photos: Path, network: list[str], tmp_path: Path) -> None:
    data, out = tmp_path / "data", tmp_path / "out"
    data.mkdir()
    shutil.copy(sorted(photos.iterdir())[1], data)
    assert main(["pictures", *network, "--data", str(data), "--out", str(out), "--n-parts", "3"]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["parts.png", "pca.png"]


NET = ["--model", TINY, "--init", "none"]
VIT = ["--model", "test_vit", "--init", "none"]
NO_CLS = "vit_pwee_patch16_reg1_gap_256"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["embed", "DATA", *NET, "--out", "OUT.txt"], "no ending of a known format: give .npz, .parquet, .csv"),
        (["embed", "DATA", *NET, "--out", "OUT"], "no ending of a known format"),
        (["embed", "DATA", *NET, "--out", "KEPT.npz"], "exists: give another --out, or --force"),
        (["embed", "EMPTY", *NET, "--out", "OUT.npz"], "EMPTY holds no images"),
        (["embed", "PHOTOS", *NET, "--out", "OUT.npz", "--split", "test"], "no images in the split test"),
        (["embed", "DATA", "--model", TINY, "--out", "OUT.npz"], f"{TINY} has no weights: give --init timm"),
        (["embed", "DATA", "--init", "none", "--out", "OUT.npz"], "There is no network: name a run, or give --model"),
        (["embed", "DATA", *NET, "--checkpoint", "last", "--out", "OUT.npz"], "--checkpoint is one of a run"),
        (["embed", "DATA", *NET, "--run", "RUN", "--out", "OUT.npz"], "--model is for a network without a run"),
        (["embed", "DATA", *NET, "--size", "3", "--out", "OUT.npz"], "--size is 3: give at least 16"),
        (["embed", "DATA", "--model", "nosuch", "--init", "none", "--out", "OUT.npz"], "no model 'nosuch'"),
        (
            ["embed", "DATA", "--model", "test_vit", "--init", "WEIGHTS", "--out", "OUT.npz"],
            "in no layout that is known for test_vit",
        ),
        (["embed", "DATA", "--model", TINY, "--init", "/no/file", "--out", "OUT.npz"], "/no/file do not exist"),
        (["eval", "knn", "--data", "DATA"], "There is no network"),
        (["eval", "knn", "RUN", "--size", "64", "--data", "DATA"], "--size is for a network without a run"),
        (["eval", "knn", "RUN", "--out", "OUT", "--data", "DATA"], "leave out --out"),
        (["eval", "knn", *NET, "--data", "PHOTOS", "--out", "OUT"], "no test images to score on"),
        (["eval", "knn", *NET, "--data", "DATA", "--set", "size=3"], "--set sets size, which is 3"),
        (["discover", *NET, "--data", "EMPTY", "--out", "OUT"], "EMPTY holds no images"),
        (
            ["discover", *VIT, "--data", "PHOTOS", "--out", "OUT", "--image-size", "33"],
            "--image-size is 33 pixels, which test_vit does not take",
        ),
        (["pictures", *NET, "--data", "PHOTOS"], "need a folder: give --out"),
        (["pictures", *NET, "--data", "PHOTOS", "--out", "PHOTOS"], "holds files, such as"),
        (["pictures", *NET, "--data", "EMPTY", "--out", "OUT"], "EMPTY holds no images"),
        (
            ["pictures", *NET, "--data", "PHOTOS", "--out", "OUT", "--first-parts", "3", "--border", "0"],
            "--first-parts needs --border",
        ),
        (["pictures", *NET, "--data", "PHOTOS", "--out", "OUT", "--n-parts", "1"], "--n-parts is 1"),
        (["pictures", "RUN", "--data", "PHOTOS", "--out", "OUT"], "leave out --out and --force"),
        (
            ["pictures", "--model", NO_CLS, "--init", "none", "--data", "PHOTOS", "--out", "OUT"],
            f"{NO_CLS} has no keys and CLS attention",
        ),
    ],
)
def test_user_errors_are_one_sentence_and_nothing_is_written(
    argv: list[str], message: str, drawn: Path, run: Path, photos: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "KEPT.npz").write_bytes(b"kept")
    names = {"DATA": str(drawn), "RUN": str(run), "WEIGHTS": str(run / "init.pt"), "PHOTOS": str(photos)}
    places = ("EMPTY", "KEPT.npz", "OUT", "OUT.npz", "OUT.txt")
    words = [names.get(word, str(tmp_path / word) if word in places else word) for word in argv]
    before = {path: path.read_bytes() if path.is_file() else b"" for path in tmp_path.rglob("*")}
    capsys.readouterr()
    assert main(words) == 2
    assert before == {path: path.read_bytes() if path.is_file() else b"" for path in tmp_path.rglob("*")}
    error = capsys.readouterr().err.strip()
    assert message in error
    assert len([line for line in error.splitlines() if line.startswith("fgfast: ")]) == 1
    assert "Traceback" not in error


def test_parquet_says_which_package_it_needs(
    drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    assert main(["embed", str(drawn), *NET, "--out", str(tmp_path / "a.parquet")]) == 2
    assert "The package pyarrow is not installed: pip install 'fgfast[datasets]'" in capsys.readouterr().err


def test_the_size_is_that_of_the_weights(run: Path) -> None:
    """Of the run that they come from, else that which timm knows."""
    assert size_of_weights(TINY, str(run)) == 32
    assert size_of_weights(TINY, "none") == 160
