"""The command line: ``fgfast COMMAND``; exit status 0, 1 (bug in fgfast), 2 (user error), 130 (interrupted)."""

import errno
import io
import os
import sys
import traceback

from fgfast.cli.commands import COMMANDS
from fgfast.errors import UserError
from fgfast.interrupt import interruptible
from fgfast.ranks import OtherRankError


def main(argv: list[str] | None = None) -> int:
    """Run a command and return its exit status.

    Args:
        argv: the arguments after ``fgfast``; None takes those of the process.
    """
    words = sys.argv[1:] if argv is None else argv
    debug = "--debug" in words
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # standard error is so: a path need not be UTF-8
    try:
        with interruptible(last=argv is None):
            _dispatch([word for word in words if word != "--debug"])
    except OtherRankError:
        if debug:
            traceback.print_exc()
        return 2
    except UserError as error:
        return _fail(str(error), 2, debug)
    except KeyboardInterrupt:
        return _fail("interrupted.", 130, debug=False)
    except SystemExit as error:  # from the argument parser: 0 after --help, 2 for an error
        return error.code if isinstance(error.code, int) else 2
    except BrokenPipeError:  # the reader closed the pipe: `fgfast info | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return _fail(
                f"No space is left on the disk for {error.filename or 'the output'}: free some and run again.",
                2,
                debug,
            )
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
            return _fail(
                f"No permission to read or write {error.filename}: change its permissions or the path.",
                2,
                debug,
            )
        if error.filename and error.strerror:  # of the files that were given, or of their disk
            return _fail(f"{error.filename} cannot be used: {error.strerror}.", 2, debug)
        return _fail_internal()
    except ModuleNotFoundError as error:
        if (error.name or "fgfast").partition(".")[0] == "fgfast":
            return _fail_internal()
        return _fail(f"The package {error.name} is not installed: pip install 'fgfast[train]'.", 2, debug)
    except Exception:
        return _fail_internal()
    return 0


def _fail(message: str, status: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    print(f"fgfast: {message}", file=sys.stderr)
    return status


def _fail_internal() -> int:
    traceback.print_exc()
    print("fgfast: this is a bug in fgfast: please report the traceback above.", file=sys.stderr)
    return 1


def _dispatch(argv: list[str]) -> None:
    if not argv or argv[0] in ("-h", "--help"):
        print(_usage())
        return
    if argv[0] == "--version":
        from fgfast.info import versions

        print(versions()["fgfast"])
        return
    if argv[0] not in COMMANDS:
        raise UserError(f"There is no command {argv[0]!r}: choose one of {', '.join(COMMANDS)}.")
    COMMANDS[argv[0]](argv[1:])


def _usage() -> str:
    lines = ["usage: fgfast COMMAND [--help] [--debug]", "       fgfast --version", ""]
    lines += [f"  {name:<10} {(command.__doc__ or '').splitlines()[0]}" for name, command in COMMANDS.items()]
    lines += ["", "fgfast COMMAND --help lists the options of a command; --debug adds a traceback to an error message."]
    return "\n".join(lines)
