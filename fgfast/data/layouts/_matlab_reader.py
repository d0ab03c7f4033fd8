"""Print variables of MATLAB files as JSON. A program of its own: SciPy can end a process, or fill its memory, on some.

It is given the number of bytes that it may use and, as JSON, [file, [variable, ...]] for each file. It prints a line of
JSON for each: {variable: values, or {field: values} for a structure}, or an error as text. A value that is neither a
number nor text is printed as [its text].
"""

import json
import sys
from typing import Any

import numpy as np
from scipy.io import loadmat

MOST = 10_000_000  # values of a variable, far more than any of the sets has


def plain(values: Any) -> list[Any]:
    """The values of an array as JSON has them."""
    flat = np.atleast_1d(values).ravel()
    if flat.size > MOST:
        raise ValueError(f"a variable has {flat.size:,} values")
    return [v if isinstance(v, int | float | str) else [str(v)[:40]] for v in flat.tolist()]


def read(path: str, names: list[str]) -> dict[str, Any]:
    """The variables of a file that has them."""
    content = loadmat(path, squeeze_me=True, variable_names=names)
    found: dict[str, Any] = {}
    for name in names:
        if name in content:
            value = np.atleast_1d(content[name]).ravel()
            fields = value.dtype.names
            found[name] = plain(value) if fields is None else {field: plain(value[field]) for field in fields}
    return found


def limit_memory(size: int) -> None:
    """Let no more be allocated, where the system can: a damaged file asks for any amount."""
    try:
        import resource
    except ImportError:  # Windows
        return
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    try:
        resource.setrlimit(resource.RLIMIT_AS, (size if hard < 0 else min(size, hard), hard))
    except (OSError, ValueError):  # macOS refuses
        return


if __name__ == "__main__":
    limit_memory(int(sys.argv[1]))
    for path, names in json.loads(sys.argv[2]):
        try:
            line = json.dumps(read(path, names))
        except Exception as error:  # SciPy raises any class of exception for a broken file
            line = json.dumps(f"{type(error).__name__}: {error}"[:200])
        print(line, flush=True)
