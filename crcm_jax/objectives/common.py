"""What the objectives share: conditions from a batch, context, and reductions over a sample."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from crcm_jax import flow
from crcm_jax.chunks import ChunkPattern
from crcm_jax.models.base import Condition


def condition(batch) -> Condition:
    """The condition of a batch."""
    return Condition(text=batch["text"], image=batch.get("image"), latents=batch.get("condition_latents"))


def unconditioned(batch, text) -> Condition:
    """The same condition with every prompt replaced by the negative one, `text` `[1, token, channel]`."""
    cond = condition(batch)
    return cond.replace(text=jnp.broadcast_to(text.astype(cond.text.dtype), cond.text.shape))


def drop_prompts(key, batch, text, rate: float) -> Condition:
    """The condition with each prompt replaced by the negative one with probability `rate`."""
    if not rate:
        return condition(batch)
    drop = jax.random.bernoulli(key, rate, (batch["text"].shape[0], 1, 1))
    cond, uncond = condition(batch), unconditioned(batch, text)
    return cond.replace(text=jnp.where(drop, uncond.text, cond.text))


def sample_sum(x):
    """Sum over everything but the batch."""
    return jnp.sum(x, tuple(range(1, x.ndim)))


def sample_mean(x):
    """Mean over everything but the batch."""
    return jnp.mean(x, tuple(range(1, x.ndim)))


def frame_mean(x):
    """Mean over height, width and channel: `[batch, frame]`."""
    return jnp.mean(x, tuple(range(2, x.ndim)))


class ContextNoise(NamedTuple):
    """How a student sees its context in teacher forcing (spec causal_rcm 3.4).

    times: the time of each chunk's context; an empty tuple means clean. start: chunks before it stay clean.
    """

    times: tuple[float, ...] = ()
    start: int = 0


def context(key, x0, chunks: ChunkPattern, noise: ContextNoise):
    """The context (c, t_c) for `network.velocity`: c like x0, t_c `[1, 1]` (clean) or `[1, frame]`."""
    if not noise.times:
        return x0, jnp.zeros((1, 1), jnp.float32)
    index = chunks.index(x0.shape[1])
    per_chunk = np.array(noise.times)[np.minimum(index, len(noise.times) - 1)]
    t = jnp.asarray(np.where(index >= noise.start, per_chunk, 0.0)[None], jnp.float32)
    return flow.interpolate(x0, jax.random.normal(key, x0.shape, x0.dtype), t), t
