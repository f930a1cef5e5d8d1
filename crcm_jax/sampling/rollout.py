"""Self-forcing: the student generates a clip chunk by chunk from its own cache (spec causal_rcm 4.5)."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from crcm_jax import flow
from crcm_jax.chunks import ChunkPattern
from crcm_jax.models.base import Condition, OnCache
from crcm_jax.models.bound import Bound
from crcm_jax.sampling.chunk import Course, Given, denoise, frame_times
from crcm_jax.sampling.schedule import RolloutPlan
from crcm_jax.sampling.solvers import Few


class Rollout(NamedTuple):
    """A generated clip and what replaying its last steps needs."""

    samples: jax.Array
    """x0 predictions of every chunk's last step, `[batch, frame, height, width, channel]`."""
    inputs: jax.Array
    """What each chunk's last step saw, the same shape."""
    times: jax.Array
    """The time of that step, `[frame]`."""
    cache: Any
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
    """Every leaf of a tree `[batch, frame, …]` as `[frame, batch, …]`, or back."""
    return jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 0, 1), x)


def last_step(model: Bound, x, t, cond: Condition, cache, chunk=None, given: Given | None = None):
    """The x0 prediction of a chunk, or of every chunk where None is named, at time t (scalar, or one a frame), seeing
    the cached chunks before it."""
    times = frame_times(t, x.shape[1], given)
    x0 = flow.to_clean(x, model.velocity(x, times, cond, OnCache(cache[0], chunk)), times)
    return x0 if given is None else given.hold(x0)


def rollout(student: Bound, cond: Condition, key, plan: RolloutPlan, steps, shape, clean=None) -> Rollout:
    """Generate clips of `shape` (batch, frame, height, width, channel) with `steps` (maybe traced, maybe one a chunk)
    steps a chunk. clean: latents of which the condition's given frames are taken.

    Chunk b takes min(steps, m_b) of its schedule's times: a truncated schedule, whose last time is where x0 is read
    off. Only that last step of every chunk is differentiable in the student's parameters; cached keys and values never
    are, so chunks are independent of each other in the gradient.
    """
    chunks, frames = student.chunks, shape[1]
    count, schedule, rule = chunks.count(frames), plan.schedule, plan.context
    noise_key, context_key = jax.random.split(key)
    # One full-clip noise a step, cut by frames: what a seed generates does not depend on the chunk pattern.
    noises = jnp.stack([jax.random.normal(k, shape) for k in jax.random.split(noise_key, schedule.most)])
    fresh = jax.random.normal(context_key, shape)
    table, longest = jnp.asarray(schedule.table(count)), jnp.asarray([schedule.most_steps(c) for c in range(count)])
    steps = jnp.broadcast_to(steps, (count,))
    # The prompt's keys and values are the same in every pass.
    heard, solver = student.frozen().prompted(cond), Few(schedule)

    def body(cache, chunk, xs):
        z, fresh, beside = jnp.moveaxis(xs[0], (0, 1), (2, 0)), jnp.moveaxis(xs[1], 0, 1), _frames_first(xs[2])
        here = Condition(cond.prompt, beside["frames"], beside.get("given"))
        given = None if here.given is None else Given(here.given, beside["clean"])
        prompted = heard.on(here.frames, here.given)
        times, m = table[chunk], longest[chunk]
        n = jnp.minimum(steps[chunk], m)

        x = z[0] if given is None else given.hold(z[0])
        # Step k re-noises with draw k + 1; a single step never does.
        course = Course(times, z[1:] if schedule.most > 1 else z)
        x = jax.lax.stop_gradient(denoise(prompted, solver, x, course, n - 1, cache, chunk, given))
        t = times[n - 1]
        x0 = last_step(student, x, t, here, cache, chunk, given)

        # What later chunks will see of this one.
        seen, t_seen = jax.lax.stop_gradient(x0), jnp.zeros_like(t)
        if rule.noisy:
            full, t_full = n == m, times[m - 1]
            noisy = jnp.where(full, x, flow.interpolate(seen, fresh, t_full))
            use = chunk >= rule.start
            seen, t_seen = jnp.where(use, noisy, seen), jnp.where(use, t_full, 0.0)
            seen = seen if given is None else given.hold(seen)
        cache = prompted.write(seen, frame_times(t_seen, x.shape[1], given), cache, chunk)[1]
        return cache, (_frames_first(x0), _frames_first(x), jnp.full(x.shape[1], t))

    beside: dict[str, Any] = {"frames": cond.frames}
    if cond.given is not None:
        beside |= {"given": cond.given, "clean": clean}
    xs = (jnp.moveaxis(noises, 2, 0), _frames_first(fresh), _frames_first(beside))
    cache, (samples, inputs, times) = over_chunks(chunks, frames, body, heard.cache(shape[0], shape[1:4]), xs)
    return Rollout(_frames_first(samples), _frames_first(inputs), times, cache)


def frozen_rollout(student: Bound, *arguments, gather_once: bool = True, **named) -> Rollout:
    """`rollout` without gradients, by the network in its fastest form for that (`Network.for_inference`)."""
    return rollout(student.for_inference(gather_once=gather_once), *arguments, **named)


def replay(student: Bound, cond: Condition, done: Rollout, target, weights, *, at_once: bool = False, clean=None):
    """Σ_b weights_b·Σ(x0_b − target)² and its gradient, from the chunks' last steps (spec causal_rcm 4.5, replayed).

    Equal to differentiating the rollout, since its chunks are gradient-independent, with the memory of one chunk; or
    `at_once`, with all chunks in one pass against the rollout's cache: faster, with the activations of a whole clip.
    Returns (squared error per sample `[batch]`, gradient). A sample of weight zero contributes nothing, given frames
    neither.
    """
    keep, chunks = weights > 0, student.chunks

    def gradient(x, goal, times, here: Condition, clean, chunk=None):
        given = None if here.given is None else Given(here.given, clean)

        def loss(params):
            x0 = last_step(student.replace(params=params), x, times, here, done.cache, chunk, given)
            error = jnp.square(x0 - goal)
            error = error if given is None else jnp.where(flow.expand(given.frames, error), 0.0, error)
            error = jnp.sum(error, tuple(range(1, x0.ndim)))
            return jnp.sum(jnp.where(keep, weights * error, 0.0)), error

        grads, error = jax.grad(loss, has_aux=True)(student.params)
        return error, grads

    if at_once:
        return gradient(done.inputs, target, done.times, cond, clean)

    def body(carry, chunk, xs):
        x, goal, beside = _frames_first((xs[0], xs[1], xs[3]))
        here = Condition(cond.prompt, beside["frames"], beside.get("given"))
        found = gradient(x, goal, xs[2][0], here, beside.get("clean"), chunk)
        return jax.tree.map(lambda total, part: total + part.astype(total.dtype), carry, found), jnp.zeros(len(xs[2]))

    def wide(p):
        """Sums over chunks in float32: narrower ones would lose the small chunks' share."""
        return jnp.zeros(p.shape, jnp.promote_types(p.dtype, jnp.float32))

    beside: dict[str, Any] = {"frames": cond.frames}
    if cond.given is not None:
        beside |= {"given": cond.given, "clean": clean}
    zero = jnp.zeros(target.shape[0], target.dtype), jax.tree.map(wide, student.params)
    xs = _frames_first(done.inputs), _frames_first(target), done.times, _frames_first(beside)
    return over_chunks(chunks, target.shape[1], body, zero, xs)[0]
