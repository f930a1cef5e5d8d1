"""Types of numeric options: each knows its range, so that the parser refuses at once what is out of it."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from fractions import Fraction
from typing import TypeVar

from crcm_jax.ranges import LARGEST, Range

N = TypeVar("N", int, float)

SEED = 2**63 - 1
"""The largest seed: more than that no library's generator takes."""
LONGEST_SIDE = 1 << 20
"""Pixels. What is smaller and still too large is refused by its memory (`_memory`), which says how much is lacking."""


def integer(at_least: int = 1, at_most: int = LARGEST) -> Callable[[str], int]:
    """The type of an option that takes one whole number."""
    wanted = Range(at_least, at_most, whole=True)

    def parse(text: str) -> int:
        return _within(wanted, text, _whole(text))

    return parse


def number(
    *, at_least: float | None = None, above: float | None = None, at_most: float | None = None,
    below: float | None = None,
) -> Callable[[str], float]:  # fmt: skip
    """The type of an option that takes one finite number, which may be written as a fraction, 5/6."""
    wanted = Range(at_least, at_most, above, below)

    def parse(text: str) -> float:
        return _within(wanted, text, _real(text))

    return parse


def several(kind: Callable[[str], N], separator: str = ",", *, example: str) -> Callable[[str], tuple[N, ...]]:
    """The type of an option that takes a list of at least one of `kind`."""

    def parse(text: str) -> tuple[N, ...]:
        try:
            return tuple(kind(part.strip()) for part in text.split(separator))
        except argparse.ArgumentTypeError as error:
            raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers such as {example}: {error}") from None

    return parse


def pair(
    separator: str, *, example: str, at_least: int = 1, at_most: int = LARGEST
) -> Callable[[str], tuple[int, int]]:
    """The type of an option that takes two whole numbers, such as 832x480."""
    wanted = Range(at_least, at_most, whole=True)

    def parse(text: str) -> tuple[int, int]:
        first, _, second = text.partition(separator)
        one, other = _whole(first), _whole(second)
        if one is None or other is None or not (wanted.holds(one) and wanted.holds(other)):
            raise argparse.ArgumentTypeError(f"{text!r} is not like {example}, each {wanted.words()}")
        return one, other

    return parse


def times(text: str) -> tuple[tuple[float, ...], ...]:
    """The type of `--mid`: times between 1 and 0, rows apart by ';', of which one may be empty (a single step)."""
    row = several(number(above=0, below=1), example="15/16,5/6,5/8;5/6")
    rows = tuple(row(part) if part.strip() else () for part in text.split(";"))
    if not any(rows):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers such as 15/16,5/6,5/8;5/6")
    return rows


def _within(wanted: Range, text: str, value: N | None) -> N:
    if value is None or not wanted.holds(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not {wanted.words()}")
    return value


def _whole(text: str) -> int | None:
    # No more digits than any range has: Python refuses to read thousands of them.
    return int(text) if len(text) < 40 and text.removeprefix("-").isdecimal() else None


def _real(text: str) -> float | None:
    try:
        return float(Fraction(text)) if "/" in text else float(text)
    except (ValueError, ZeroDivisionError, OverflowError):
        return None
