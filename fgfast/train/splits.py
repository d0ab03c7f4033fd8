"""Moved to :mod:`fgfast.data.splits`."""

from fgfast.deprecated import moved

__getattr__ = moved(__name__, "fgfast.data.splits")
