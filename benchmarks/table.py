"""The table of a benchmark run, a line per case, as text for the terminal and as a page with bars."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.ceilings import Ceilings, fraction_of_limit
from benchmarks.timing import Measurement

HEADER = ("case", "ours, ms", "times faster", "contenders: ms (times faster)", "peak, MiB", "of limit")
Cell = list[tuple[str, bool]]  # pieces of text, and whether each is red


@dataclass(frozen=True)
class Bar:
    """One variant of a case; ``percent`` is its time relative to the slowest."""

    name: str
    ours: bool
    ms: str
    faster: float | None  # how many times faster ours is
    peak: str
    skipped: str
    percent: float


@dataclass(frozen=True)
class Row:
    """One case: ours first, then the contenders."""

    op: str
    shape: str
    bars: list[Bar]
    faster: float | None  # than the fastest contender
    limit: str
    note: str

    def cells(self) -> list[Cell]:
        """The line of the case, in the columns of HEADER."""
        ours, *others = self.bars
        contenders: Cell = []
        for bar in others:
            named = bar.skipped.casefold().startswith(bar.name.casefold())  # "lightly is not installed"
            text = bar.skipped if named else f"{bar.name} {bar.skipped or bar.ms}"
            contenders.append((", " * bool(contenders) + text, False))
            if bar.faster is not None:
                contenders.append((f" ({times(bar.faster)})", bar.faster < 1))
        peaks = ", ".join(f"{bar.name} {bar.peak}" if i else bar.peak for i, bar in enumerate(self.bars) if bar.peak)
        faster = [("-", False)] if self.faster is None else [(times(self.faster), self.faster < 1)]
        return [
            [(f"{self.op} {self.shape}", False)], [(ours.skipped or ours.ms, bool(ours.skipped))], faster,
            contenders or [(self.note, False)], [(peaks or "-", False)], [(self.limit, False)],
        ]  # fmt: skip

    def summary(self) -> str:
        """The line of the case as plain text, without the columns that are empty."""
        cells = ("".join(text for text, _ in cell) for cell in self.cells())
        return "; ".join(cell for cell in cells if cell not in ("", "-"))


def number(value: float) -> str:
    """Three digits.

    Example:
        >>> number(1234.5), number(0.01234)
        ('1,234', '0.0123')
    """
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def times(faster: float) -> str:
    """A ratio.

    Example:
        >>> times(12.3), times(1.234)
        ('12x', '1.23x')
    """
    return f"{faster:.0f}x" if faster >= 10 else f"{faster:.2f}x"


def row(results: Sequence[Measurement], ceilings: Ceilings | None = None) -> Row:
    """The line of a case from the measurements of its variants, ours first."""
    ours = results[0].quantile(0.5) if results[0].times else None
    slowest = max((r.quantile(0.5) for r in results if r.times), default=1.0)
    bars, ratios = [], []
    for r in results:
        ms = r.quantile(0.5) if r.times else None
        faster = ms / ours if ms is not None and ours and r is not results[0] else None
        ratios += [faster] if faster is not None and not r.is_ours else []
        peak = "" if r.peak is None else number(r.peak / 2**20)
        percent = 0.0 if ms is None else 100 * ms / slowest
        bars.append(Bar(r.variant, r.is_ours, "" if ms is None else number(ms), faster, peak, r.skipped, percent))
    limit = None if ceilings is None else fraction_of_limit(results[0], ceilings)
    shape, note = f"{results[0].case.shape} {results[0].case.dtype}", results[0].note
    return Row(results[0].case.op, shape, bars, min(ratios, default=None), f"{limit:.0%}" if limit else "-", note)


def as_text(rows: Sequence[Row], width: int, colour: bool) -> str:
    """The table by rich, or tab-separated lines without it."""
    try:
        from rich import box
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        return "\n".join(["; ".join(HEADER), *(row.summary() for row in rows)])
    table = Table(*HEADER, box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for column in (1, 2, 5):
        table.columns[column].justify = "right"
    for row in rows:
        table.add_row(*(Text.assemble(*((text, "red" if red else "") for text, red in cell)) for cell in row.cells()))
    console = Console(width=width, force_terminal=colour, highlight=False)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def write_page(rows: Sequence[Row], setting: str, path: Path) -> Path:
    """The same as a self-contained HTML page.

    Raises:
        ImportError: jinja2 is not installed.
    """
    import jinja2

    source = Path(__file__).with_name("table.html.j2").read_text(encoding="utf-8")
    template = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(source)
    groups: dict[str, list[Row]] = {}
    for line in rows:
        groups.setdefault(line.op, []).append(line)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(template.render(groups=groups, setting=setting, times=times), encoding="utf-8")
    return path
