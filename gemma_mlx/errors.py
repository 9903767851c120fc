"""What the user did that cannot work, said in one line."""


class InputError(ValueError):
    """Bad input: the message says what was expected, what was found, where (file:line, tensor, flag), and what to do.

    The command line prints it without a traceback and exits with code 2.
    """


class SourceError(InputError):
    """Where the data come from failed or changed (a server that does not answer, an object that was replaced).

    No row is to blame, so it is never skipped as a bad row.
    """
