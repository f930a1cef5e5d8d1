"""At which times a sampler evaluates the network (spec causal_rcm 4.5, 6.1)."""

from __future__ import annotations

import dataclasses
from typing import Protocol

import jax
import numpy as np

from crcm_jax import flow

MID_TIMES = (15 / 16, 5 / 6, 5 / 8)
"""shift([3/4, 1/2, 1/4]; 5): where a four-step student stops on its way (spec causal_rcm 2)."""


def few_step(steps: int, mid=MID_TIMES, sigma_max: float | None = 1600.0) -> tuple[float, ...]:
    """Times of a few-step sampler: t_max, the first steps−1 of `mid`, 0 (spec causal_rcm 6.1).

    `sigma_max=None` starts at exactly 1. ValueError where `mid` is too short or does not decrease.
    """
    if steps < 1:
        raise ValueError(f"a schedule of {steps} steps: use at least 1")
    if len(mid) < steps - 1:
        raise ValueError(f"{steps} steps need {steps - 1} intermediate times, not {len(mid)}: {list(mid)}")
    first = 1.0 if sigma_max is None else sigma_max / (sigma_max + 1)
    return decreasing((first, *mid[: steps - 1], 0.0))


def multi_step(steps: int, s: float = 3.0, sigma_max: float = 1600.0) -> tuple[float, ...]:
    """steps+1 times of an ODE sampler from t_max to 0, evenly spaced before the shift (spec causal_rcm 6.1)."""
    top = flow.unshift(sigma_max / (sigma_max + 1), s)
    return decreasing(flow.shift(np.linspace(top, 0, steps + 1), s).tolist())


def decreasing(times) -> tuple[float, ...]:
    """The times, checked: strictly decreasing within [0, 1]; ValueError otherwise."""
    times = tuple(float(t) for t in times)
    if any(a <= b for a, b in zip(times, times[1:])) or not all(0 <= t <= 1 for t in times):
        raise ValueError(f"times {[round(t, 4) for t in times]} must decrease strictly within [0, 1]")
    return times


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How many steps each chunk takes, and where.

    steps: most steps of each chunk, non-increasing; the last entry serves all later chunks.
    mid: for each entry of `steps`, the steps−1 times after t = 1; the last entry serves all later chunks.
    """

    steps: tuple[int, ...] = (4,)
    mid: tuple[tuple[float, ...], ...] = (MID_TIMES,)

    def __post_init__(self):
        if not self.steps or min(self.steps) < 1 or any(a < b for a, b in zip(self.steps, self.steps[1:])):
            raise ValueError(f"steps per chunk {list(self.steps)} must be at least 1 and never increase")
        for chunk in range(max(len(self.steps), len(self.mid))):
            self.times(chunk)

    @property
    def most(self) -> int:
        """Most steps of any chunk."""
        return self.steps[0]

    def most_steps(self, chunk: int) -> int:
        """m_b: the chunk's steps at inference."""
        return self.steps[min(chunk, len(self.steps) - 1)]

    def times(self, chunk: int) -> tuple[float, ...]:
        """The chunk's m_b times, from 1; ValueError where too few are given or they do not decrease."""
        mid = self.mid[min(chunk, len(self.mid) - 1)] if self.mid else ()
        return few_step(self.most_steps(chunk), mid, sigma_max=None)[:-1]

    def table(self, chunks: int) -> np.ndarray:
        """Times `[chunk, most steps]`, each row padded with its last time."""
        rows = [self.times(chunk) for chunk in range(chunks)]
        return np.array([row + row[-1:] * (self.most - len(row)) for row in rows], np.float32)


@dataclasses.dataclass(frozen=True)
class ContextRule:
    """What later chunks see of a chunk: its clean prediction or, if `noisy`, from chunk `start` on, what its last
    denoising pass saw, which then serves both (spec causal_rcm 6.2)."""

    noisy: bool = False
    start: int = 0

    def noisy_at(self, chunk: int) -> bool:
        """Whether later chunks see chunk `chunk` with noise."""
        return self.noisy and chunk >= self.start

    def times(self, schedule: Schedule, chunks: int) -> tuple[float, ...]:
        """How noisy each chunk's context is, by itself: the last time of its own schedule, 1 for a single step."""
        return tuple(schedule.times(chunk)[-1] for chunk in range(chunks))


FOUR_STEPS = Schedule()
CLEAN = ContextRule()


class Exit(Protocol):
    """At which step of its schedule a rollout in training reads x0 off."""

    def steps(self, schedule: Schedule, updates: jax.Array, key: jax.Array) -> jax.Array:
        """N, the truncated number of steps, of all chunks or `[chunk]`, at this many updates of the player at turn."""


@dataclasses.dataclass(frozen=True)
class Cycle:
    """N cycles through 1 … m_0 with the player's own updates (spec causal_rcm 4.5)."""

    def steps(self, schedule: Schedule, updates, key):
        """See `Exit`."""
        return updates % schedule.most + 1


CYCLE = Cycle()


@dataclasses.dataclass(frozen=True)
class RolloutPlan:
    """How a student generates in training."""

    schedule: Schedule = FOUR_STEPS
    context: ContextRule = CLEAN
    exit: Exit = CYCLE
