"""The examples in fgfast/examples: each runs, and what it shows is so."""

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import fgfast

ROOT = Path(__file__).parents[1]
FOLDER = Path(fgfast.__file__).parent / "examples"
NAMES = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "__init__")
NOTEBOOK = FOLDER / "parts.ipynb"


def run(name: str, *given: Any) -> Any:
    return importlib.import_module(f"fgfast.examples.{name}").main(*given)


@pytest.mark.parametrize("name", NAMES)
def test_an_example_is_a_short_program_that_the_readme_names(name: str) -> None:
    code = (FOLDER / f"{name}.py").read_text()
    assert code.endswith('\n\nif __name__ == "__main__":\n    main()\n')
    assert f"-m fgfast.examples.{name}" in code.split('"""')[1]
    assert len(code.splitlines()) <= 70
    assert all(f"`{name}`" in (folder / "README.md").read_text() for folder in (ROOT, FOLDER))


@pytest.mark.parametrize(
    "name", ["ntxent_lightly", "detcon", "vit_parts", pytest.param("lightning_simclr", marks=pytest.mark.slow)]
)
def test_the_loss_falls(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """By a fifth or more; it would stay as it is without a gradient."""
    result = run(name, *([[]] if name == "vit_parts" else []))
    assert result["after"] < 0.8 * result["before"]
    printed = capsys.readouterr().out
    assert f"{result['before']:.3f}" in printed
    assert f"{result['after']:.3f}" in printed
    if name == "ntxent_lightly":
        assert result["before"] == pytest.approx(result["lightly"], rel=1e-5)
        assert result["difference"] < 1e-5


def test_mined_pairs_have_the_value_of_the_peer_and_train() -> None:
    result = run("supcon_miner")
    assert result["ours"] == pytest.approx(result["theirs"], rel=1e-5)
    assert 0 < result["mined"] < 128 * 127  # the miner has left pairs out
    assert result["before"] < 0.5 < 0.9 < result["after"]


def test_chunks_have_the_gradients_of_the_batch() -> None:
    result = run("gradient_caching", 64, 24)  # the last chunk is smaller
    assert result["cached"] == pytest.approx(result["whole"], rel=1e-5)
    assert result["difference"] < 1e-4
    assert result["chunk_mib"] < 0.6 * result["batch_mib"]


def test_parts_of_a_folder_are_drawn(tmp_path: Path) -> None:
    for i in range(2):
        pixels = np.random.default_rng(i).integers(0, 255, (40, 60, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((300, 200)).save(tmp_path / f"{i}.jpg")
    out = tmp_path / "out" / "parts.png"
    out.parent.mkdir()
    parts = run("timm_parts", [str(tmp_path), "--model", "test_vit", "--parts", "3", "--out", str(out)])
    assert parts.shape == (2, 56, 56)
    assert [len(ids.unique()) for ids in parts] == [3, 3]
    picture = np.asarray(Image.open(out))
    assert picture.shape == (320, 320, 3)  # two images of 160 pixels over their parts
    assert (picture[:160] != picture[160:]).any(axis=2).mean() > 0.9


@pytest.mark.slow
def test_ranks_have_the_gradient_of_the_joined_batch() -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*command, "-m", "fgfast.examples.ring"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = re.fullmatch(r"2 ranks, .* loss ([\d.]+), joined batch ([\d.]+)\ngradients differ by (\S+)\n", done.stdout)
    assert found, done.stdout
    assert float(found[1]) == pytest.approx(float(found[2]), rel=1e-5)
    assert float(found[3]) < 1e-5


@pytest.mark.slow
def test_finetuning_is_in_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    scores = run("finetune", ["--out", str(tmp_path / "run"), "--epochs", "2"])
    assert min(scores["linear"], scores["finetune"]) > 0.5  # of four classes
    rows = json.loads((tmp_path / "run" / "eval.json").read_text())
    assert {row["protocol"]: row["top1"] for row in rows} == scores
    report = (tmp_path / "run" / "report.html").read_text()
    assert all(f"{100 * score:.1f}" in report for score in scores.values())


def test_the_notebook_has_no_stored_output() -> None:
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    assert [cell.get("outputs", []) for cell in cells if cell["cell_type"] == "code"] == [[]] * 4
    assert NOTEBOOK.stat().st_size < 8000


@pytest.mark.sweep
def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    for name in ("JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "IPYTHONDIR", "TMPDIR"):
        monkeypatch.setenv(name, str(tmp_path))  # nothing is written to the user's
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output["data"] for cell in notebook.cells for output in cell.get("outputs", []) if "data" in output]
    picture, shape = outputs
    assert "image/png" in picture
    assert shape["text/plain"] == "torch.Size([8, 6, 512])"
