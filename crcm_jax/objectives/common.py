"""What the objectives share: conditions from a batch, noised clips, context, and reductions over a sample."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from crcm_jax import flow
from crcm_jax.chunks import ChunkPattern
from crcm_jax.models.base import Condition, TeacherForcing
from crcm_jax.sampling.chunk import Given


def condition(batch) -> Condition:
    """The condition of a batch."""
    return Condition(batch["prompt"], batch.get("frames", {}), batch.get("given"))


def unconditioned(batch, uncond: Condition | None) -> Condition:
    """The same condition with every prompt replaced by the negative one, of one row."""
    if uncond is None:
        raise ValueError("the loss looks at the negative prompt, and the run has none")
    size = batch["latents"].shape[0]
    prompt = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (size, *leaf.shape[1:])), uncond.prompt)
    return condition(batch).replace(prompt=prompt)


def drop_prompts(key, batch, uncond: Condition, rate: float) -> Condition:
    """The condition with each prompt replaced by the negative one with probability `rate`."""
    cond = condition(batch)
    if not rate:
        return cond
    drop = jax.random.bernoulli(key, rate, (batch["latents"].shape[0], 1, 1))

    def choose(prompt, negative):
        if prompt.shape[1:] != negative.shape[1:]:
            raise ValueError(
                f"prompts of shape {list(prompt.shape[1:])} cannot be dropped for a negative one of "
                f"{list(negative.shape[1:])}: give it the same length, or set objective.prompt_dropout = 0"
            )
        return jnp.where(drop.reshape(-1, *[1] * (prompt.ndim - 1)), negative, prompt)

    return cond.replace(prompt=jax.tree.map(choose, cond.prompt, unconditioned(batch, uncond).prompt))


def given(batch) -> Given | None:
    """The batch's frames that are conditions, with their latents; None for none."""
    return None if batch.get("given") is None else Given(batch["given"], batch["latents"])


def noised(x0, noise, t, held: Given | None = None):
    """(x_t, t) of a clip at times t `[batch, frame or 1]`; given frames stay clean, at time 0, and t becomes one time a
    frame."""
    if held is None:
        return flow.interpolate(x0, noise, t), t
    t = held.times(jnp.broadcast_to(t, held.frames.shape))
    return flow.interpolate(x0, noise, t), t


def generated(x, held: Given | None = None):
    """x `[batch, frame, …]` with zeros in the given frames, so that they leave sums over a sample alone."""
    return x if held is None else jnp.where(flow.expand(held.frames, x), jnp.zeros((), x.dtype), x)


def sample_sum(x):
    """Sum over everything but the batch."""
    return jnp.sum(x, tuple(range(1, x.ndim)))


def sample_mean(x, held: Given | None = None):
    """Mean over everything but the batch, of the frames that are generated."""
    if held is None:
        return jnp.mean(x, tuple(range(1, x.ndim)))
    frames = jnp.sum(~held.frames, 1)
    return sample_sum(generated(x, held)) / jnp.maximum(frames * np.prod(x.shape[2:]), 1)


def frame_mean(x):
    """Mean over height, width and channel: `[batch, frame]`."""
    return jnp.mean(x, tuple(range(2, x.ndim)))


class ContextNoise(NamedTuple):
    """How a student sees its context in teacher forcing (spec causal_rcm 3.4).

    times: the time of each chunk's context; an empty tuple means clean. start: chunks before it stay clean.
    """

    times: tuple[float, ...] = ()
    start: int = 0


CLEAN = ContextNoise()


def context(key, x0, chunks: ChunkPattern, noise: ContextNoise = CLEAN) -> TeacherForcing:
    """The view of teacher forcing: a context like x0, at times `[1, 1]` (clean) or `[1, frame]`."""
    if not noise.times:
        return TeacherForcing(x0, jnp.zeros((1, 1), jnp.float32))
    index = chunks.index(x0.shape[1])
    per_chunk = np.array(noise.times)[np.minimum(index, len(noise.times) - 1)]
    t = jnp.asarray(np.where(index >= noise.start, per_chunk, 0.0)[None], jnp.float32)
    return TeacherForcing(flow.interpolate(x0, jax.random.normal(key, x0.shape, x0.dtype), t), t)
