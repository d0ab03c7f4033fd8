"""Moved to :mod:`fgfast.kernels.sanitizer`."""

from fgfast.deprecated import moved

__getattr__ = moved(__name__, "fgfast.kernels.sanitizer")
