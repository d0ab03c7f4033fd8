"""Deprecated: use :mod:`fgfast.data.splits`."""

from fgfast.deprecated import forward_names

__getattr__ = forward_names(__name__, "fgfast.data.splits")
