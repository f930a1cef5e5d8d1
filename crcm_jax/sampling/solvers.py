"""How a causal model makes each of its chunks: a distilled student in few steps, a diffusion model along its ODE.

Both are a `Solver`, all that streams ask of one.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol

from crcm_jax import flow
from crcm_jax.sampling.chunk import Stepper
from crcm_jax.sampling.schedule import CLEAN, FOUR_STEPS, ContextRule, Schedule, multi_step


class Solver(Stepper, Protocol):
    """Times, steps, and what later chunks see. Hashable."""

    @property
    def context(self) -> ContextRule:
        """What later chunks see of a chunk."""

    @property
    def most(self) -> int:
        """Most steps of any chunk."""

    @property
    def draws(self) -> int:
        """Fresh noises that a chunk takes beside its first: of one that re-noises, as many as it has steps at most."""

    @property
    def distilled(self) -> bool:
        """Whether it is for students, who carry their guidance within."""

    def times(self, chunk: int) -> tuple[float, ...]:
        """The times of generated chunk `chunk`, ending in 0."""

    def describe(self) -> str:
        """A few words for people."""


@dataclasses.dataclass(frozen=True)
class Few:
    """A distilled student: jump to x0, re-noise to the next time (spec causal_rcm 6.2)."""

    schedule: Schedule = FOUR_STEPS
    context: ContextRule = CLEAN
    sigma_max: float = 1600.0
    distilled = True

    def times(self, chunk: int) -> tuple[float, ...]:
        """See `Solver`."""
        return (self.sigma_max / (self.sigma_max + 1), *self.schedule.times(chunk)[1:], 0.0)

    @property
    def most(self) -> int:
        """See `Solver`."""
        return self.schedule.most

    @property
    def draws(self) -> int:
        """See `Solver`."""
        return self.schedule.most

    def advance(self, i, x, v, course):
        """See `Stepper`."""
        return flow.interpolate(flow.to_clean(x, v, course.times[i]), course.z[i], course.times[i + 1])

    def describe(self) -> str:
        """See `Solver`."""
        noisy = ", noisy context" if self.context.noisy else ""
        return f"chunk by chunk, {','.join(map(str, self.schedule.steps))} steps{noisy}"


@dataclasses.dataclass(frozen=True)
class Ode:
    """A diffusion model: Euler steps along its probability-flow ODE (spec causal_rcm 6.3)."""

    steps: int = 50
    shift: float = 3.0
    sigma_max: float = 1600.0
    context: ContextRule = CLEAN
    distilled = False
    draws = 0

    def times(self, chunk: int) -> tuple[float, ...]:
        """See `Solver`; the same for every chunk."""
        return multi_step(self.steps, self.shift, self.sigma_max)

    @property
    def most(self) -> int:
        """See `Solver`."""
        return self.steps

    def advance(self, i, x, v, course):
        """See `Stepper`."""
        return flow.euler(x, v, course.times[i], course.times[i + 1])

    def describe(self) -> str:
        """See `Solver`."""
        return f"chunk by chunk, {self.steps} Euler steps each, shift {self.shift:g}"
