"""Platforms without wheels of Triton, DALI or the compiled extension: macOS, Linux on aarch64, torch without CUDA."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import TINY

pytestmark = pytest.mark.slow

# Python imports sitecustomize at start-up: in every new process the packages seem not to be installed.
HIDE = """
import importlib.machinery as machinery

hidden = ("triton", "nvidia", "fgfast._native")
find_installed = machinery.PathFinder.find_spec

def find_spec(cls, name, path=None, target=None):
    return None if any(f"{name}.".startswith(f"{h}.") for h in hidden) else find_installed(name, path, target)

machinery.PathFinder.find_spec = classmethod(find_spec)
"""
COMMON = ["--model", TINY, "--model-args", "output_stride=8", "--size", "32", "--batch-size", "6", "--device", "cpu"]
COMMON += ["--threads", "1", "--amp", "off", "--hidden", "16", "--projection", "8", "--epochs", "1", "--knn-every", "0"]


@pytest.fixture
def bare(tmp_path: Path) -> dict[str, str]:
    """Environment variables of a process in which the packages are hidden."""
    (tmp_path / "hide").mkdir()
    (tmp_path / "hide" / "sitecustomize.py").write_text(HIDE)
    unset = ("TRITON_INTERPRET", "FGFAST_BACKEND")
    return {k: v for k, v in os.environ.items() if k not in unset} | {"PYTHONPATH": str(tmp_path / "hide")}


def run(code: str, environment: dict[str, str], *arguments: str) -> str:
    command = [sys.executable, "-W", "ignore", "-c", code, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_operations_run_and_a_missing_backend_is_reported(bare: dict[str, str]) -> None:
    code = """
import json, torch, fgfast, fgfast.kernels
from fgfast.info import info

x = torch.randn(2, 8, 6, 6, requires_grad=True)
parts = fgfast.kmeans(x, 3, seed=0)
pooled, area = fgfast.part_pool(x, parts.labels, 3)
pooled, area, _ = fgfast.assign_and_pool(x, parts.centroids)
loss = fgfast.SupConLoss()(pooled.flatten(0, 1), torch.arange(3).repeat(2))
loss.backward()
assert x.grad.abs().sum() > 0
assert fgfast.pivotal_mask(torch.rand(2, 2, 16), seed=0).mask.sum() == 8
fgfast.perturb(x.detach().flatten(1), x.detach().flatten(1), std=torch.ones(288), seed=0)
errors = {}
for name in ("triton", "native"):
    try:
        with fgfast.use_backend(name):
            pass
    except RuntimeError as error:
        errors[name] = str(error)
print(json.dumps([info()["backends"], errors]))
"""
    backends, errors = json.loads(run(code, bare))
    assert backends["torch"] == backends["reference"] == "ready"
    assert backends["triton"] == "the package triton is not installed"
    assert "fgfast._native is not part of this installation" in backends["native"]
    assert all(backends[name] in errors[name] for name in ("triton", "native"))


def test_a_run_from_images_to_the_report(bare: dict[str, str], drawn: Path, tmp_path: Path) -> None:
    """PARTICLE with parts clustered in the training step, images from torchvision's loader; then a score."""
    code = """
import sys
from fgfast.cli import main

data, out, *common = sys.argv[1:]
assert main(["pretrain", "particle", "--data", data, "--out", out, "--parts", "online", "--n-parts", "4", *common]) == 0
assert main(["eval", "knn", out, "--data", data, "--device", "cpu", "--json"]) == 0
"""
    stdout = run(code, bare, str(drawn), str(tmp_path / "run"), *COMMON)
    assert json.loads(stdout.splitlines()[-1])["protocol"] == "knn"
    assert (tmp_path / "run" / "report.html").is_file()


def test_the_missing_dali_loader_is_reported(bare: dict[str, str], drawn: Path, tmp_path: Path) -> None:
    code = "import sys; from fgfast.cli import main; sys.exit(main(sys.argv[1:]) != 2)"
    argv = ["pretrain", "simclr", "--data", str(drawn), "--out", str(tmp_path / "run"), "--loader", "dali", *COMMON]
    command = [sys.executable, "-W", "ignore", "-c", code, *argv]
    done = subprocess.run(command, env=bare, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "The dali loader needs the package nvidia.dali" in done.stderr
