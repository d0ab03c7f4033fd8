"""Names in JSON: the bytes of a path that are not UTF-8, which JSON cannot hold, are written as %XX."""

import os
import re
from collections.abc import Iterable
from urllib.parse import unquote_to_bytes

_RAW = re.compile("[%\udc80-\udcff]")  # surrogates stand for bytes that are not UTF-8


def escape_names(names: Iterable[str]) -> list[str]:
    r"""The names without surrogates.

    Example:
        >>> escape_names(["100%.jpg", "caf\udce9.jpg"])
        ['100%25.jpg', 'caf%E9.jpg']
    """
    return [_RAW.sub(lambda m: f"%{ord(m[0]) & 0xFF:02X}", name) for name in names]


def unescape_names(names: Iterable[str]) -> list[str]:
    """What :func:`escape_names` was given."""
    return [os.fsdecode(unquote_to_bytes(name)) if "%" in name else name for name in names]
