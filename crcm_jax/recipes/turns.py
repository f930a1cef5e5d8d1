"""Whose turn an iteration is."""

from __future__ import annotations

import dataclasses
from typing import Protocol


class Turns(Protocol):
    """Who learns when; host-side arithmetic on iterations, counted from 0."""

    def player(self, iteration: int) -> str:
        """The player whose turn `iteration` is."""

    def counts(self, iteration: int) -> dict[str, int]:
        """How many of the iterations before `iteration` were each player's."""


@dataclasses.dataclass(frozen=True)
class Always:
    """One player's turn, always."""

    name: str = "student"

    def player(self, iteration: int) -> str:
        """See `Turns`."""
        return self.name

    def counts(self, iteration: int) -> dict[str, int]:
        """See `Turns`."""
        return {self.name: iteration}


@dataclasses.dataclass(frozen=True)
class Alternate:
    """`first` has a turn every `every` iterations, `second` all between; the first `alone` iterations are all `first`'s
    (spec causal_rcm 4.5, phases)."""

    every: int
    alone: int = 0
    first: str = "student"
    second: str = "critic"

    def player(self, iteration: int) -> str:
        """See `Turns`."""
        if iteration < self.alone or (iteration - self.alone) % self.every == 0:
            return self.first
        return self.second

    def counts(self, iteration: int) -> dict[str, int]:
        """See `Turns`."""
        first = iteration if iteration <= self.alone else self.alone - (-(iteration - self.alone) // self.every)
        return {self.first: first, self.second: iteration - first}
