"""Guarantees about installing and importing fgfast."""

import ast
import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

import fgfast

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
OPTIONAL = (
    "triton", "timm", "nvidia.dali", "sklearn", "matplotlib", "PIL", "torchvision", "rich", "tyro", "jinja2",
    "safetensors", "tensorboard",
)  # fmt: skip
SOURCES = sorted(
    path
    for folder in ("fgfast", "kernels", "benchmarks", "tests")
    for path in (ROOT / folder).rglob("*.py")
    if "__pycache__" not in path.parts
)


def python(code: str, cwd: Path, *options: str, **environment: str) -> str:
    """What ``code`` prints in a fresh interpreter in ``cwd`` that knows the repository only by its installation."""
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "FGFAST_BACKEND")}
    done = subprocess.run(
        [sys.executable, *options, "-c", code],
        cwd=cwd,
        env={**clean, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_loads_no_optional_package(tmp_path: Path) -> None:
    code = "import sys, torch; before = set(sys.modules); import fgfast; print(*sorted(set(sys.modules) - before))"
    added = python(code, tmp_path).split()
    assert "fgfast" in added
    loaded = [name for name in added if any(name == package or name.startswith(f"{package}.") for package in OPTIONAL)]
    assert loaded == []


def test_no_call_loads_the_compiler(tmp_path: Path) -> None:
    """torch._dynamo and sympy take a second: only what is traced may import them."""
    code = """
import sys, torch
before = set(sys.modules)
import fgfast
from fgfast import Ids
ids, x, few = torch.arange(3000), torch.randn(2, 4, 8, 8, requires_grad=True), torch.randn(6, 4, requires_grad=True)
labels, many = torch.zeros(2, 8, 8, dtype=torch.int64), torch.randn(3000, 4, requires_grad=True)
for backend in ("torch", "reference"):
    for q in (few, many[: len(many) if backend == "torch" else 8]):
        i = ids[: len(q)]
        one, two = Ids(i, i, i), Ids(i, i, i + 1)
        fgfast.contrastive_loss(q, q + 1, query_ids=one, key_ids=two, backend=backend).backward()
    fgfast.part_pool(x, labels, 3, backend=backend).pooled.sum().backward()
    fgfast.part_pool(x, labels.repeat(1, 2, 2), 3, backend=backend).pooled.sum().backward()
    fgfast.labels_to_grid(labels, 4, 3, backend=backend)
    fgfast.kmeans(x, 3, backend=backend)
    fgfast.kmeans_step(x, torch.randn(2, 3, 4), backend=backend)
    fgfast.assign_and_pool(x, torch.randn(2, 3, 4), backend=backend)[0].sum().backward()
    fgfast.pivotal_mask(torch.rand(1, 2, 16), images=x, backend=backend).images.sum().backward()
    fgfast.mask_images(x, torch.ones(2, 16, dtype=torch.bool), backend=backend).sum().backward()
    fgfast.perturb(few, few, strategy="swap", backend=backend)
print(*sorted({name.split(".")[0] for name in set(sys.modules) - before}))
print("torch._dynamo" in sys.modules)
"""
    added, compiler = python(code, tmp_path).splitlines()
    assert "fgfast" in added.split()
    assert "sympy" not in added.split()
    assert compiler == "False"


@pytest.mark.quick
def test_every_public_name_exists_and_is_documented() -> None:
    assert len(set(fgfast.__all__)) == len(fgfast.__all__)
    for name in fgfast.__all__:
        value = getattr(fgfast, name)
        if name == "__version__":
            continue
        text = value.__doc__ or ""
        assert text.strip(), f"{name} has no docstring"
        assert not text.startswith(f"{name}("), (
            f"{name} has only the docstring that Python makes for a tuple or dataclass"
        )


@pytest.mark.quick
def test_the_version_is_that_of_the_installation() -> None:
    from importlib.metadata import version

    assert version("fgfast") == fgfast.__version__


@pytest.mark.quick
def test_the_citation_is_of_this_version() -> None:
    """Whoever cites a version finds its number, and each reference has what the format asks for."""
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert (citation["title"], citation["version"]) == (project["name"], project["version"])
    assert (citation["license"], citation["authors"]) == (project["license"], project["authors"])
    assert citation["cff-version"] == "1.2.0"
    assert len(citation["references"]) == 4
    assert all({"type", "title", "authors"} <= reference.keys() for reference in citation["references"])


def bare_kernels(tree: ast.AST) -> list[int]:
    """Lines that import the kernels under the name "kernels"."""
    lines = []
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module or ""]
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in (
            "import_module",
            "__import__",
            "importorskip",
        ):
            names = [arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
        lines += [node.lineno for name in names if name.split(".")[0] == "kernels"]
    return lines


@pytest.mark.quick
def test_no_source_imports_the_kernels_under_their_bare_name() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}" for path in SOURCES for line in bare_kernels(ast.parse(path.read_text()))
    ]
    assert found == []


@pytest.mark.parametrize(
    "code",
    ["import kernels", "from kernels.contrast import f", "import_module('kernels.contrast')", "import kernels as k"],
)
def test_the_scan_finds_bare_imports(code: str) -> None:
    assert bare_kernels(ast.parse(code)) == [1]


