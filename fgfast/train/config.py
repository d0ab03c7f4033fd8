"""Deprecated: use :mod:`fgfast.config`."""

from fgfast.deprecated import forward_names

__getattr__ = forward_names(__name__, "fgfast.config")
