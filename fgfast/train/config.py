"""Moved to :mod:`fgfast.config`."""

from fgfast.deprecated import moved

__getattr__ = moved(__name__, "fgfast.config")
