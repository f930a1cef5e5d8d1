"""At which times a sampler evaluates the network (spec causal_rcm 4.5, 6.1)."""

from __future__ import annotations

import dataclasses

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
class StepPlan:
    """How many steps each chunk takes, and where.

    steps: most steps of each chunk, non-increasing; the last entry serves all later chunks.
    times: for each entry of `steps`, the steps−1 times after t = 1; the last entry serves all later chunks.
    noisy_context: cache the last denoising pass's input instead of a clean pass, from chunk `context_start` on.
    """

    steps: tuple[int, ...] = (4,)
    times: tuple[tuple[float, ...], ...] = (MID_TIMES,)
    noisy_context: bool = False
    context_start: int = 0

    def __post_init__(self):
        if not self.steps or min(self.steps) < 1 or any(a < b for a, b in zip(self.steps, self.steps[1:])):
            raise ValueError(f"steps per chunk {list(self.steps)} must be at least 1 and never increase")
        for chunk in range(max(len(self.steps), len(self.times))):
            self.schedule(chunk)

    def most_steps(self, chunk: int) -> int:
        """m_b: the chunk's steps at inference."""
        return self.steps[min(chunk, len(self.steps) - 1)]

    def schedule(self, chunk: int) -> tuple[float, ...]:
        """The chunk's m_b times, from 1; ValueError where too few are given or they do not decrease."""
        mid = self.times[min(chunk, len(self.times) - 1)] if self.times else ()
        return few_step(self.most_steps(chunk), mid, sigma_max=None)[:-1]

    def table(self, chunks: int) -> np.ndarray:
        """Times `[chunk, most steps]`, each row padded with its last time."""
        rows = [self.schedule(chunk) for chunk in range(chunks)]
        return np.array([row + row[-1:] * (self.steps[0] - len(row)) for row in rows], np.float32)

    def context_times(self, chunks: int) -> tuple[float, ...]:
        """The last time of each chunk's own schedule: how noisy its cached context is; 1 for a single step."""
        return tuple(self.schedule(chunk)[-1] for chunk in range(chunks))

    def simulated_steps(self, updates):
        """N: the truncated number of steps at this many updates of the network in question, cycling 1 … m_0."""
        return updates % self.steps[0] + 1
