"""The scores of a run, in RUN/eval.json."""

from pathlib import Path
from typing import Any, NotRequired, TypedDict, cast

from fgfast.files import write_json
from fgfast.formats import read_json


class _Row(TypedDict):
    """What is known of a row; all other keys are kept as they are."""

    protocol: str
    checkpoint: str
    top1: NotRequired[float]
    low: NotRequired[float | None]
    high: NotRequired[float | None]
    miou: NotRequired[float]
    nmi: NotRequired[float]
    ari: NotRequired[float]
    keypoint_error: NotRequired[float | None]
    box_iou: NotRequired[float | None]
    n: NotRequired[int]
    options: NotRequired[str]
    data: NotRequired[str]
    path: NotRequired[str]
    set: NotRequired[str]
    network: NotRequired[str]


def read_scores(run: Path) -> list[dict[str, Any]]:
    """The rows of RUN/eval.json, each with "protocol" and "checkpoint"; none if there is no such file.

    Raises:
        UserError: the file does not parse, or holds something else.
    """
    file = run / "eval.json"
    if not file.exists():
        return []
    return cast(list[dict[str, Any]], read_json(file, list[_Row], remedy="repair or remove it", plain=True))


def store_score(run: Path, row: dict[str, Any]) -> None:
    """Add a row to RUN/eval.json; it replaces that of the same evaluation, with the same options and network."""
    key = ("protocol", "checkpoint", "path", "set", "network")
    rows = [
        r for r in read_scores(run)
        if any(r.get(k) != row.get(k) for k in key) or r.get("options", "") != row["options"]
    ]  # fmt: skip
    write_json(run / "eval.json", [*rows, row])
