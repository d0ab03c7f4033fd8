"""Arrow and Parquet files in the form in which Hugging Face `datasets` writes them."""

import json
from io import BytesIO
from pathlib import Path
from typing import Any

from .conftest import smooth

FEATURES = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": ["wren", "jay", "rook"]}}


def jpegs(n: int, seed: int = 0) -> list[bytes]:
    found = []
    for i in range(n):
        smooth(seed + i, 24, 32).save(stream := BytesIO(), "JPEG")
        found.append(stream.getvalue())
    return found


def table(images: list[bytes | None], labels: list | None, features: dict | None = None) -> Any:
    """A table of images, and of labels unless they are None."""
    import pyarrow as pa

    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    columns = {"image": pa.array([{"bytes": x, "path": None} for x in images], kind)}
    if labels is not None:
        columns["label"] = pa.array(labels, None if labels else pa.int64())
    features = FEATURES if features is None else features
    metadata = {"huggingface": json.dumps({"info": {"features": {k: features[k] for k in columns if k in features}}})}
    return pa.table(columns).replace_schema_metadata(metadata)


def stream(path: Path, rows: Any, *, new: Any = None, options: Any = None, n: int | None = None) -> None:
    """Write a table as an Arrow file."""
    import pyarrow as pa

    with (new or pa.ipc.new_stream)(str(path), rows.schema, options=options) as out:
        out.write_table(rows, n)


def save(root: Path, rows: Any, *, new: Any = None, options: Any = None, rows_per_batch: int | None = None) -> Path:
    """What `Dataset.save_to_disk` writes."""
    root.mkdir(parents=True, exist_ok=True)
    stream(root / "data-0.arrow", rows, new=new, options=options, n=rows_per_batch)
    (root / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data-0.arrow"}], "_split": None}))
    (root / "dataset_info.json").write_text("{}")
    return root


def save_dict(root: Path, splits: dict[str, Any]) -> Path:
    """What `DatasetDict.save_to_disk` writes."""
    for name, rows in splits.items():
        save(root / name, rows)
    (root / "dataset_dict.json").write_text(json.dumps({"splits": list(splits)}))
    return root


def parquet(root: Path, splits: dict[str, Any]) -> Path:
    """A folder data/ of Parquet files, as data sets on the hub have it."""
    import pyarrow.parquet as pq

    (root / "data").mkdir(parents=True)
    for name, rows in splits.items():
        pq.write_table(rows, root / "data" / f"{name}-00000-of-00001.parquet", row_group_size=2)
    return root
