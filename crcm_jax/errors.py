"""Errors that a user causes and can mend: printed as one sentence, without a traceback."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from typing import Any


class UserError(ValueError):
    """A wrong input. The message is one sentence that names the thing and the mend; `exit_code` ends the program."""

    exit_code = 1


class UsageError(UserError):
    """A wrong command line or configuration, found before any work began."""

    exit_code = 2


class Interrupted(UserError):
    """Work that was stopped by its user, where there is more to say of it than that."""

    exit_code = 130


class MissingPackage(UserError, ImportError):
    """A package that only some commands need is not installed."""


def need(module: str, *, extra: str) -> Any:
    """The module of a package that only `extra` of our own package installs. MissingPackage, naming it, without it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise  # The package is there and lacks something of its own.
        name = module.partition(".")[0]
        raise MissingPackage(f"this needs {name}: pip install 'causal-rcm-jax[{extra}]'") from error


@contextlib.contextmanager
def blame_config() -> Iterator[None]:
    """Turns a ValueError of the code that reads a configuration into a UsageError with the same message."""
    try:
        yield
    except UserError:
        raise
    except ValueError as error:
        raise UsageError(str(error)) from error
