"""How one chunk comes to be, in training's rollouts and in streams alike: from noise to x0 against a cache."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from crcm_jax import flow
from crcm_jax.models.bound import Prompted


class Given(NamedTuple):
    """Frames of a chunk that are conditions, not generated. frames: `[batch, frame]` booleans; clean: latents."""

    frames: jax.Array
    clean: jax.Array

    def hold(self, x):
        """x with the given frames as they are."""
        return jnp.where(flow.expand(self.frames, x), self.clean.astype(x.dtype), x)

    def times(self, t):
        """Times `[…, frame]` with the given frames at 0: `[batch, frame]`."""
        return jnp.where(self.frames, 0.0, t)


def frame_times(t, frames: int, given: Given | None = None):
    """A scalar time, or one a frame, as a network takes it: `[1, frame]`, or `[batch, frame]` with given frames."""
    times = jnp.broadcast_to(t, (1, frames))
    return times if given is None else given.times(times)


class Stepper(Protocol):
    """How a solver takes one step of a chunk."""

    def advance(self, i: Any, x: jax.Array, v: jax.Array, course: Course) -> jax.Array:
        """The sample after step i (maybe traced) from x with velocity v."""


class Course(NamedTuple):
    """What one chunk's steps go by. times: of its steps, ending in 0. z: fresh noise of each, `[step, batch, …]`."""

    times: jax.Array
    z: jax.Array


def denoise(
    prompted: Prompted,
    solver: Stepper,
    x,
    course: Course,
    steps,
    cache: tuple[Any, ...],
    chunk,
    given: Given | None = None,
) -> jax.Array:
    """x after the first `steps` (maybe traced) of a chunk's steps, on a cache of the chunks before it."""

    def step(i, x):
        t = frame_times(course.times[i], x.shape[1], given)
        x = solver.advance(i, x, prompted.velocity(x, t, cache, chunk), course)
        return x if given is None else given.hold(x)

    return jax.lax.fori_loop(0, steps, step, x)
