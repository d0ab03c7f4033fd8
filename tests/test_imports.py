"""Imports go one way: from the command line down to the definitions, with no circle."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]

# From the top down: a place may import what stands on its own line or below it.
ORDER = (
    ("examples",),
    ("cli", "docs"),
    ("compare", "demo", "export", "upscale"),
    ("report",),
    ("train",),
    ("evaluate",),
    ("methods",),
    ("parts",),
    ("claim", "run"),
    ("ranks",),
    ("models",),
    ("data",),
    ("losses", "estimator"),
    ("ops",),
    ("kernels",),
    ("pixels",),
    ("reference",),
    ("config_text",),
    ("config",),
    ("formats",),
    ("info",),
    ("backend",),
    ("ids", "tensors", "files", "checksum"),
    ("errors", "interrupt"),
)
GROUND = {"ids", "tensors", "errors"}  # all that a definition may import
# The faces: they import what they show, or keep names that have moved, and nothing but the examples imports them.
FACES = {"fgfast", "fgfast.__main__", "fgfast.testing", "fgfast.train.config", "fgfast.train.splits"}


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    found = {}
    for folder, package in ((ROOT / "fgfast", "fgfast"), (ROOT / "kernels", "fgfast.kernels")):
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join((package, *parts)).removesuffix(".__init__")] = path
    return found


MODULES = modules()


def imported(name: str) -> Iterator[str]:
    """The modules of the package that a module imports, anywhere in it."""
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom) and node.module in MODULES:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in MODULES else node.module


def floor(name: str) -> int:
    """The line of ORDER on which a module stands."""
    place = name.split(".")[1]
    return next(i for i, places in enumerate(ORDER) if place in places)


GRAPH = {name: set(imported(name)) - {name} for name in MODULES}


def test_every_module_has_a_floor() -> None:
    """What is new is given a place, and every place is one of the package."""
    places = {name.split(".")[1] for name in MODULES if "." in name} - {"__main__", "deprecated", "testing"}
    assert places == {place for places in ORDER for place in places}


def test_imports_go_down() -> None:
    """No module imports one that stands above it; only the examples, as users do, import a face."""
    wrong = [
        f"{name} imports {other}"
        for name, others in GRAPH.items()
        if name not in FACES and name != "fgfast.deprecated" and not name.startswith("fgfast.examples.")
        for other in others - {"fgfast.deprecated"}
        if other in FACES or floor(other) < floor(name)
    ]
    assert not wrong


def test_no_circle() -> None:
    """No module is reached from what it imports."""
    done: set[str] = set()
    stack: list[str] = []

    def visit(name: str) -> None:
        assert name not in stack, " -> ".join([*stack[stack.index(name) :], name])
        if name not in done:
            stack.append(name)
            for other in GRAPH[name]:
                visit(other)
            stack.pop()
            done.add(name)

    for name in GRAPH:
        visit(name)


def test_the_definitions_depend_on_nothing_that_they_judge() -> None:
    """reference/ imports only itself and the ground floor."""
    for name, others in GRAPH.items():
        if name.startswith("fgfast.reference"):
            assert {other.split(".")[1] for other in others} <= GROUND | {"reference"}, name
