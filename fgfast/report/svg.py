"""Charts as SVG inside a page: its style sheet gives their colours, and its font their text."""

import html
import io
import re

from matplotlib import rc_context
from matplotlib.figure import Figure

from fgfast.report.plots import FAINT, GRID, INK, LINES

# What a style sheet sets for a dark page; outside one the colour itself holds.
VARIABLES = {INK: "--ink", FAINT: "--faint", GRID: "--line"} | {c: f"--line-{i}" for i, c in enumerate(LINES[:-1])}


def svg_text(figure: Figure, alt: str) -> str:
    """A figure as an ``<svg>`` element for a page in HTML, without anything that is loaded.

    Args:
        figure: the figure; its background is left out.
        alt: what it shows, for those who do not see it.

    Example:
        >>> figure = Figure(figsize=(2, 1))
        >>> svg_text(figure, "a < b")[:54]
        '<svg role="img" aria-label="a &lt; b" viewBox="0 0 144'
    """
    buffer = io.StringIO()
    # Paths get their names from the salt: two charts of a page must not share them.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": alt}):
        figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    text = buffer.getvalue()
    size = re.search(r'viewBox="([^"]*)"', text)
    assert size is not None  # matplotlib writes it
    body = text[text.index(">", text.index("<svg")) + 1 :]
    body = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", body, flags=re.DOTALL)
    body = re.sub(r'<(g|text) id="[^"]*"', r"<\1", body)  # names such as axes_1, which every chart would have
    body = re.sub(r" font-family: [^;]*;", "", body)
    body = re.sub(r"\s*\n\s*", "\n", re.sub(r"(\.\d\d)\d+(?=[\s\",)])", r"\1", body))  # no labels, which end at <
    for colour, variable in VARIABLES.items():
        body = body.replace(colour, f"var({variable}, {colour})")
    return f'<svg role="img" aria-label="{html.escape(alt)}" viewBox="{size[1]}">{body.strip()}'
