"""The files of a comparison: one UserError for whatever damages them."""

import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fgfast.compare import store
from fgfast.compare.comparison import _read_correct
from fgfast.compare.entries import Entry
from fgfast.compare.store import (
    read_correct,
    read_rows,
    read_tuning,
    store_correct,
    store_row,
    store_tuning,
    training_summary,
)
from fgfast.compare.table import format_table
from fgfast.errors import UserError
from tests.fuzz_files import comparison_of, finished_comparison

HEAD = b"data,method,seed,knn\n"


def refuse(file: Path, content: bytes, read: Callable[[], object], reason: str) -> None:
    file.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read()
    assert str(caught.value).startswith(f"{file} cannot be read (")
    assert str(caught.value).endswith("): restore or remove it.")
    assert reason in str(caught.value)
    assert file.read_bytes() == content


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "no column data"), (b"x,y\n1,2\n", "no column data"), (b"data;method;seed\n", "no column data"),
        (HEAD + b"caf\xe9,simclr,0,1\n", "line 2 is not UTF-8"),
        (HEAD + b"birds,simclr,0\n", "the row of birds, simclr, 0"),
        (HEAD + b"birds,simclr,0,1,2\n", "the row of birds, simclr, 0"),
        (HEAD + b"birds,simclr,0,1\n" * 2, "two rows of birds, simclr, 0"), (HEAD + b'birds,simclr,0,"1', "line 2"),
        (HEAD + b"birds,simclr,0,high\n", "knn = 'high', which is not a number"),
        (HEAD + b"birds,simclr,0,1e999\n", "knn = '1e999'"), (b"data,method,seed,seed\n", "two columns seed"),
    ],
)  # fmt: skip
def test_damaged_rows_are_refused(tmp_path: Path, content: bytes, reason: str) -> None:
    refuse(tmp_path / "compare.csv", content, lambda: read_rows(tmp_path), reason)
    refuse(tmp_path / "compare.csv", content, lambda: store_row(tmp_path, {}, []), reason)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"a": 3}', b'{"a": {"0.1": "x"}}', b'{"\xe9": {}}'])
def test_damaged_rates_are_refused(tmp_path: Path, content: bytes) -> None:
    refuse(tmp_path / "tuned.json", content, lambda: read_tuning(tmp_path), "")
    refuse(tmp_path / "tuned.json", content, lambda: store_tuning(tmp_path, "a", {}), "")


@pytest.mark.parametrize("kept", [0.0, 0.5, 0.99])
def test_cut_predictions_are_refused(tmp_path: Path, kept: float) -> None:
    store_correct(tmp_path, "knn", np.array([True, False]))
    whole = (tmp_path / "correct.npz").read_bytes()
    content = whole[: int(kept * len(whole))]
    refuse(tmp_path / "correct.npz", content, lambda: read_correct(tmp_path, "knn"), "")
    refuse(tmp_path / "correct.npz", content, lambda: store_correct(tmp_path, "knn", np.ones(2, bool)), "")


def test_predictions_with_another_byte_are_refused(tmp_path: Path) -> None:
    store_correct(tmp_path, "knn", np.array([True, False]))
    whole = (tmp_path / "correct.npz").read_bytes()
    place = whole.index(b"knn.npy") + 40
    content = whole[:place] + bytes([whole[place] ^ 255]) + whole[place + 1 :]
    refuse(tmp_path / "correct.npz", content, lambda: read_correct(tmp_path, "knn"), "")


def test_a_protocol_without_predictions_is_refused(tmp_path: Path) -> None:
    store_correct(tmp_path, "knn", np.array([True, False]))
    with pytest.raises(UserError, match="it has no linear"):
        read_correct(tmp_path, "linear")


def test_names_in_any_script_round_trip(tmp_path: Path) -> None:
    row = {"data": "bïrds 鳥", "method": "simclr", "seed": "0", "knn": "0.5"}
    store_row(tmp_path, row, ["knn"])
    stored = read_rows(tmp_path)["bïrds 鳥", "simclr", "0"]
    assert row.items() <= stored.items()
    assert "鳥".encode() in (tmp_path / "compare.csv").read_bytes()


def test_cells_that_a_spreadsheet_would_run_are_escaped_and_read_as_they_were(tmp_path: Path) -> None:
    row = {"data": "=HYPERLINK(1)", "method": "@x", "seed": "-1", "nmi": -0.25, "note": "'=1"}
    store_row(tmp_path, row, ["knn", "note"])
    text = (tmp_path / "compare.csv").read_text()
    assert text.splitlines()[1].startswith("'=HYPERLINK(1),'@x,-1,")
    assert ",-0.25," in text
    stored = read_rows(tmp_path)["=HYPERLINK(1)", "@x", "-1"]
    assert stored["note"] == "'=1"
    store_row(tmp_path, {"data": "b", "method": "c", "seed": 0}, [])
    assert read_rows(tmp_path)["=HYPERLINK(1)", "@x", "-1"] == stored


