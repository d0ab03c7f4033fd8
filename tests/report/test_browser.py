"""The report in a browser: nothing is loaded, nothing is wrong, and it fits a phone, a dark screen and paper."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from fgfast.report.html import write_report
from tests.report import runs
from tests.report.browser import CHROMIUM, Browser, browser

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed"),
]

WIDE, PHONE = 1200, 360


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    run = runs.make_run(tmp_path_factory.mktemp("report") / ("a_run_with_a_long_name" * 4))
    rows = [row | {"data_wait": 0.2, "effective_rank": 9.0, "uniformity": -2.0} for row in runs.metrics()]
    runs.write_jsonl(run / "metrics.jsonl", rows)
    path = write_report(Path(run))
    assert path.stat().st_size < 5_000_000
    with browser() as opened:
        show(opened, WIDE)
        opened.open(path.as_uri())
        yield opened


def show(page: Browser, width: int, *, dark: bool = False, media: str = "screen") -> None:
    page.call("Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=width == PHONE)
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    page.call("Emulation.setEmulatedMedia", media=media, features=[scheme])


def luminance(page: Browser, selector: str, style: str) -> float:
    """Of the colour of an element, 0 to 1."""
    colour = page.evaluate(f"getComputedStyle(document.querySelector('{selector}')).{style}")
    red, green, blue = (int(part) / 255 for part in colour.removeprefix("rgb(").removesuffix(")").split(","))
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_nothing_is_loaded_and_nothing_is_wrong(page: Browser) -> None:
    urls = [e["params"]["request"]["url"] for e in page.events if e["method"] == "Network.requestWillBeSent"]
    assert [url for url in urls if not url.startswith("data:")] == [url for url in urls if url.endswith("report.html")]
    assert sum(url.endswith("report.html") for url in urls) == 1
    wrong = ("Log.entryAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled")
    assert [event for event in page.events if event["method"] in wrong] == []


def test_every_image_is_drawn_and_has_a_text(page: Browser) -> None:
    images = page.evaluate("Array.from(document.images).map(i => [i.alt, i.naturalWidth])")
    assert images
    assert all(alt and width > 0 for alt, width in images)
    charts = page.evaluate("Array.from(document.querySelectorAll('svg')).map(s => [s.role, s.ariaLabel])")
    assert len(charts) == 11
    assert all(role == "img" and label for role, label in charts)


@pytest.mark.parametrize("width", [WIDE, PHONE])
def test_the_page_is_no_wider_than_the_screen(page: Browser, width: int) -> None:
    show(page, width)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    inner = "Array.from(document.querySelectorAll('main *')).filter(e => e.getBoundingClientRect().right > innerWidth)"
    assert page.evaluate(f"{inner}.map(e => e.tagName)") == []


def test_figures_are_side_by_side_and_below_each_other_on_a_phone(page: Browser) -> None:
    tops = "Array.from(document.querySelectorAll('.pair > div')).map(e => e.getBoundingClientRect().top)"
    for width, side_by_side in ((WIDE, True), (PHONE, False)):
        show(page, width)
        before, after = page.evaluate(tops)
        assert (before == after) == side_by_side
    sides = page.evaluate("Array.from(document.images).map(i => i.getBoundingClientRect().width)")
    assert min(sides) > 60  # of 160 pixels, eight in a row


@pytest.mark.parametrize("dark", [False, True])
def test_page_and_charts_follow_the_colour_scheme(page: Browser, dark: bool) -> None:
    show(page, WIDE, dark=dark)
    for behind, style, drawn, of in (
        ("body", "backgroundColor", "h1", "color"), ("figure", "backgroundColor", "svg text", "fill"),
        ("figure", "backgroundColor", "svg path[style*=line-0]", "stroke"),
        (".note", "backgroundColor", ".note", "color"),
    ):  # fmt: skip
        back, front = luminance(page, behind, style), luminance(page, drawn, of)
        assert (back < front) == dark
        assert abs(back - front) > 0.4
    show(page, WIDE, dark=dark, media="print")
    assert luminance(page, "body", "backgroundColor") == 1
    assert luminance(page, "h1", "color") < 0.2


def test_it_is_printed_with_its_settings(page: Browser) -> None:
    show(page, WIDE, media="print")
    assert page.evaluate("document.querySelector('details td').getBoundingClientRect().height") > 0
    assert page.call("Page.printToPDF")["data"]
