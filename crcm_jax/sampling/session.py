"""A session: a stream as a value that goes from chunk to chunk, of any length, and may hear another prompt on its way.

    session = Session(network, solver, batch=1, shape=(60, 104, 16), frames=21)
    state = session.start(params, cond, key)
    latents, state = session.step(params, state)

`stream`, long videos and live servers are these few functions. A state is a value: it can be saved, and `fork`ed to go
two ways from one. Chunk n draws its noise from `fold_in(key, n)`, so that what a session shows depends on its key,
its prompts and its frames alone (spec causal_rcm 6.2, 6.3, 6.5).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from crcm_jax import compiler, flow
from crcm_jax.cache import FULL, PLAIN, CachePolicy, Storage
from crcm_jax.chunks import ChunkPattern
from crcm_jax.models.base import Condition, Network, Params, Prepared
from crcm_jax.models.bound import Bound, Prompted
from crcm_jax.sampling.chunk import Course, denoise, frame_times
from crcm_jax.sampling.solvers import Solver


class ChunkNoise(NamedTuple):
    """All the randomness of one chunk. initial: `[batch, frame, …]`; steps: `[draw, batch, frame, …]`."""

    initial: jax.Array
    steps: jax.Array


class State(flax.struct.PyTreeNode):
    """Where a session stands.

    cache: of the chunks so far. prepared: its prompt, in one or two `branches`. key: of all its draws.
    wants: the names of what must accompany each chunk.
    chunk: the number of the next chunk in this scene, from 0. given: how many of the scene's chunks were given to it.
    count: chunks so far in all scenes, which choose the noise.
    """

    cache: tuple[Any, ...]
    prepared: tuple[Prepared, ...]
    key: jax.Array | None
    branches: int = flax.struct.field(pytree_node=False)
    wants: tuple[str, ...] = flax.struct.field(pytree_node=False, default=())
    chunk: int = flax.struct.field(pytree_node=False, default=0)
    given: int = flax.struct.field(pytree_node=False, default=0)
    count: int = flax.struct.field(pytree_node=False, default=0)


@dataclasses.dataclass(frozen=True)
class Session:
    """What stays the same while a session runs.

    batch: clips beside each other. shape: (height, width, channel) of latents. frames: latent frames of a scene, at
    most; where the policy forgets, a scene has no end, and `frames` is what is kept in view. guidance: above 1, with a
    negative prompt, each pass has two branches; students carry their guidance within.

    ValueError for a bidirectional network, and for frames that do not split into chunks.
    """

    network: Network
    solver: Solver
    batch: int
    shape: tuple[int, int, int]
    frames: int
    guidance: float = 1.0
    policy: CachePolicy = FULL
    storage: Storage = PLAIN

    def __post_init__(self):
        if self.network.chunks is None:
            raise ValueError("a bidirectional network cannot stream: give a causal one, or sample whole clips")
        self.policy.slots(self.network.chunks, self.frames)

    @property
    def chunks(self) -> ChunkPattern:
        """The network's own."""
        return Bound(self.network, None).chunks

    @property
    def limit(self) -> int | None:
        """How many chunks a scene may have; None for any number."""
        return self.policy.limit(self.chunks, self.policy.slots(self.chunks, self.frames))

    def start(
        self, params: Params, cond: Condition, key=None, *, uncond: Condition | None = None, first=None, noise=None
    ) -> State:
        """A session before its first chunk, or after those that are given to it.

        cond: what to show; its frames are those of the `first`, if the network wants any. uncond: the negative prompt.
        key: of all draws; None if each step is handed its noise. first: latents `[batch, frame, …]` of whole chunks
        that the video starts with (image-to-video, continuation). noise: `[batch, frame, …]` for them where later
        chunks see noisy ones. ValueError where `first` is no whole number of chunks.
        """
        chunks, given = self.chunks, 0 if first is None else self._count(first.shape[1])
        prompted = _prompted(Bound(self.network, params), cond.replace(given=None), uncond, guidance=self.guidance)
        prepared = tuple(p.replace(frames={}) for p in prompted.prepared)
        cache, wants = self._cache(prompted), tuple(sorted(cond.frames))
        state = State(cache, prepared, key, prompted.branches, wants, given=given)
        for chunk in range(given):
            span = chunks.span(chunk)
            x, t = first[:, span], jnp.zeros(())
            if self.solver.context.noisy_at(chunk):
                # A given chunk stands where a generated one's last pass would (spec causal_rcm 6.5).
                t = jnp.asarray(self.solver.times(0)[-2], jnp.float32)
                x = flow.interpolate(x, self._first_noise(state, noise, span, x), t)
            frames = cond.at(span).frames
            given_frames = jnp.ones(x.shape[:2], bool)
            cache = _commit(self._bind(params, state), x, t, frames, given_frames, cache=state.cache, chunk=chunk)
            state = state.replace(cache=cache, chunk=chunk + 1, count=chunk + 1)
        return state

    def step(
        self, params: Params, state: State, frames: dict[str, jax.Array] | None = None, noise: ChunkNoise | None = None
    ) -> tuple[jax.Array, State]:
        """(the next chunk's latents `[batch, frame, height, width, channel]`, the session after it).

        frames: what accompanies the chunk (actions, cameras), `[batch, frame, …]`. noise: drawn from the session's key
        where none is handed in. The state is used up: `fork` it before, to go on from it twice. ValueError, before
        anything is computed, beyond the end of what the cache holds.
        """
        limit = self.limit
        if limit is not None and state.chunk >= limit:
            raise ValueError(
                f"the session is at its end: its cache holds {limit} chunks; give it more frames, cut, or take a "
                "policy that forgets"
            )
        if noise is None and state.key is None:
            raise ValueError("the session has no key: start it with one, or hand each step its noise")
        frames = frames or {}
        if missing := sorted(set(state.wants) ^ set(frames)):
            raise ValueError(
                f"each step of this session takes frames {list(state.wants)}, and {list(frames)} came: {missing[0]!r} "
                "is in one of them only"
            )
        times = self.solver.times(state.chunk - state.given)
        row = np.pad(times, (0, self.solver.most + 1 - len(times)), mode="edge")
        latents, cache = _step(
            self._bind(params, state), noise, state.key, jnp.asarray(row, jnp.float32), len(times) - 1, frames,
            state.count, cache=state.cache, chunk=state.chunk, solver=self.solver,
            noisy=self.solver.context.noisy_at(state.chunk),
            shape=(self.batch, self.chunks.length(state.chunk), *self.shape),
        )  # fmt: skip
        return latents, state.replace(cache=cache, chunk=state.chunk + 1, count=state.count + 1)

    def switch(self, params: Params, state: State, cond: Condition, uncond: Condition | None = None) -> State:
        """The session with another prompt from here on; what it remembers stays as it was seen."""
        prompted = _prompted(Bound(self.network, params), cond, uncond, guidance=self.guidance)
        if (len(prompted.prepared), prompted.branches) != (len(state.prepared), state.branches):
            raise ValueError(
                "the new prompt comes with another negative prompt than the session began with: give one always, of "
                "the same kind, or never"
            )
        return state.replace(prepared=tuple(p.replace(frames={}) for p in prompted.prepared))

    def cut(self, params: Params, state: State) -> State:
        """The session at the start of a new scene: it remembers nothing, and goes on drawing where it was."""
        return state.replace(cache=self._cache(self._bind(params, state)), chunk=0, given=0)

    def _cache(self, prompted: Prompted) -> tuple[Any, ...]:
        height, width, _ = self.shape
        return prompted.cache(self.batch, (self.frames, height, width), self.policy, self.storage)

    def _bind(self, params: Params, state: State) -> Prompted:
        scale = self.guidance if state.branches > 1 else 1.0
        return Prompted(Bound(self.network, params), state.prepared, scale, state.branches)

    def _count(self, frames: int) -> int:
        """How many chunks so many frames are."""
        try:
            return self.chunks.count(frames)
        except ValueError as error:
            raise ValueError(f"{frames} given frames are no whole chunks: {error}") from error

    def _first_noise(self, state: State, noise, span: slice, x):
        if noise is not None:
            return noise[:, span]
        if state.key is None:
            raise ValueError("given chunks that are seen with noise need a key, or their noise")
        return jax.random.normal(jax.random.fold_in(state.key, state.count), x.shape)


