"""Deprecated: use :mod:`fgfast.kernels.sanitizer`."""

from fgfast.deprecated import forward_names

__getattr__ = forward_names(__name__, "fgfast.kernels.sanitizer")
