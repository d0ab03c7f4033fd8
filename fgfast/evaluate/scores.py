"""The scores of a run, in RUN/eval.json."""

import json
from pathlib import Path
from typing import Any

from fgfast.errors import UserError
from fgfast.files import write_json


def read_scores(run: Path) -> list[dict[str, Any]]:
    """The rows of RUN/eval.json, each with "protocol" and "checkpoint"; none if there is no such file.

    Raises:
        UserError: the file does not parse, or holds something else.
    """
    file = run / "eval.json"
    if not file.exists():
        return []
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise ValueError("it is no list of scores")
        for row in rows:
            if missing := {"protocol", "checkpoint"} - row.keys():
                raise ValueError(f"a score has no {min(missing)!r}")
            if not isinstance(row.get("top1", 0.0), int | float):
                raise ValueError(f"a top1 is {row['top1']!r}")
    except ValueError as error:
        raise UserError(f"{file} cannot be read ({error}): repair or remove it.") from error
    return rows


def store_score(run: Path, row: dict[str, Any]) -> None:
    """Add a row to RUN/eval.json; it replaces that of the same protocol, options, checkpoint, data and settings."""
    key = ("protocol", "checkpoint", "path", "set")
    rows = [
        r for r in read_scores(run)
        if any(r.get(k) != row.get(k) for k in key) or r.get("options", "") != row["options"]
    ]  # fmt: skip
    write_json(run / "eval.json", [*rows, row])
