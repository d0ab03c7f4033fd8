"""The exception for mistakes that the user can correct."""


class UserError(Exception):
    """A mistake of the user: the message is one sentence that names the cause and the remedy.

    The command line prints the message without a traceback and exits with status 2 (``--debug`` shows the traceback).
    """
