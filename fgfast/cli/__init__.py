"""The command line: :mod:`main` dispatches, :mod:`parse` parses the arguments, :mod:`commands` runs the command."""

from fgfast.cli.main import main

__all__ = ["main"]
