"""The streaming sampler: one chunk after another, each seeing the cache of those before it.

See spec causal_rcm 6.2 (few steps), spec causal_rcm 6.3 (many steps), spec causal_rcm 6.5 (a given first frame).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from crcm_jax import compiler, flow
from crcm_jax.chunks import ChunkPattern
from crcm_jax.models.base import Condition, Network
from crcm_jax.models.guidance import combine
from crcm_jax.sampling.schedule import StepPlan, multi_step


@dataclasses.dataclass(frozen=True)
class Few:
    """A distilled student: jump to x0, re-noise to the next time (spec causal_rcm 6.2)."""

    plan: StepPlan = StepPlan()
    sigma_max: float = 1600.0

    def times(self, chunk: int) -> tuple[float, ...]:
        """The times of generated chunk `chunk`, ending in 0."""
        return (self.sigma_max / (self.sigma_max + 1), *self.plan.schedule(chunk)[1:], 0.0)

    @property
    def most(self) -> int:
        """Most steps of any chunk."""
        return self.plan.steps[0]


@dataclasses.dataclass(frozen=True)
class Ode:
    """A diffusion model: Euler steps along its probability-flow ODE (spec causal_rcm 6.3)."""

    steps: int = 50
    shift: float = 3.0
    sigma_max: float = 1600.0
    plan: StepPlan = StepPlan()
    """Only its context fields are read."""

    def times(self, chunk: int) -> tuple[float, ...]:
        """The times of every chunk, ending in 0."""
        return multi_step(self.steps, self.shift, self.sigma_max)

    @property
    def most(self) -> int:
        """Steps of every chunk."""
        return self.steps


class Noise(NamedTuple):
    """All the randomness of one clip, so that the same noise can drive several samplers."""

    initial: jax.Array
    """`[batch, frame, height, width, channel]`; one frame fewer for image-to-video."""
    steps: jax.Array
    """`[step, batch, frame, …]`: full clips, cut by absolute frame index."""
    image: jax.Array
    """Noise for a noised first frame, `[batch, 1, …]`."""


def draw_noise(key, shape, steps: int, image: bool = False) -> Noise:
    """Noise for clips of `shape` with up to `steps` re-noised steps. More steps leave the earlier draws as they are."""
    initial, step, frame = jax.random.split(key, 3)
    batch, frames, *rest = shape
    draws = [jax.random.normal(jax.random.fold_in(step, k), shape) for k in range(steps)]
    return Noise(
        jax.random.normal(initial, (batch, frames - image, *rest)),
        jnp.stack(draws) if draws else jnp.zeros((0, *shape)),
        jax.random.normal(frame, (batch, 1, *rest)),
    )


def stream(
    network: Network, params, cond: Condition, key, *, shape: tuple[int, ...], chunks: ChunkPattern, solver: Few | Ode,
    uncond: Condition | None = None, guidance: float = 1.0, image=None, noise: Noise | None = None,
) -> Iterator[jax.Array]:  # fmt: skip
    """Yield each chunk's latents `[batch, chunk frame, height, width, channel]` as soon as it is ready.

    shape: the clip's latents (batch, frame, height, width, channel).
    guidance: above 1, with `uncond`, two branches with a cache each; students carry their guidance within.
    image: latents `[batch, 1, …]` of a first frame (image-to-video): it is yielded first, as chunk 0 of a pattern whose
        first chunk is one frame. Schedules count generated chunks, the noisy context's start counts all
        (spec causal_rcm 6.5).
    ValueError for a clip that does not split into chunks, or an image with another pattern.
    """
    count = chunks.count(shape[1])
    if image is not None and chunks.first != 1:
        raise ValueError(f"image-to-video needs a first chunk of one frame, not {chunks.first}: set chunks.first = 1")
    few = isinstance(solver, Few)
    noise = noise or draw_noise(key, shape, solver.most if few else 0, image is not None)
    guided = guidance > 1 and uncond is not None
    if guided:
        cond = jax.tree.map(lambda c, u: jnp.concatenate([c, jnp.broadcast_to(u, c.shape)]), cond, uncond)
    if hasattr(network, "prepare"):
        cond = _prepared(network, params, cond)
    cache = network.init_cache(shape[0] * (1 + guided), shape[1:4])
    plan = solver.plan

    def row(generated: int):
        times = solver.times(generated)
        return jnp.asarray(np.pad(times, (0, solver.most + 1 - len(times)), mode="edge"), jnp.float32), len(times) - 1

    begin = 0
    if image is not None:
        times, n = row(0)
        t = times[n - 1] if plan.noisy_context and plan.context_start == 0 else jnp.zeros(())
        cache = _append(network, guided, params, flow.interpolate(image, noise.image, t), t, cond, cache)
        begin = 1
        yield image
    for chunk in range(begin, count):
        span = chunks.span(chunk)
        x = noise.initial[:, span.start - begin : span.stop - begin]
        times, n = row(chunk - begin)
        noisy = plan.noisy_context and chunk >= plan.context_start
        z = noise.steps[:, :, span]
        x, cache = _chunk(network, guided, few, noisy, guidance, params, x, z, times, n, cond, cache, chunk)
        yield x


def generate(network: Network, params, cond: Condition, key, **options) -> jax.Array:
    """The whole clip: the chunks of `stream`, concatenated in time."""
    return jnp.concatenate(list(stream(network, params, cond, key, **options)), 1)


def _jit(**options):
    """`jax.jit` with the options of the compiler, which are known only once there is a device."""

    def decorate(function):
        jitted = functools.cache(lambda: jax.jit(function, compiler_options=compiler.options(), **options))
        return functools.wraps(function)(lambda *args: jitted()(*args))

    return decorate


@_jit(static_argnums=(0, 1, 2, 3, 4), donate_argnums=(11,))
def _chunk(network, guided, few, noisy, guidance, params, x, z, times, n, cond, cache, chunk):
    """One chunk from noise to x0, and the cache with it; n of `times` are used, then 0."""

    def double(x):
        return jnp.concatenate([x, x]) if guided else x

    def merge(v):
        return combine(*jnp.split(v, 2), guidance) if guided else v

    def at(t):
        return jnp.broadcast_to(t, (1, x.shape[1]))

    def advance(i, x, v):
        if not few:
            return flow.euler(x, v, times[i], times[i + 1])
        x0 = flow.to_clean(x, v, times[i])
        return flow.interpolate(x0, z[i], times[i + 1])

    def step(i, x):
        return advance(i, x, merge(network.velocity(params, double(x), at(times[i]), cond, cache=cache, chunk=chunk)))

    x = jax.lax.fori_loop(0, n - noisy, step, x * times[0])
    if noisy:
        # The last denoising pass is also the one that later chunks will see.
        v, cache = network.velocity_and_append(params, double(x), at(times[n - 1]), cond, cache, chunk=chunk)
        return advance(n - 1, x, merge(v)), cache
    return x, network.append(params, double(x), at(0.0), cond, cache, chunk=chunk)


@_jit(static_argnums=0)
def _prepared(network, params, cond):
    """The condition with everything done to it that all chunks and steps would otherwise repeat."""
    return network.prepare(params, cond)


@_jit(static_argnums=(0, 1), donate_argnums=(6,))
def _append(network, guided, params, x, t, cond, cache):
    """The cache with a given first frame as chunk 0."""
    x = jnp.concatenate([x, x]) if guided else x
    return network.append(params, x, jnp.broadcast_to(t, (1, x.shape[1])), cond, cache, chunk=0)
