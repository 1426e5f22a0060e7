"""Errors that are meant for a person.

Every entry point turns a `UserError` into one message on stderr and the error's exit code, without a traceback.
Anything else that escapes is a bug of ours and keeps its traceback.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable


class UserError(Exception):
    """Something the user can repair: says what was wrong, where, and what to do. Exit code 1."""

    exit_code = 1


class UsageError(UserError):
    """A wrong argument, configuration key or value. Exit code 2."""

    exit_code = 2


def run_cli(main: Callable[[], int | None]) -> int:
    """Run a command's `main` and map what happens to the exit codes every command of this project shares.

    0 done, 1 failure, 2 wrong usage, 130 interrupted; a `UserError` is printed as one message without a traceback.
    """
    try:
        code = main() or 0
        # What is still buffered may not fit on the disk: better said here than by the interpreter's end, in its own words.
        write_output("")
        return code
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output went away (`| head`): nothing is wrong, and nothing more can be printed.
        sys.stderr.close()
        return 0


class OutputError(UserError):
    """What stdout leads to does not take the output: a full disk."""


def write_output(text: str) -> None:
    """Write a result to stdout at once; without a stdout (`>&-`), to nowhere, as `print` does.

    Raises:
        OutputError: it could not be written.
        BrokenPipeError: nobody reads it any more (see `run_cli`).
    """
    if sys.stdout is None:
        return
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as error:
        # What is still buffered would fail once more when the interpreter closes stdout, with a traceback and exit code 120.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            raise
        raise OutputError(f"cannot write to stdout: {error.strerror or error}") from error
