"""Self-forcing: the student generates a clip chunk by chunk from its own cache (spec causal_rcm 4.5)."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from crcm_jax import flow
from crcm_jax.chunks import ChunkPattern
from crcm_jax.models.base import Cache, Condition, Network
from crcm_jax.sampling.schedule import StepPlan


class Rollout(NamedTuple):
    """A generated clip and what replaying its last steps needs."""

    samples: jax.Array
    """x0 predictions of every chunk's last step, `[batch, frame, height, width, channel]`."""
    inputs: jax.Array
    """What each chunk's last step saw, the same shape."""
    times: jax.Array
    """The time of that step, `[frame]`."""
    cache: Cache
    """Keys and values of every chunk."""


def over_chunks(chunks: ChunkPattern, frames: int, body, carry, xs):
    """`carry, y = body(carry, chunk, x)` over the chunks of a clip; x and y are leaves `[frame, …]` cut into chunks.

    The first chunk runs by itself where it has another length; the rest is one scan, compiled once.
    """
    count = chunks.count(frames)
    alone = 0 if chunks.first == chunks.size else 1
    outs = []
    if alone:
        carry, y = body(carry, 0, jax.tree.map(lambda x: x[: chunks.first], xs))
        outs.append(y)
    if count > alone:
        begin = chunks.start(alone)
        cut = jax.tree.map(lambda x: x[begin:].reshape(count - alone, chunks.size, *x.shape[1:]), xs)
        carry, ys = jax.lax.scan(lambda c, x: body(c, *x), carry, (jnp.arange(alone, count), cut))
        outs.append(jax.tree.map(lambda y: y.reshape(-1, *y.shape[2:]), ys))
    return carry, jax.tree.map(lambda *parts: jnp.concatenate(parts), *outs)


def _frames_first(x):
    return jnp.moveaxis(x, 1, 0)


def last_step(network: Network, params, x, t, cond: Condition, cache: Cache, chunk=None):
    """The x0 prediction of a chunk, or of every chunk where None is named, at time t (scalar, or one a frame), seeing
    the cached chunks before it."""
    times = jnp.broadcast_to(t, (1, x.shape[1]))
    return flow.to_clean(x, network.velocity(params, x, times, cond, cache=cache, chunk=chunk), times)


def rollout(network: Network, params, cond: Condition, key, plan: StepPlan, steps, shape, chunks: ChunkPattern):
    """Generate clips of `shape` (batch, frame, height, width, channel) with `steps` (maybe traced) steps a chunk.

    Chunk b takes min(steps, m_b) of its schedule's times: a truncated schedule, whose last time is where x0 is read
    off. Only that last step of every chunk is differentiable in `params`; cached keys and values never are, so chunks
    are independent of each other in the gradient.
    """
    frames = shape[1]
    count = chunks.count(frames)
    noise_key, context_key = jax.random.split(key)
    most = plan.steps[0]
    # One full-clip noise a step, cut by frames: what a seed generates does not depend on the chunk pattern.
    noises = jnp.stack([jax.random.normal(k, shape) for k in jax.random.split(noise_key, most)])
    fresh = jax.random.normal(context_key, shape)
    table, longest = jnp.asarray(plan.table(count)), jnp.asarray([plan.most_steps(c) for c in range(count)])
    frozen = jax.lax.stop_gradient(params)
    # The prompt's keys and values are the same in every pass.
    known = network.prepare(frozen, cond) if hasattr(network, "prepare") else cond

    def body(cache, chunk, xs):
        z, fresh = jnp.moveaxis(xs[0], (0, 1), (2, 0)), jnp.moveaxis(xs[1], 0, 1)
        times, m = table[chunk], longest[chunk]
        n = jnp.minimum(steps, m)

        def denoise(k, x):
            x0 = last_step(network, frozen, x, times[k], known, cache, chunk)
            return flow.interpolate(x0, z[k + 1], times[k + 1])

        x = jax.lax.stop_gradient(jax.lax.fori_loop(0, n - 1, denoise, z[0]))
        t = times[n - 1]
        x0 = last_step(network, params, x, t, cond, cache, chunk)

        # What later chunks will see of this one.
        seen, t_seen = jax.lax.stop_gradient(x0), jnp.zeros_like(t)
        if plan.noisy_context:
            full, t_full = n == m, times[m - 1]
            noisy = jnp.where(full, x, flow.interpolate(seen, fresh, t_full))
            use = chunk >= plan.context_start
            seen, t_seen = jnp.where(use, noisy, seen), jnp.where(use, t_full, 0.0)
        t_frames = jnp.broadcast_to(t_seen, (1, x.shape[1]))
        cache = network.append(frozen, seen, t_frames, known, cache, chunk=chunk)
        return cache, (_frames_first(x0), _frames_first(x), jnp.full(x.shape[1], t))

    cache = network.init_cache(shape[0], shape[1:4])
    xs = (jnp.moveaxis(noises, 2, 0), _frames_first(fresh))
    cache, (samples, inputs, times) = over_chunks(chunks, frames, body, cache, xs)
    back = lambda x: jnp.moveaxis(x, 0, 1)  # noqa: E731
    return Rollout(back(samples), back(inputs), times, cache)


def frozen_rollout(network: Network, params, *arguments, gather_once: bool = True) -> Rollout:
    """`rollout` without gradients, by the network in its fastest form for that, if it has one (`for_many_passes`)."""
    frozen = jax.lax.stop_gradient(params)
    if not hasattr(network, "for_many_passes"):
        return rollout(network, frozen, *arguments)
    done = rollout(*network.for_many_passes(frozen, gather_once=gather_once), *arguments)
    return done._replace(cache=network.put_together(done.cache))


def replay(
    network: Network, params, cond: Condition, done: Rollout, target, weights, chunks: ChunkPattern, *,
    at_once: bool = False,
):  # fmt: skip
    """Σ_b weights_b·Σ(x0_b − target)² and its gradient, from the chunks' last steps (spec causal_rcm 4.5, replayed).

    Equal to differentiating the rollout, since its chunks are gradient-independent, with the memory of one chunk; or
    `at_once`, with all chunks in one pass against the rollout's cache: faster, with the activations of a whole clip.
    Returns (squared error per sample `[batch]`, gradient). A sample of weight zero contributes nothing.
    """
    keep = weights > 0

    def gradient(x, goal, times, chunk=None):
        def loss(params):
            x0 = last_step(network, params, x, times, cond, done.cache, chunk)
            error = jnp.sum(jnp.square(x0 - goal), tuple(range(1, x0.ndim)))
            return jnp.sum(jnp.where(keep, weights * error, 0.0)), error

        grads, error = jax.grad(loss, has_aux=True)(params)
        return error, grads

    if at_once:
        return gradient(done.inputs, target, done.times)

    def body(carry, chunk, xs):
        found = gradient(jnp.moveaxis(xs[0], 0, 1), jnp.moveaxis(xs[1], 0, 1), xs[2][0], chunk)
        return jax.tree.map(lambda total, part: total + part.astype(total.dtype), carry, found), jnp.zeros(len(xs[2]))

    # Sums over chunks in float32: narrower ones would lose the small chunks' share.
    wide = lambda p: jnp.zeros(p.shape, jnp.promote_types(p.dtype, jnp.float32))  # noqa: E731
    zero = jnp.zeros(target.shape[0], target.dtype), jax.tree.map(wide, params)
    xs = _frames_first(done.inputs), _frames_first(target), done.times
    return over_chunks(chunks, target.shape[1], body, zero, xs)[0]
