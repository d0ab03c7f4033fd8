"""Aliases for renamed or moved names, kept for one minor version with a warning that names the successor."""

import importlib
import warnings
from collections.abc import Callable, Mapping
from typing import Any


def forward_names(module: str, successor: str, names: Mapping[str, str] = {}) -> Callable[[str], Any]:
    """Make the ``__getattr__`` of a module that forwards old names to the module that has them now.

    Args:
        module: name of the module with the old names.
        successor: name of the module that defines them now; may be the same.
        names: old names and their new ones; if empty, every name of the successor is forwarded under the same name.

    Returns:
        a function of a name that returns the object with a DeprecationWarning, or raises an AttributeError.

    Example:
        >>> import fgfast.train.config
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     warnings.simplefilter("always")
        ...     config = fgfast.train.config.TrainConfig
        >>> str(caught[0].message)
        'fgfast.train.config.TrainConfig will be removed in the next minor version: use fgfast.config.TrainConfig.'
    """

    def get_attribute(name: str) -> Any:
        if name.startswith("__") or (names and name not in names):
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        new = names.get(name, name)
        value = getattr(importlib.import_module(successor), new)
        warnings.warn(
            f"{module}.{name} will be removed in the next minor version: use {successor}.{new}.",
            DeprecationWarning,
            stacklevel=2,
        )
        return value

    return get_attribute
