"""Names that have moved: they stay for one minor version, with a warning that names the successor."""

import importlib
import warnings
from collections.abc import Callable, Mapping
from typing import Any


def moved(module: str, successor: str, names: Mapping[str, str] = {}) -> Callable[[str], Any]:
    """A ``__getattr__`` for a module whose names are found in another one now.

    Args:
        module: the name of the module that keeps the old names.
        successor: where they are now.
        names: new name of each old one that did not keep its own; then only these exist.

    Example:
        >>> import fgfast.train.config
        >>> with warnings.catch_warnings(record=True) as said:
        ...     warnings.simplefilter("always")
        ...     config = fgfast.train.config.TrainConfig
        >>> str(said[0].message)
        'fgfast.train.config.TrainConfig will go in the next minor version: use fgfast.config.TrainConfig.'
    """

    def find(name: str) -> Any:
        if name.startswith("__") or (names and name not in names):
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        new = names.get(name, name)
        found = getattr(importlib.import_module(successor), new)
        warnings.warn(
            f"{module}.{name} will go in the next minor version: use {successor}.{new}.",
            DeprecationWarning,
            stacklevel=2,
        )
        return found

    return find