def test_the_scan_lets_proper_imports_pass() -> None:
    assert bare_kernels(ast.parse("from fgfast import kernels\nimport fgfast.kernels\nfrom . import kernels")) == []


def test_no_module_loads_the_kernels_under_their_bare_name() -> None:
    # From the repository root, where the bare name would be found.
    code = """
import importlib, pkgutil, sys
import fgfast
for module in pkgutil.walk_packages(fgfast.__path__, "fgfast."):
    if module.name.endswith("__main__"):
        continue
    try:
        importlib.import_module(module.name)
    except ModuleNotFoundError as error:  # an optional package that has no wheel for this machine
        assert error.name.split(".")[0] not in ("fgfast", "kernels"), error
import fgfast.kernels
print(*[name for name in sys.modules if name.split(".")[0] == "kernels"])
"""
    assert python(code, ROOT).split() == []


def test_the_editable_installation_maps_the_kernels(tmp_path: Path) -> None:
    code = "import fgfast, fgfast.kernels.contrast as c; print(fgfast.kernels.__file__); print(c.__file__)"
    files = [Path(file) for file in python(code, tmp_path).split()]
    assert files == [ROOT / "kernels" / "__init__.py", ROOT / "kernels" / "contrast" / "__init__.py"]


# What .ci/wheel is given: CUDA is left out, as the files of a wheel do not depend on it.
KINDS = {
    "native": {},
    "pure": {"FGFAST_NATIVE": "0"},
    "without a compiler": {"CC": "false", "CXX": "false"},
}


def build(kind: str, out: Path) -> Path:
    """The wheel that .ci/wheel puts into a folder, beside the source distribution that it is made from."""
    environment = os.environ | {"FGFAST_CUDA": "0"} | KINDS[kind]
    command = [str(ROOT / ".ci" / "wheel"), str(out)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    said, path = done.stdout.splitlines()
    wheel = Path(path)
    assert sorted(out.iterdir()) == sorted([wheel, out / f"fgfast-{fgfast.__version__}.tar.gz"])
    assert said.endswith(wheel.stem.removeprefix(f"fgfast-{fgfast.__version__}-"))
    return wheel


@pytest.fixture(scope="module", params=["native", "pure"])
def wheel(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if request.param == "native" and shutil.which("g++") is None:
        pytest.skip("needs a C++ compiler")
    return build(request.param, tmp_path_factory.mktemp("wheel"))


def is_pure(wheel: Path) -> bool:
    return wheel.name.endswith("-py3-none-any.whl")


def test_the_wheel_holds_every_module_and_data_file(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as file:
        held = {name for name in file.namelist() if ".dist-info/" not in name and not name.endswith("/")}
        (tags,) = (file.read(name).decode() for name in file.namelist() if name.endswith(".dist-info/WHEEL"))
    wanted = {"fgfast/py.typed", "fgfast/report/report.html.j2", "fgfast/examples/pretrain.sbatch"}
    wanted |= {"fgfast/examples/parts.ipynb"}
    modules = {path.relative_to(ROOT).as_posix() for path in SOURCES} - {"fgfast/docs/__main__.py"}
    wanted |= {name for name in modules if name.startswith("fgfast/")}
    wanted |= {f"fgfast/{name}" for name in modules if name.startswith("kernels/")}
    compiled = {name for name in held if name.endswith(".so")}
    assert held - compiled == wanted
    assert len(compiled) == (0 if is_pure(wheel) else 1)
    assert f"Root-Is-Purelib: {str(is_pure(wheel)).lower()}\n" in tags
    assert ("manylinux" in wheel.name) == (platform.libc_ver()[0] == "glibc" and not is_pure(wheel))


def test_the_installed_wheel_works_elsewhere(wheel: Path, tmp_path: Path) -> None:
    installed, elsewhere = tmp_path / "installed", tmp_path / "elsewhere"
    elsewhere.mkdir()
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(installed), str(wheel)]
    assert subprocess.run(command, check=False).returncode == 0
    code = """
import json, torch, fgfast, fgfast.kernels.contrast, fgfast.info
attention = torch.tensor([[[0.1, 0.4, 0.3, 0.2]]])
assert fgfast.pivotal_mask(attention, keep=0.5).index.tolist() == [[1, 2]]
backends = fgfast.info.info()["backends"]
print(json.dumps([fgfast.__file__, fgfast.kernels.contrast.__file__, backends["native"], backends["torch"]]))
"""
    # -S: without site, through which the editable installation would stand in for what the wheel lacks.
    path = os.pathsep.join([str(installed), sysconfig.get_path("purelib")])
    *files, native, torch = json.loads(python(code, elsewhere, "-S", PYTHONPATH=path))
    expected = [installed / "fgfast" / "__init__.py", installed / "fgfast" / "kernels" / "contrast" / "__init__.py"]
    assert [Path(file) for file in files] == expected
    assert torch == "ready"
    assert native.startswith("ready") != is_pure(wheel)


def test_without_a_compiler_the_wheel_serves_every_platform(tmp_path: Path) -> None:
    assert is_pure(build("without a compiler", tmp_path))
