"""The command line: ``fgfast COMMAND``; exit status 0, 1 (our mistake), 2 (yours), 130 (interrupted)."""

import contextlib
import errno
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator

from fgfast.cli.commands import COMMANDS
from fgfast.errors import UserError


def main(argv: list[str] | None = None) -> int:
    """Run a command and return its exit status.

    Args:
        argv: the words after ``fgfast``; None takes them from the process.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    words = [w for w in words if w != "--debug"]
    try:
        with _termination_interrupts():
            _dispatch(words)
    except UserError as error:
        return _fail(str(error), 2, debug)
    except KeyboardInterrupt:
        return _fail("interrupted.", 130, debug=False)
    except SystemExit as error:  # argument parser: 0 after --help, 2 for a mistake
        return error.code if isinstance(error.code, int) else 2
    except BrokenPipeError:  # the reader of our output has gone: `fgfast info | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return _fail(
                f"No space is left on the disk for {error.filename or 'the output'}: free some and run again.", 2, debug
            )
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
            return _fail(
                f"{error.filename} may not be written or read: change its permissions or choose another.", 2, debug
            )
        return _fail_internal()
    except Exception:
        return _fail_internal()
    return 0


@contextlib.contextmanager
def _termination_interrupts() -> Iterator[None]:
    """SIGTERM ends a command as SIGINT does, so that drafts are cleared away; only the main thread can ask for it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _fail(message: str, status: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    print(f"fgfast: {message}", file=sys.stderr)
    return status


def _fail_internal() -> int:
    traceback.print_exc()
    print("fgfast: this is a mistake in fgfast, not yours: please report the lines above.", file=sys.stderr)
    return 1


def _dispatch(words: list[str]) -> None:
    if not words or words[0] in ("-h", "--help"):
        print(_usage())
        return
    if words[0] == "--version":
        from fgfast.info import versions

        print(versions()["fgfast"])
        return
    if words[0] not in COMMANDS:
        raise UserError(f"There is no command {words[0]!r}: choose one of {', '.join(COMMANDS)}.")
    COMMANDS[words[0]](words[1:])


def _usage() -> str:
    lines = ["usage: fgfast COMMAND [--help] [--debug]", ""]
    lines += [f"  {name:<10} {(command.__doc__ or '').splitlines()[0]}" for name, command in COMMANDS.items()]
    return "\n".join(lines)
