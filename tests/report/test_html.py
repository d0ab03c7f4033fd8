"""The HTML report, on run folders with made-up results."""

import json
import os
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("jinja2")

from fgfast.errors import UserError
from fgfast.report.html import write_report
from fgfast.report.pictures import save_png
from fgfast.train.log import read_metrics
from tests.report import runs


class Tags(HTMLParser):
    """The tags of a page with their attributes, its visible text, and the tags that are still open."""

    VOID = ("meta", "img", "br", "hr")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def images(self) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.tags if tag == "img"]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return runs.make_run(tmp_path / "first_run")


def read(path: Path) -> Tags:
    page = Tags(path.read_text(encoding="utf-8"))
    assert page.open == []
    return page


def test_a_complete_run_has_every_section(run: Path) -> None:
    page = read(write_report(run))
    for text in (
        "particle",
        "on synthetic with resnet18 from random weights",
        "Linear probe",
        "kNN",
        "before",
        "after",
    ):
        assert text in page.text
    assert "34.8" in page.text
    assert "32.8 \u2013 36.8" in page.text
    assert "+23.6" in page.text
    assert "n_parts" in page.text
    assert "torch" in page.text
    assert len(page.images()) == 8 + 4 + 1 + 16  # parts, two figures of the method, parts before training
    assert [tag for tag, _ in page.tags].count("svg") == 9
    assert "Worth a look" not in page.text
    assert "Notes" not in page.text


def test_the_page_is_self_contained(run: Path) -> None:
    text = write_report(run).read_text(encoding="utf-8")
    page = Tags(text)
    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "iframe", "object")
        for name in ("src", "href", "srcset", "data"):
            assert re.match(r"data:image/webp;base64,", attributes.get(name) or "data:image/webp;base64,")
    assert not re.search(r"url\((?!#)|@import|https?:", text)


def test_every_image_has_an_alt_text(run: Path) -> None:
    page = read(write_report(run))
    alt = [image["alt"] for image in page.images()]
    assert all(alt)
    assert {"bird 3", "Nearest neighbours"} <= set(alt)  # an image with a caption, a figure without
    charts = [attributes for tag, attributes in page.tags if tag == "svg"]
    assert {chart["role"] for chart in charts} == {"img"}
    assert "kNN accuracy over steps 100 to 600: from 15.5 to 26.1" in [chart["aria-label"] for chart in charts]


def test_the_page_has_a_dark_style(run: Path) -> None:
    assert "prefers-color-scheme: dark" in write_report(run).read_text(encoding="utf-8")


def test_captions_settings_and_names_are_escaped(run: Path) -> None:
    evil = '<script>alert("x")</script>'
    save_png(runs.waves(), run / "pictures" / "a<b>&.png", description=evil)
    save_png(runs.waves(), run / "pictures" / "c<i>d.png")
    (run / "config.toml").write_text(f"method = '{evil}'\nmodel = '{evil}'")
    (run / "eval.json").write_text(json.dumps([{"protocol": evil, "checkpoint": evil, "top1": 0.5}]))
    path = write_report(run)
    page = read(path)
    assert not {"script", "b", "i"} & {tag for tag, _ in page.tags}
    # Title of the page, heading, subtitle, title of a figure, two settings, protocol and checkpoint.
    assert page.text.count(evil) == 8
    assert evil in [image["alt"] for image in page.images()]


@pytest.mark.parametrize("missing", ["config.toml", "eval.json", "metrics.jsonl", "parts.png", "pictures"])
def test_a_missing_file_is_left_out(run: Path, missing: str) -> None:
    os.rename(run / missing, run.parent / "elsewhere")
    page = read(write_report(run))
    sections = {"config.toml": "Settings", "eval.json": "Results", "metrics.jsonl": "Waiting for data"}
    for name, heading in sections.items():
        assert (heading in page.text) == (name != missing)


def test_an_empty_folder_gives_a_page(tmp_path: Path) -> None:
    page = read(write_report(tmp_path))
    assert tmp_path.name in page.text
    assert page.images() == []


def test_a_missing_folder_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a folder"):
        write_report(tmp_path / "none")


@pytest.mark.parametrize(
    ("name", "text"), [("config.toml", "method = "), ("eval.json", "[{]"), ("eval.json", '[{"n": 3}]')]
)
def test_a_file_that_does_not_parse_is_named_and_the_old_report_stays(run: Path, name: str, text: str) -> None:
    before = write_report(run).read_bytes()
    (run / name).write_text(text)
    with pytest.raises(UserError, match=re.escape(name)):
        write_report(run)
    assert (run / "report.html").read_bytes() == before


def test_a_partial_last_line_of_the_metrics_is_left_out_and_named(run: Path) -> None:
    rows = runs.metrics(50)
    runs.write_jsonl(run / "metrics.jsonl", rows, tail='{"step": 55, "lo')
    assert read_metrics(run / "metrics.jsonl") == (rows, [len(rows) + 1])
    assert f"line {len(rows) + 1} could not be read" in read(write_report(run)).text