def fork(state: State) -> State:
    """A second session from where one stands: steps use their state's cache up."""
    return state.replace(cache=jax.tree.map(lambda x: jnp.array(x, copy=True), state.cache))


def draw(key, chunk, shape: tuple[int, ...], draws: int) -> ChunkNoise:
    """The noise of chunk `chunk` `[batch, frame, …]`, with `draws` fresh ones: more leave the earlier as they are."""
    initial, steps = jax.random.split(jax.random.fold_in(key, chunk))
    fresh = [jax.random.normal(jax.random.fold_in(steps, k), shape) for k in range(draws)]
    return ChunkNoise(jax.random.normal(initial, shape), jnp.stack(fresh) if fresh else jnp.zeros((0, *shape)))


def _jit(**options):
    """`jax.jit` with the options of the compiler, which are known only once there is a device."""

    def decorate(function):
        jitted = functools.cache(lambda: jax.jit(function, compiler_options=compiler.options(), **options))
        return functools.wraps(function)(lambda *args, **named: jitted()(*args, **named))

    return decorate


@_jit(static_argnames=("solver", "noisy", "shape"), donate_argnames=("cache",))
def _step(prompted: Prompted, noise, key, times, n, frames, count, *, cache, chunk, solver: Solver, noisy, shape):
    """One chunk from noise to x0, and the cache with it; n of `times` are used, then 0.

    Many parameters, since they are a compiled program's: some are static, and the cache alone is given away.
    """
    x, z = draw(key, count, shape, solver.draws) if noise is None else noise
    prompted = prompted.on(frames)

    def at(t):
        return frame_times(t, x.shape[1])

    course = Course(times, z)
    x = denoise(prompted, solver, x * times[0], course, n - noisy, cache, chunk)
    if noisy:
        # The last denoising pass is also the one that later chunks will see.
        v, cache = prompted.write(x, at(times[n - 1]), cache, chunk)
        return solver.advance(n - 1, x, v, course), cache
    return x, prompted.write(x, at(0.0), cache, chunk)[1]


@_jit(static_argnames="guidance")
def _prompted(bound: Bound, cond, uncond, *, guidance: float) -> Prompted:
    """The prompt with everything done to it that all chunks and steps would otherwise repeat."""
    return bound.prompted(cond, uncond, guidance)


@_jit(donate_argnames="cache")
def _commit(prompted: Prompted, x, t, frames, given, *, cache, chunk):
    """The cache with a given chunk."""
    prompted = prompted.on(frames, given)
    return prompted.write(x, frame_times(t, x.shape[1]), cache, chunk)[1]
