"""What every command line does around its command: one line for bad input, and the exit codes."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import click

from gemma_mlx.errors import InputError
from gemma_mlx.signals import Interrupted


def enter(command: click.Command, arguments: Sequence[str] | None = None, name: str | None = None) -> int:
    """Run ``command``; returns the exit code: 0, 2 for bad input (one line on stderr), 128 + signal number.

    A defect of ours keeps its traceback, and Python exits with 1.
    """
    try:
        result = command.main(arguments, prog_name=name, standalone_mode=False)
        return result if isinstance(result, int) else 0  # click returns the code of --help here
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return 2
    except (InputError, click.ClickException) as error:
        text = error.format_message() if isinstance(error, click.ClickException) else str(error)
        print(f"error: {' '.join(text.split())}", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, click.Abort) as stop:
        reason = stop if isinstance(stop, Interrupted) else stop.__cause__  # click wraps every KeyboardInterrupt
        if isinstance(reason, Interrupted):
            print(reason, file=sys.stderr)
            return 128 + reason.signum
        print("interrupted", file=sys.stderr)
        return 130
