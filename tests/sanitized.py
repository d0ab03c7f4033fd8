"""Runs the tests of the compiled code on an extension built with sanitizers: ``make sanitize``."""

import importlib.util
import sys
from pathlib import Path

import pytest


def main(folder: str) -> int:
    """Replace the installed extension by the one below ``folder`` and test it."""
    (file,) = Path(folder).rglob("_native*.so")
    spec = importlib.util.spec_from_file_location("fgfast._native", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    import fgfast

    sys.modules["fgfast._native"] = fgfast._native = module  # type: ignore[attr-defined]
    files = ["tests/ops/test_mask.py", "tests/ops/test_kmeans_native.py"]
    return pytest.main(["-q", "-p", "no:cacheprovider", "-k", "native or large or callers", *files])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
