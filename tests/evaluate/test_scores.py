"""eval.json of a run: what is read, and what stops an evaluation before its work."""

import re
from pathlib import Path

import pytest
import torch

from fgfast.errors import UserError
from fgfast.evaluate.protocols import evaluate
from fgfast.evaluate.scores import read_scores, store_score
from fgfast.report.html import write_report

ROW = {"protocol": "knn", "checkpoint": "last", "path": "/data", "options": "", "top1": 0.5}


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b'{"a": 1}', b"[3]", b'[{"protocol": "knn"}]', b"[{\xe9}]",
        b'[{"protocol": "knn", "checkpoint": "last", "top1": "x"}]',
        b'[{"protocol": "knn", "checkpoint": "last", "top1": 1e999}]', b'[{"protocol": 3, "checkpoint": "last"}]',
        b'[{"protocol": "knn", "checkpoint": ["last"]}]', b"[" * 100_000, b'[{"protocol": "knn", "protocol": "mlp"}]',
    ],
)  # fmt: skip
def test_damaged_scores_are_refused_before_the_work_and_stay(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "eval.json"
    file.write_bytes(content)
    refused = re.escape(f"{file} cannot be read (") + r".*\): repair or remove it\.$"
    with pytest.raises(UserError, match=refused):
        evaluate(tmp_path, "knn", tmp_path, device=torch.device("cpu"))
    with pytest.raises(UserError, match=refused):
        write_report(tmp_path)
    assert file.read_bytes() == content


@pytest.mark.parametrize("key", ["protocol", "checkpoint", "path", "set", "options"])
def test_a_row_replaces_only_that_of_the_same_evaluation(tmp_path: Path, key: str) -> None:
    other, new = ROW | {key: "other"}, ROW | {"top1": 0.75}
    for row in (ROW, other, new):
        store_score(tmp_path, row)
    assert read_scores(tmp_path) == [other, new]


def test_keys_that_are_not_known_are_kept(tmp_path: Path) -> None:
    row = ROW | {"settings": {"lr": 0.1}, "by hand": [1, None]}
    store_score(tmp_path, row)
    store_score(tmp_path, ROW | {"protocol": "mlp"})
    assert read_scores(tmp_path)[0] == row
