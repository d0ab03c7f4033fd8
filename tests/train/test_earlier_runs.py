"""Files of version 0.1 still load: an interrupted run, incomplete id maps, the state of every method and loss.

Version 0.1 wrote run_0_1.tar.xz: ``stopped`` is a PARTICLE run interrupted in its second round, ``half`` a folder of
maps whose discovery was interrupted, and states.json has the names, dtypes and shapes of the state dicts.
"""

import json
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import fgfast
from fgfast.config import with_values
from fgfast.data.layouts import open_images
from fgfast.data.synthetic import generate
from fgfast.evaluate.protocols import evaluate
from fgfast.methods.base import method_class
from fgfast.methods.run_folder import load_run_encoder, read_run
from fgfast.parts.clustering import ClusteringConfig
from fgfast.parts.discover import DiscoveryConfig, discover
from fgfast.report.html import write_report
from fgfast.train.log import read_metrics
from fgfast.train.loop import pretrain

CPU = torch.device("cpu")
ARCHIVE = Path(__file__).with_name("run_0_1.tar.xz")


def _stored(name: str) -> dict[str, Any]:
    with tarfile.open(ARCHIVE) as archive:
        file = archive.extractfile(name)
        assert file is not None
        content: dict[str, Any] = json.load(file)
    return content


STATES, EXPECTED = _stored("states.json"), _stored("expected.json")


@pytest.fixture(scope="module")
def birds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data set of the run."""
    return Path(generate(tmp_path_factory.mktemp("earlier") / "set", classes=3, images=12, size=48, seed=0, workers=1))


@pytest.fixture
def earlier(tmp_path: Path) -> Path:
    """The stored folders."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path


def test_an_interrupted_run_resumes(earlier: Path, birds: Path) -> None:
    """It ends with the losses that version 0.1 would have had, and keeps the parts that it had discovered."""
    run = earlier / "stopped"
    before = {p: p.read_bytes() for p in run.glob("parts_*/*/*.png")}
    name, config = read_run(run)
    with torch.backends.mkldnn.flags(enabled=False):  # whose backward writes past its memory with AVX2 (torch 2.14.1)
        pretrain(name, replace(config, data=str(birds), out=str(run), resume=True))
    losses = [row["loss"] for row in read_metrics(run / "metrics.jsonl")[0]]
    assert losses == pytest.approx(EXPECTED["losses"], rel=1e-3)  # three steps of float32 on another processor
    assert len(before) == 12
    assert before == {p: p.read_bytes() for p in run.glob("parts_*/*/*.png")}


def test_a_run_is_evaluated_and_reported(earlier: Path, birds: Path) -> None:
    """Its encoder computes the features of version 0.1; scores are added to those already stored."""
    run = earlier / "stopped"
    encoder, _ = load_run_encoder(run, "last", CPU)
    x = torch.linspace(-1, 1, 3 * 32 * 32).view(1, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(encoder(x)[0], torch.tensor(EXPECTED["features"]), rtol=1e-4, atol=1e-5)
    evaluate(run, "knn", birds, checkpoint="init", device=CPU)
    assert [row["checkpoint"] for row in json.loads((run / "eval.json").read_text())] == ["last", "init"]
    assert write_report(run).is_file()


def test_interrupted_discovery_resumes(earlier: Path, birds: Path) -> None:
    """Discovery writes the missing maps and keeps the others."""
    encoder, config = load_run_encoder(earlier / "stopped", "last", CPU)
    maps = earlier / "half"
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in maps.rglob("*.png")}
    images = open_images(birds)
    how = DiscoveryConfig(image_size=32, map_size=16, run="stopped, last", threads=config.threads)
    discover(encoder, images, maps, ClusteringConfig(n_parts=3, levels=2), how)
    after = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in maps.rglob("*.png")}
    assert (len(before), len(after)) == (5, 12)
    assert before.items() <= after.items()
    assert not (maps / "begun.json").exists()


def _blank(shape: Any) -> Any:
    if isinstance(shape, dict):  # get_extra_state
        return {name: _blank(value) if isinstance(value, list) else value for name, value in shape.items()}
    dtype, *sides = shape
    return torch.full(sides, 1, dtype=getattr(torch, dtype))


@pytest.mark.parametrize("name", STATES["methods"])
def test_state_of_a_method_loads(name: str) -> None:
    """Names and shapes of all tensors agree."""
    known = STATES["methods"][name]
    method_type = method_class(name.split()[0])
    method = method_type(with_values(method_type.Config(), known["options"], "test"))
    method.load_state_dict({key: _blank(shape) for key, shape in known["state"].items()})


@pytest.mark.parametrize("name", STATES["losses"])
def test_state_of_a_loss_loads(name: str) -> None:
    """Names and shapes of buffers and parameters agree."""
    made: torch.nn.Module = {
        "NTXentLoss": lambda: fgfast.NTXentLoss(memory_bank_size=(4, 3)),
        "DINOLoss": lambda: fgfast.DINOLoss(5),
        "PartContrastiveLoss": lambda: fgfast.PartContrastiveLoss(3, torch.nn.Linear(2, 2)),
    }[name]()
    made.load_state_dict({key: _blank(shape) for key, shape in STATES["losses"][name].items()})
