"""The argument parser of all commands."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

from crcm_jax.errors import UsageError


class Parser(argparse.ArgumentParser):
    """Says what is wrong with a command line in one sentence, as UsageError, in place of argparse's usage and exit.

    examples: commands that `--help` ends with. lenient: whether words that are no options here are for another parser.
    suggest: what else an option may have meant that is none of this parser's.
    """

    def __init__(
        self, *args: Any, examples: Iterable[str] = (), lenient: bool = False,
        suggest: Callable[[str], str | None] = lambda option: None, **options: Any,
    ):  # fmt: skip
        if examples:
            options["epilog"] = "for example:\n" + "\n".join(f"  {example}" for example in examples)
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(*args, **{"allow_abbrev": False, **options})
        self._lenient, self._suggest = lenient, suggest

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}, see {self.prog} --help")

    def parse_known_args(self, args=None, namespace=None):
        found, rest = super().parse_known_args(args, namespace)
        if rest and not self._lenient:
            self._refuse(rest[0])
        return found, rest

    def options(self) -> list[str]:
        """The spellings that `--help` shows."""
        shown = (action for action in self._actions if action.help != argparse.SUPPRESS)
        return [word for action in shown for word in action.option_strings if word.startswith("--")]

    def add_renamed(self, old: str, new: str) -> None:
        """`old`, the spelling before `new`, still works, and a line says so."""
        self.add_argument(old, action=_Renamed, new=self._option_string_actions[new], help=argparse.SUPPRESS)

    def _refuse(self, word: str) -> NoReturn:
        if not word.startswith("-"):
            raise UsageError(f"{word!r} is not an option: options begin with --, see {self.prog} --help")
        name = word.split("=", 1)[0]
        near = next(iter(difflib.get_close_matches(name, self.options(), 1, cutoff=0.7)), None) or self._suggest(name)
        hint = f"did you mean {near}?" if near else f"see {self.prog} --help"
        raise UsageError(f"there is no option {name}: {hint}")


class _Renamed(argparse.Action):
    """Does what the option's new spelling does."""

    def __init__(self, *args: Any, new: argparse.Action, **options: Any):
        shared = {name: getattr(new, name) for name in ("dest", "nargs", "type", "choices", "default")}
        super().__init__(*args, **{**options, **shared})
        self._new = new

    def __call__(self, parser, namespace, values, option_string=None):
        print(f"crcm: {option_string} is called {self._new.option_strings[0]} now", file=sys.stderr)
        self._new(parser, namespace, values, option_string)
