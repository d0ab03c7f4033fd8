"""The commands that record memory write a row for each case, here of tiny ones."""

import sys
from typing import Any

import pytest
import torch

from benchmarks import micro_batch, plan, record


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[record.Row]:
    """The rows that a command records, instead of the file; the number of threads is put back."""
    rows: list[record.Row] = []
    monkeypatch.setattr(record, "overwrite", lambda made, _: rows.extend(made))
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    return rows


def call(module: Any, monkeypatch: pytest.MonkeyPatch, *argv: str) -> None:
    monkeypatch.setattr(sys, "argv", [module.__name__, *argv])
    module.main()


def test_gradient_caching(
    written: list[record.Row], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Times only where a plain step fits, and its gradients are equal."""
    tiny = {"CHUNK": 2, "LOSSES": {"NT-Xent": (4, 6), "parts": (4,)}, "PLAIN_UP_TO": 4, "ROUNDS": 1}
    for name, value in tiny.items():
        monkeypatch.setattr(micro_batch, name, value)
    monkeypatch.setattr(micro_batch, "peak", lambda _loss, batch, _variant: batch * micro_batch.MIB)
    call(micro_batch, monkeypatch, "--record")
    assert [(row["loss"], row["batch"], row["variant"], row["peak_mib"]) for row in written] == [
        ("NT-Xent", 4, "chunks", 4.0), ("NT-Xent", 4, "plain", 4.0), ("NT-Xent", 6, "chunks", 6.0),
        ("parts", 4, "chunks", 4.0), ("parts", 4, "plain", 4.0),
    ]  # fmt: skip
    assert all((row["of_plain"] > 0) if row["batch"] == 4 else row["of_plain"] == "" for row in written)
    assert all(row["versions"] for row in written)
    capsys.readouterr()
    call(micro_batch, monkeypatch, "parts", "4", "chunks")  # what a fresh process prints
    int(capsys.readouterr().out)


def test_gradient_caching_does_not_time_wrong_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(micro_batch, "CHUNK", 2)
    monkeypatch.setattr(micro_batch, "TOLERANCE", -1.0)
    with pytest.raises(RuntimeError, match="NT-Xent at 4: the gradients in chunks are off by"):
        micro_batch.times("NT-Xent", 4)


def test_plans(written: list[record.Row], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(plan, "measured", lambda *_: 50_000_000)
    monkeypatch.setattr(plan, "CASES", (("simclr", 2, {"model": "test_resnet", "size": 32, "batch_size": 4}),))
    call(plan, monkeypatch, "--record")
    (row,) = written
    assert row["ratio"] == round(row["predicted"] / 50_000_000, 3)
    assert (row["method"], row["ranks"], row["options"]) == ("simclr", 2, "model=test_resnet size=32 batch_size=4")
    assert "OFF BY MORE THAN 20%" in capsys.readouterr().out
