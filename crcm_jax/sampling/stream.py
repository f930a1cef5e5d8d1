"""The streaming sampler of whole clips: a session, one chunk after another, each seeing the cache of those before it.

spec causal_rcm 6.2 (few steps), 6.3 (many steps), 6.5 (a given first frame).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp

from crcm_jax.models.base import Condition
from crcm_jax.models.bound import Bound
from crcm_jax.sampling.session import ChunkNoise, Session
from crcm_jax.sampling.solvers import Solver


class Noise(NamedTuple):
    """All the randomness of one clip, so that the same noise can drive several samplers."""

    initial: jax.Array
    """`[batch, frame, height, width, channel]` of the frames that are generated."""
    steps: jax.Array
    """`[draw, batch, frame, …]`: full clips, cut by absolute frame index."""
    image: jax.Array
    """Noise for noised first frames that are given, `[batch, frame, …]`."""


def draw_noise(key, shape, steps: int, given: int = 0) -> Noise:
    """Noise for clips of `shape` whose first `given` frames are given, with up to `steps` re-noised steps. More steps
    leave the earlier draws as they are."""
    initial, step, frame = jax.random.split(key, 3)
    batch, frames, *rest = shape
    draws = [jax.random.normal(jax.random.fold_in(step, k), shape) for k in range(steps)]
    return Noise(
        jax.random.normal(initial, (batch, frames - given, *rest)),
        jnp.stack(draws) if draws else jnp.zeros((0, *shape)),
        jax.random.normal(frame, (batch, max(given, 1), *rest)),
    )


def stream(
    model: Bound, cond: Condition, key=None, *, shape: tuple[int, ...], solver: Solver,
    uncond: Condition | None = None, guidance: float = 1.0, first=None, noise: Noise | None = None,
) -> Iterator[jax.Array]:  # fmt: skip
    """Yield each chunk's latents `[batch, chunk frame, height, width, channel]` as soon as it is ready.

    shape: the clip's latents (batch, frame, height, width, channel).
    guidance: above 1, with `uncond`, two branches with a cache each; students carry their guidance within.
    first: latents `[batch, frame, …]` that the clip starts with, whole chunks (image-to-video, continuation): they are
        yielded first. Schedules count generated chunks, the noisy context's start counts all (spec causal_rcm 6.5).
    noise: of the whole clip, in place of what the session would draw from `key`, chunk by chunk.
    ValueError for a clip, or a start of it, that does not split into chunks, and for a bidirectional network.
    """
    batch, frames, height, width, channels = shape
    session = Session(model.network, solver, batch, (height, width, channels), frames, guidance)
    drawn = None if noise is None else noise.image
    state = session.start(model.params, cond, key, uncond=uncond, first=first, noise=drawn)
    chunks, begin = session.chunks, 0 if first is None else first.shape[1]
    if first is not None:
        for span in chunks.spans(begin):
            yield first[:, span]
    for chunk in range(state.chunk, chunks.count(frames)):
        span = chunks.span(chunk)
        own = slice(span.start - begin, span.stop - begin)
        handed = None if noise is None else ChunkNoise(noise.initial[:, own], noise.steps[:, :, span])
        x, state = session.step(model.params, state, cond.at(span).frames, handed)
        yield x


def generate(model: Bound, cond: Condition, key=None, **options) -> jax.Array:
    """The whole clip: the chunks of `stream`, concatenated in time."""
    return jnp.concatenate(list(stream(model, cond, key, **options)), 1)
