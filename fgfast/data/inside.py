"""Whether a path that a file gives stays in the folder that it is relative to."""

import os
import re

_DRIVE = re.compile(r"[A-Za-z]:" if os.name == "nt" else r"[A-Za-z]:[/\\]")  # "a: b.jpg" is a name elsewhere


def leads_out(rel: str) -> bool:
    r"""Whether a relative path is absolute, has "..", a drive or a null byte, so that it may lead out of its folder.

    Both separators count on every system: lists and maps are copied from one to another. Links are followed, as
    whoever owns the folder has put them there; a path that goes up from one is refused with every other "..".

    Example:
        >>> [leads_out(rel) for rel in ("birds/1.jpg", "birds/../../1.jpg", "/etc/1.jpg", r"C:\\1.jpg")]
        [False, True, True, True]
    """
    up = ".." in rel and ".." in re.split(r"[/\\]", rel)
    return up or rel.startswith(("/", "\\")) or "\0" in rel or _DRIVE.match(rel) is not None