def test_a_file_of_an_earlier_version_is_read_without_escapes(tmp_path: Path) -> None:
    (tmp_path / "compare.csv").write_bytes(b"data,method,seed,knn\r\n=x,simclr:lr=0.1,0,0.5\r\n")
    assert read_rows(tmp_path)["=x", "simclr:lr=0.1", "0"]["knn"] == "0.5"


@pytest.mark.parametrize("value", ["high", "inf"])
def test_a_score_that_is_no_number_is_refused_only_where_scores_are(tmp_path: Path, value: str) -> None:
    (tmp_path / "compare.csv").write_text(f"data,method,seed,mlp\nbirds,simclr,0,{value}\n")
    assert read_rows(tmp_path)
    with pytest.raises(UserError, match=f"the row of birds, simclr, 0 has mlp = '{value}', which is not a number"):
        read_rows(tmp_path, ["mlp"])


def archive(tmp_path: Path, content: bytes) -> None:
    with zipfile.ZipFile(tmp_path / "correct.npz", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("knn.npy", content)


def header(shape: str, dtype: str = "|b1") -> bytes:
    text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (header("(1000000000000000,)") + b"\1", "no list of what is correct"), (header("(0,)"), "no list"),
        (header("(1, 2)") + b"\1\0", "no list"), (header("(2,)", "|u1") + b"\1\0", "no list"),
        (header("(2,)") + b"\1\7", "no list"), (header("(1,)", "|O") + b"cos\nsystem\n", "no list"),
        (header("(" * 3000), ""), (b"\x93NUMPY\x09\x00", "unknown version"),
        (b"\0" * 5000, "unpacks to more than 4,000"),
    ],
)  # fmt: skip
def test_what_is_no_list_of_predictions_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, reason: str
) -> None:
    """Before memory is taken for it: neither its size in the archive nor its shape is believed."""
    monkeypatch.setattr(store, "LIMIT", 4000)
    archive(tmp_path, content)
    refuse(
        tmp_path / "correct.npz", (tmp_path / "correct.npz").read_bytes(), lambda: read_correct(tmp_path, "a"), reason
    )


def test_predictions_of_other_images_are_refused(tmp_path: Path) -> None:
    runs, sizes = [tmp_path / "a", tmp_path / "b"], {}
    for run, n in zip(runs, (3, 4), strict=True):
        store_correct(run, "knn", np.ones(n, bool))
    assert len(_read_correct(runs[0], "knn", sizes)) == 3
    with pytest.raises(UserError, match=r"b has 4 images scored under knn, .*a has 3"):
        _read_correct(runs[1], "knn", sizes)


def test_speeds_that_are_null_or_missing_leave_their_steps_out(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text('method = "simclr"\nbatch_size = 10\n')
    rows = '{"step": 1, "loss": 1, "images_per_s": null}', '{"step": 2, "loss": NaN, "images_per_s": 5.0}'
    (tmp_path / "metrics.jsonl").write_text("\n".join([*rows, '{"step": 3, "loss": 1}']))
    summary = training_summary(tmp_path)
    assert (summary["steps"], summary["seconds"], summary["images_per_s"]) == (3, 2.0, 15.0)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1, "images_per_s": 0}\n')
    assert training_summary(tmp_path)["images_per_s"] == ""


def test_a_column_that_a_file_lacks_is_empty_in_the_table() -> None:
    rows = [{"data": "birds", "method": "simclr", "seed": "0", "knn": "0.5"}]
    entries = [Entry.parse("simclr")]
    lines = format_table("birds", entries, "", ["knn"], rows, lambda *_: {0: np.array([True, False])})
    assert lines[-2].startswith("| `simclr` | 1 | 50.0 (")


@pytest.mark.parametrize(("of_base", "gain"), [({1: [1, 1]}, "-100.0"), ({2: [0, 1]}, "| - |"), ({}, "| - |")])
def test_gains_are_paired_by_seed(of_base: dict[int, list[int]], gain: str) -> None:
    """Rows may be missing from compare.csv: of the baseline, or of another seed than of the method."""
    rows = [{"data": "birds", "method": "simclr", "seed": str(seed)} for seed in (0, 1)]
    found = {"simclr": {0: [1, 1], 1: [0, 0]}, "random": of_base}
    lines = format_table(
        "birds", [Entry.parse("simclr"), Entry.parse("random")], "random", ["linear"], rows,
        lambda entry, _: {seed: np.array(row, bool) for seed, row in found[entry.label].items()},
    )  # fmt: skip
    assert gain in next(line for line in lines if "`simclr`" in line)


def test_what_a_kill_has_left_is_cleared_when_a_comparison_goes_on(tmp_path: Path) -> None:
    """Nothing is missing, so nothing is trained: the rows stay as they are."""
    shutil.copytree(finished_comparison(), tmp_path / "copy")
    out = tmp_path / "copy" / "out"
    rows, left = read_rows(out), [out / ".compare.csv.1.2.partial", out / "runs" / "birds" / ".correct.npz.3.4.partial"]
    for path in left:
        path.write_bytes(b"data,met")
        os.utime(path, (0, 0))
    comparison_of(tmp_path / "copy").run()
    assert not any(path.exists() for path in left)
    assert read_rows(out) == rows