def test_steps_repeated_by_a_resumed_run_count_once(tmp_path: Path) -> None:
    first = [{"step": step, "loss": 1.0} for step in (10, 20, 30)]
    again = [{"step": step, "loss": 2.0} for step in (20, 30, 40)]
    runs.write_jsonl(tmp_path / "metrics.jsonl", first + again)
    rows, broken = read_metrics(tmp_path / "metrics.jsonl")
    assert rows == [first[0], *again]
    assert broken == []


def test_lines_that_are_not_rows_are_reported(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('3\n{"loss": 1}\n\n{"step": 1}\n\x00\n')
    assert read_metrics(tmp_path / "metrics.jsonl") == ([{"step": 1}], [1, 2, 5])


def test_a_truncated_figure_is_left_out_and_named(run: Path) -> None:
    (run / "pictures" / "views.png").write_bytes((run / "pictures" / "views.png").read_bytes()[:500])
    page = read(write_report(run))
    assert len(page.images()) == 8 + 1 + 16
    assert "pictures/views.png is not a readable PNG" in page.text


def test_figures_of_both_checkpoints_are_one_comparison(run: Path) -> None:
    assert [tag for tag, _ in read(write_report(run)).tags].count("h4") == 2
    (run / "parts.png").unlink()
    assert "h4" not in [tag for tag, _ in read(write_report(run)).tags]


def test_what_is_off_is_said_beside_its_chart_and_above(run: Path) -> None:
    rows = [row | {"data_wait": 0.2} for row in runs.metrics() if "loss" in row]
    runs.write_jsonl(run / "metrics.jsonl", rows)
    text = read(write_report(run)).text
    assert "Worth a look, with a note below the chart: Waiting for data." in text
    chart = text.index("Waiting for data% of the step time")
    assert 0 < text.index("Training waits for data for 20% of its time") - chart < text.index("Peak memory") - chart


def test_figures_that_would_make_the_page_too_large_are_left_out_and_named(run: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (1200, 1200, 3), dtype=np.uint8)
    Image.fromarray(noise).save(run / "pictures" / "noise0.png", compress_level=0)
    for i in range(1, 6):
        shutil.copy(run / "pictures" / "noise0.png", run / "pictures" / f"noise{i}.png")
    path = write_report(run)
    page = read(path)
    assert path.stat().st_size < 5_000_000
    assert "pictures/noise5.png is left out: the page would be larger than 5 MB." in page.text
    assert "Noise0" in page.text


def test_a_report_of_non_finite_losses_is_written(tmp_path: Path) -> None:
    nan = [{"step": step, "loss": float("nan"), "grad_norm": float("inf")} for step in range(5)]
    runs.write_jsonl(tmp_path / "metrics.jsonl", nan)
    assert read(write_report(tmp_path)).images() == []


def test_a_checkpoint_without_a_score_has_an_empty_cell(tmp_path: Path) -> None:
    (tmp_path / "eval.json").write_text(json.dumps(runs.EVALUATION[1:]))
    text = read(write_report(tmp_path)).text
    assert "\u2013" in text
    assert "+23.6" in text
    assert "+18.8" not in text


def test_no_temporary_files_remain(run: Path) -> None:
    write_report(run)
    assert not list(run.rglob("*.tmp"))


def test_the_versions_are_those_of_the_run(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text('method = "simclr"\n[environment]\ntorch = "9.9.9"\n')
    text = read(write_report(tmp_path)).text
    assert "Versions of the run" in text
    assert "9.9.9" in text


def test_results_on_two_data_sets_are_two_lines(tmp_path: Path) -> None:
    rows = [{**row, "data": data} for data in ("synthetic", "cub") for row in runs.EVALUATION]
    (tmp_path / "eval.json").write_text(json.dumps(rows))
    text = read(write_report(tmp_path)).text
    assert "Linear probe, synthetic" in text
    assert "Linear probe, cub" in text


def test_scores_on_key_points_are_a_line_each(tmp_path: Path) -> None:
    scores = {"nmi": 0.25, "ari": 0.125, "keypoint_error": 0.3, "box_iou": None}
    rows = [
        {"protocol": "parts", "checkpoint": "init", "options": "", **scores, "n": 12},
        {"protocol": "parts", "checkpoint": "last", "options": "", **scores, "nmi": 0.5, "n": 12},
        runs.EVALUATION[0],
    ]
    (tmp_path / "eval.json").write_text(json.dumps(rows))
    text = read(write_report(tmp_path)).text
    for name in ("NMI", "ARI", "error in sides of the box", "IoU with the box"):
        assert name in text
    assert "Linear probe of true parts" not in text
    assert "25.0" in text
    assert "+25.0" in text
    assert "12.5" in text
