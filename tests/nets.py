"""What a network has beside its velocity, at its simplest: with it, a test's own network is a whole `Network`."""

import jax
import jax.numpy as jnp

from crcm_jax import flow
from crcm_jax.models.base import OnCache, Prepared


class Simple:
    """Everything of the protocol that a network with neither prompt nor cache has no use for."""

    chunks, rules, heads = None, (), (1, 1)

    def init(self, key):
        return {}

    def condition(self, params, cond, *, many=True):
        return Prepared(cond.prompt, cond.frames, cond.given)

    def cache(self, batch, shape, policy=None, storage=None):
        raise NotImplementedError

    def write(self, params, x, t, prepared, cache, chunk):
        raise NotImplementedError

    def features(self, params, x, t, prepared, layers):
        raise NotImplementedError

    def for_inference(self, params, *, gather_once=True):
        return self, params


def put(cache, chunks, x, t, chunk):
    """A cache of frames and times, `{"x": …, "t": …}`, with those of a chunk in it."""
    new = {"x": x, "t": jnp.broadcast_to(t, x.shape[:2])}
    start = chunks.start(chunk)
    return {n: jax.lax.dynamic_update_slice_in_dim(cache[n], new[n].astype(cache[n].dtype), start, 1) for n in new}


class Memory(Simple):
    """A network whose cache is what it was given: frames and times. v = a·x + b·t + c·(mean of earlier frames)."""

    def __init__(self, chunks, shape):
        self.chunks, self.shape = chunks, shape

    def cache(self, batch, shape, policy=None, storage=None):
        return {"x": jnp.zeros((batch, *self.shape[1:])), "t": jnp.full((batch, self.shape[1]), -1.0)}

    def velocity(self, params, x, t, prepared, view):
        frames = self.shape[1]
        earlier = jnp.arange(frames) < self.chunks.start(view.chunk)
        past = jnp.sum(view.cache["x"] * flow.expand(earlier[None], x), 1, keepdims=True) / frames
        return params["a"] * x + params["b"] * flow.expand(t, x) + params["c"] * past

    def write(self, params, x, t, prepared, cache, chunk):
        v = self.velocity(params, x, t, prepared, OnCache(cache, chunk))
        return v, put(cache, self.chunks, x, t, chunk)
