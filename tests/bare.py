"""A network that has what `models.base.Network` names and nothing else: whoever asks for more of one fails with it.

Every frame says something to every later one, by where it stands, by its action and by its time; prompts are trees of
integers, of any length. The views of context are one function, written once over whole clips.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import tiny

from crcm_jax import flow
from crcm_jax.chunks import ChunkPattern
from crcm_jax.models.base import ITSELF, Condition, OnCache, Prepared, TeacherForcing

FRAMES, CHANNELS, WIDTH, ACTIONS, WORDS, STYLES = 5, 3, 4, 2, 6, 3
PATTERN = ChunkPattern(1, 2)
SHAPE = (3, FRAMES, 2, 2, CHANNELS)
SIZES = {
    **{"x": (CHANNELS, WIDTH), "t": (WIDTH,), "actions": (ACTIONS, WIDTH), "words": (WORDS, WIDTH)},
    **{"styles": (STYLES, WIDTH), "key_x": (CHANNELS, WIDTH), "key_t": (WIDTH,), "key_actions": (ACTIONS, WIDTH)},
    **{"memory": (WIDTH, WIDTH), "out": (WIDTH, CHANNELS)},
}


@dataclasses.dataclass(frozen=True)
class Bare:
    """v = out·tanh(x + t + action + prompt + memory·Σ_seen frames w(place)·tanh(key of the frame))."""

    chunks: ChunkPattern | None = None

    rules = ()
    heads = (1, 1)

    def init(self, key):
        keys = jax.random.split(key, len(SIZES))
        return {name: jax.random.normal(k, size) for k, (name, size) in zip(keys, SIZES.items())}

    def condition(self, params, cond: Condition, *, many=True):
        if set(cond.prompt) != {"words", "style"} or set(cond.frames) != {"actions"}:
            raise ValueError(f"no condition of this family: {sorted(cond.prompt)}, {sorted(cond.frames)}")
        words = jnp.mean(jnp.take(params["words"], cond.prompt["words"], 0), 1)
        return Prepared({"heard": words + jnp.take(params["styles"], cond.prompt["style"], 0)}, cond.frames, cond.given)

    def velocity(self, params, x, t, prepared, view=ITSELF):
        own = _keys(params, x, t, prepared)
        if isinstance(view, OnCache) and view.chunk is not None:
            place = jnp.arange(view.cache.shape[1])
            start = self.chunks.start(view.chunk)
            earlier = _sum(view.cache, _weights(place) * (place < start))
            return _out(
                params, x, t, prepared, (earlier + _sum(own, _weights(start + jnp.arange(x.shape[1]))))[:, None]
            )
        place = jnp.arange(x.shape[1])
        chunk = jnp.zeros_like(place) if self.chunks is None else jnp.asarray(self.chunks.index(x.shape[1]))
        before = own
        if isinstance(view, TeacherForcing):
            before = _keys(params, view.context, view.times, prepared)
        elif isinstance(view, OnCache):
            before = view.cache
        earlier, same = chunk[:, None] > chunk, chunk[:, None] == chunk
        seen = [_sum(before, _weights(place) * e) + _sum(own, _weights(place) * s) for e, s in zip(earlier, same)]
        return _out(params, x, t, prepared, jnp.stack(seen, 1))

    def write(self, params, x, t, prepared, cache, chunk):
        v = self.velocity(params, x, t, prepared, OnCache(cache, chunk))
        keys = _keys(params, x, t, prepared)
        return v, jax.lax.dynamic_update_slice_in_dim(cache, keys.astype(cache.dtype), self.chunks.start(chunk), 1)

    def cache(self, batch, shape, policy=None, storage=None):
        return jnp.zeros((batch, *shape, WIDTH))

    def features(self, params, x, t, prepared, layers):
        return [_keys(params, x, t, prepared) for _ in layers]

    def for_inference(self, params, *, gather_once=True):
        return self, params


def _weights(place):
    return 1.0 + 0.5 * jnp.cos(2.0 * place)


def _sum(keys, weights):
    """Over frames."""
    return jnp.einsum("bfhwc,f->bhwc", keys, weights.astype(keys.dtype)) / FRAMES


def _keys(params, x, t, prepared):
    """What each frame says to those that see it, `[batch, frame, height, width, WIDTH]`."""
    actions = prepared.frames["actions"] @ params["key_actions"]
    return jnp.tanh(x @ params["key_x"] + flow.expand(t, x) * params["key_t"] + actions[:, :, None, None])


def _out(params, x, t, prepared, memory):
    actions = prepared.frames["actions"] @ params["actions"]
    hidden = x @ params["x"] + flow.expand(t, x) * params["t"] + actions[:, :, None, None]
    hidden = hidden + prepared.prompt["heard"][:, None, None, None] + memory @ params["memory"]
    return jnp.tanh(hidden) @ params["out"]


def parameters(seed, dtype="float32"):
    """Random ones, of about unit gain."""
    return {
        name: tiny.normal(100 * seed + i, *size, dtype=dtype) / size[0] ** 0.5
        for i, (name, size) in enumerate(SIZES.items())
    }


def prompt(seed, batch=SHAPE[0], words=4):
    """A tree of integers."""
    rng = np.random.default_rng(seed)
    return {
        "words": rng.integers(0, WORDS, (batch, words), dtype="int32"),
        "style": rng.integers(0, STYLES, batch, dtype="int32"),
    }


def actions(seed, frames=FRAMES, dtype="float32"):
    """What accompanies each frame of a batch."""
    return {"actions": tiny.normal(seed, SHAPE[0], frames, ACTIONS, dtype=dtype)}


def batch(seed=0, dtype="float32", **more):
    """A training batch; more: `given`."""
    return {
        "latents": tiny.normal(seed, *SHAPE, dtype=dtype), "prompt": prompt(seed + 1), **more,
        "frames": actions(seed + 2, dtype=dtype),
    }  # fmt: skip


def negative(words=4) -> Condition:
    """A negative prompt, of one row."""
    return Condition(prompt(9, 1, words))


def one_by_one(velocity, initial, fresh, times, see, held=None, first=None):
    """Few steps a chunk in Python loops, by whole clips under the causal mask and without a cache: the clip.

    velocity: (clip, times `[batch, frame]`) → of the clip. initial: where chunks start. fresh: `[step, …]`, what step i
    re-noises with. times: of each chunk. see: (chunk, input and time of its last step, x0) → what later chunks see, and
    at which time. held: (given frames, clean latents). first: (latents that the clip starts with as they are, as they
    are seen, their time).
    """
    spans, begin = PATTERN.spans(FRAMES), 0
    # Later frames are nonsense: the mask must hide them.
    seen, seen_t, clip = np.full(SHAPE, 50.0), np.zeros(SHAPE[:2]), np.zeros(SHAPE)
    given, clean = held or (np.zeros(SHAPE[:2], bool), np.zeros(SHAPE))

    def hold(x, t, span):
        where = given[:, span]
        return np.where(wide(where), clean[:, span], x), np.where(where, 0.0, t)

    if first is not None:
        begin = first[0].shape[1]
        clip[:, :begin], seen[:, :begin], seen_t[:, :begin] = first
    for chunk, span in enumerate(spans):
        if span.start < begin:
            continue
        x0, draws = initial[:, span], fresh[:, :, span]
        for i, t in enumerate(times[chunk]):
            x = x0 if not i else (1 - t) * x0 + t * draws[i - 1]
            x, t_x = hold(x, t, span)
            seen[:, span], seen_t[:, span] = x, t_x
            v = np.asarray(velocity(seen, seen_t), np.float64)[:, span]
            x0, _ = hold(x - wide(t_x) * v, 0.0, span)
        clip[:, span] = x0
        seen[:, span], seen_t[:, span] = hold(*see(chunk, x, t, x0), span)
    return clip


def slow_rollout(model, cond, key, plan, steps, held=None):
    """`sampling.rollout.rollout`'s samples, `one_by_one` from the same draws."""
    schedule, rule = plan.schedule, plan.context
    noise_key, context_key = jax.random.split(key)
    noises = np.stack([jax.random.normal(k, SHAPE) for k in jax.random.split(noise_key, schedule.most)])
    fresh = np.asarray(jax.random.normal(context_key, SHAPE))
    times = [schedule.times(c)[:steps] for c in range(PATTERN.count(FRAMES))]

    def see(chunk, x, t, x0):
        if not rule.noisy_at(chunk):
            return x0, 0.0
        full = schedule.times(chunk)[-1]
        return (x if t == full else (1 - full) * x0 + full * fresh[:, PATTERN.span(chunk)]), full

    return one_by_one(lambda x, t: model.velocity(x, t, cond), noises[0], noises[1:], times, see, held)


def wide(frames):
    """`[batch, frame]` over latents."""
    return np.asarray(frames)[:, :, None, None, None]
