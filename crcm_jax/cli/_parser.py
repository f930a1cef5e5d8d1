"""The argument parser of all commands."""

from __future__ import annotations

import argparse
from typing import NoReturn

from crcm_jax.errors import UsageError


class Parser(argparse.ArgumentParser):
    """Says what is wrong with a command line in one sentence, as UsageError, in place of argparse's usage and exit."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}, see {self.prog} --help")
