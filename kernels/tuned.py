"""Rows measured on a device, written by ``python -m fgfast.kernels.tune``: (op, architecture) -> rows."""

TUNED: dict[tuple[str, str], list[tuple[str, dict[str, int], int, int, int, int, int]]] = {}
