"""The exception for mistakes that the user can correct, and messages on one line."""

import logging


class UserError(Exception):
    """A mistake of the user: the message is one sentence that names the cause and the remedy.

    The command line prints the message without a traceback and exits with status 2 (``--debug`` shows the traceback).
    """

    def __str__(self) -> str:
        """The message on one line, whatever the names of files in it."""
        return one_line(super().__str__())


def one_line(text: str) -> str:
    r"""``text`` with escapes for all characters that do not print, such as newlines and bytes that are not UTF-8.

    Example:
        >>> print(one_line("two" + chr(10) + "lines" + chr(0xDCFF)))
        two\nlines\udcff
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def _log_on_one_line(record: logging.LogRecord) -> bool:
    record.msg, record.args = one_line(record.getMessage()), ()
    return True


logging.getLogger("fgfast").addFilter(_log_on_one_line)
