"""Errors that a user causes and can mend: printed as one sentence, without a traceback."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


class UserError(ValueError):
    """A wrong input. The message is one sentence that names the thing and the mend; `exit_code` ends the program."""

    exit_code = 1


class UsageError(UserError):
    """A wrong command line or configuration, found before any work began."""

    exit_code = 2


class Interrupted(UserError):
    """Work that was stopped by its user, where there is more to say of it than that."""

    exit_code = 130


@contextlib.contextmanager
def blame_config() -> Iterator[None]:
    """Turns a ValueError of the code that reads a configuration into a UsageError with the same message."""
    try:
        yield
    except UserError:
        raise
    except ValueError as error:
        raise UsageError(str(error)) from error
