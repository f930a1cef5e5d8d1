"""Which numbers will do: the one description of a range, for options of commands and keys of a configuration."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

LARGEST = 2**31 - 1
"""Counts go through 32-bit integers on the way to the devices."""


@dataclasses.dataclass(frozen=True)
class Range:
    """Finite numbers between bounds, whole ones only if `whole`; a bound that is None is absent."""

    at_least: float | None = None
    at_most: float | None = None
    above: float | None = None
    below: float | None = None
    whole: bool = False

    def words(self) -> str:
        """`a whole number of at least 1`, for people."""
        bounds = [
            f"{name} {bound if isinstance(bound, int) else format(bound, '.10g')}"
            for name, bound in (
                ("of at least", self.at_least), ("above", self.above), ("of at most", self.at_most),
                ("below", self.below),
            )
            if bound is not None and not (self.whole and bound == LARGEST)
        ]  # fmt: skip
        return " ".join([f"a {'whole' if self.whole else 'finite'} number", " and ".join(bounds)]).strip()

    def holds(self, value: Any) -> bool:
        """Whether `value` is such a number; truth values are none."""
        if isinstance(value, bool) or not isinstance(value, int if self.whole else (int, float)):
            return False
        # A whole number may be too large for a float, which only a finite float has to be asked for.
        return (isinstance(value, int) or math.isfinite(value)) and not (
            (self.at_least is not None and value < self.at_least)
            or (self.at_most is not None and value > self.at_most)
            or (self.above is not None and value <= self.above)
            or (self.below is not None and value >= self.below)
        )


def count(at_least: int = 1, at_most: int = LARGEST) -> Range:
    """Whole numbers from `at_least` on."""
    return Range(at_least, at_most, whole=True)
