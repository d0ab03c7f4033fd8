"""The API pages in fgfast/docs: they follow the docstrings, name everything public and read as they should."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token

import fgfast
from fgfast.docs.__main__ import AREAS, DOCS, markdown, pages

ROOT = Path(__file__).parents[1]
PAGES = pages()
NAMES = {name for _, _, names in AREAS.values() for name in names.split()}
READMES = [ROOT / "README.md", *sorted((ROOT / "fgfast").glob("*/README.md"))]
SECTIONS = {"Arguments", "Attributes", "Raises", "Warns", "Returns", "Example"}


def test_the_pages_are_those_of_the_docstrings() -> None:
    """`make docs` was run after the last change of a docstring or signature."""
    held = {path.name: path.read_text(encoding="utf-8") for path in DOCS.glob("*.md")}
    assert held.keys() == PAGES.keys()
    assert [name for name in PAGES if held[name] != PAGES[name]] == []


def test_every_public_name_has_an_entry() -> None:
    """What `fgfast` exports, and what the code in a README imports from its modules."""
    public = {f"fgfast.{name}" for name in fgfast.__all__ if name != "__version__"}
    for readme in READMES:
        for block in re.findall(r"^```python\n(.*?)^```", readme.read_text(encoding="utf-8"), re.S | re.M):
            for module, names in re.findall(r"^from (fgfast[\w.]*) import ([\w, ]+)$", block, re.M):
                public |= {f"{module}.{name}" for name in names.split(", ")}
    types = {"fgfast.config.Fraction"}  # an alias, which methods/README.md explains
    assert public - types - NAMES == set()
    text = "".join(PAGES.values())
    assert [name for name in NAMES if f"\n## {name.rpartition('.')[2]}\n" not in text] == []


def test_a_docstring_becomes_markdown() -> None:
    """Formulas, sections and examples have their own markup, and nothing else has any."""
    docstring = """Zero *rows* of x_ where :math:`x_i` < 0, as :func:`clip` and ``a * b``.

    .. math:: y =
        x^2

    Args:
        x: [N, D],
            any <strides>.
        y_: such as `_x`.

    Example:
        >>> 1 * 1  # doctest: +SKIP
        1

    Source:
        Us, *here*.
    """
    assert markdown(re.sub(r"(?m)^    ", "", docstring)).splitlines() == [
        r"Zero \*rows\* of x\_ where $`x_i`$ \< 0, as `clip` and ``a * b``.",
        *("", "```math", "y =", "x^2", "```", ""),
        *("**Arguments**", "", "- `x`: [N, D],", r"    any \<strides>.", "- `y_`: such as `_x`.", ""),
        *("**Example**", "", "```pycon", ">>> 1 * 1", "1", "```", ""),
        r"Source: Us, \*here\*.",
    ]


def tokens(page: str) -> Iterator[Token]:
    """The blocks of a page and what is inside them."""
    for token in MarkdownIt("commonmark").enable("table").parse(PAGES[page]):
        yield token
        yield from token.children or ()


@pytest.mark.parametrize("page", sorted(PAGES))
def test_nothing_is_markup_by_accident(page: str) -> None:
    """A page has headings, paragraphs, code, bullet lists and tables; bold are only the names of sections."""
    found = {re.sub(r"_(open|close)$", "", token.type) for token in tokens(page)}
    blocks = {"heading", "paragraph", "inline", "fence", "bullet_list", "list_item"}
    table = {"table", "thead", "tbody", "tr", "th", "td"}
    assert found <= blocks | table | {"text", "softbreak", "code_inline", "link", "strong", "text_special"}
    text = [token.content for token in tokens(page)]
    bold = [text[i + 1] for i, token in enumerate(tokens(page)) if token.type == "strong_open"]
    assert set(bold) <= SECTIONS


@pytest.mark.parametrize("page", sorted(PAGES))
def test_links_lead_somewhere(page: str) -> None:
    """To a file of the repository, and to a heading where a page is meant."""
    for target in [str(token.attrs["href"]) for token in tokens(page) if token.type == "link_open"]:
        file, _, anchor = target.partition("#")
        assert (DOCS / file).is_file(), target
        headings = re.findall(r"^## (.+)$", PAGES[file], re.M) if anchor else []
        assert not anchor or anchor in [heading.lower() for heading in headings], target
