"""The command line: :mod:`main` chooses the command, :mod:`parse` reads its arguments, :mod:`commands` runs it."""

from fgfast.cli.main import main

__all__ = ["main"]
