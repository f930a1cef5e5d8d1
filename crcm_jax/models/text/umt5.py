"""The UMT5 text encoder (spec wan21 3).

A T5 encoder with its own table of relative positions in every layer: pre-norm attention without 1/√d and without
biases, then a gated GELU. Layers are stacked and scanned.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from crcm_jax.models.base import Params
from crcm_jax.models.core.declare import Declared
from crcm_jax.models.published import PARTS
from crcm_jax.models.wan.layers import RmsNorm, gelu


@dataclasses.dataclass(frozen=True)
class UMT5Config:
    """A UMT5 encoder; `UMT5Config.xxl()` is the one that Wan was trained with.

    buckets: rows of a relative-position table, half for keys at or before the query, half for keys after it.
    max_distance: tokens from which on all distances share the last bucket.
    dtype: compute dtype; norms and softmax run in at least float32.
    """

    vocabulary: int
    dim: int
    heads: int
    head_dim: int
    ffn_dim: int
    layers: int
    buckets: int = 32
    max_distance: int = 128
    eps: float = 1e-6
    dtype: str = "bfloat16"

    def __post_init__(self):
        if self.buckets % 4 or self.max_distance <= self.buckets // 4:
            raise ValueError(
                f"text.buckets {self.buckets} must be a multiple of 4, and text.max_distance {self.max_distance} "
                f"more than a quarter of it"
            )
        jnp.dtype(self.dtype)

    @classmethod
    def xxl(cls, **changes) -> UMT5Config:
        return cls(**{**PARTS["umt5-xxl"].fields, **changes})


def relative_buckets(length: int, buckets: int, max_distance: int) -> np.ndarray:
    """Row of the relative-position table for every (query, key), `[length, length]` int32.

    Distances below a quarter of the buckets have a row each, longer ones share rows on a logarithmic scale. Worked out
    in float32, as the published models were trained: float64 would put some distances on the other side of an edge.
    """
    offset = np.arange(length)[None, :] - np.arange(length)[:, None]
    half, exact = buckets // 2, buckets // 4
    distance = np.abs(offset)
    ratio = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact))
    far = exact + (ratio / np.float32(math.log(max_distance / exact)) * np.float32(half - exact)).astype(np.int32)
    rows = np.where(distance < exact, distance, np.minimum(far, half - 1))
    return (rows + np.where(offset > 0, half, 0)).astype(np.int32)


class Linear(nnx.Module):
    """y = x·kernel, kernel `[in, out]`."""

    def __init__(self, inputs: int, outputs: int, dtype, rngs: nnx.Rngs):
        self.kernel = nnx.Param(nnx.initializers.lecun_normal()(rngs.params(), (inputs, outputs), jnp.float32))
        self.dtype = dtype

    def __call__(self, x):
        return jnp.dot(x, self.kernel[...].astype(self.dtype), precision=_precision(self.dtype))


class Attention(nnx.Module):
    """Unscaled dot-product attention with a bias for relative position; position `[bucket, head]`."""

    def __init__(self, c: UMT5Config, rngs: nnx.Rngs):
        width, dtype = c.heads * c.head_dim, jnp.dtype(c.dtype)
        self.q, self.k, self.v = (Linear(c.dim, width, dtype, rngs) for _ in range(3))
        self.o = Linear(width, c.dim, dtype, rngs)
        self.position = nnx.Param(nnx.initializers.normal(0.02)(rngs.params(), (c.buckets, c.heads), jnp.float32))
        self.config = c

    def __call__(self, x, mask):
        c = self.config
        dtype, length = jnp.dtype(c.dtype), x.shape[1]
        wide, precision = jnp.promote_types(dtype, jnp.float32), _precision(dtype)
        q, k, v = (f(x).reshape(*x.shape[:2], c.heads, c.head_dim) for f in (self.q, self.k, self.v))
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=wide, precision=precision)
        rows = relative_buckets(length, c.buckets, c.max_distance)
        scores = scores + self.position[...].astype(wide)[rows].transpose(2, 0, 1)
        scores = jnp.where(mask[:, None, None, :], scores, jnp.finfo(wide).min)
        weights = jax.nn.softmax(scores, -1).astype(dtype)
        return self.o(jnp.einsum("bhqk,bkhd->bqhd", weights, v, precision=precision).reshape(*x.shape[:2], -1))


class FeedForward(nnx.Module):
    """down(up(x) ∘ gelu(gate(x)))."""

    def __init__(self, c: UMT5Config, rngs: nnx.Rngs):
        dtype = jnp.dtype(c.dtype)
        self.gate, self.up = (Linear(c.dim, c.ffn_dim, dtype, rngs) for _ in range(2))
        self.down = Linear(c.ffn_dim, c.dim, dtype, rngs)

    def __call__(self, x):
        return self.down(self.up(x) * gelu(self.gate(x)))


class Layer(nnx.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x))."""

    def __init__(self, c: UMT5Config, rngs: nnx.Rngs):
        dtype = jnp.dtype(c.dtype)
        self.norm1, self.norm2 = RmsNorm(c.dim, c.eps, dtype), RmsNorm(c.dim, c.eps, dtype)
        self.attention, self.ffn = Attention(c, rngs), FeedForward(c, rngs)

    def __call__(self, x, mask):
        x = x + self.attention(self.norm1(x), mask)
        return x + self.ffn(self.norm2(x))


def _precision(dtype):
    # Float32 means float32 here: on GPUs and TPUs the default would round the factors to 10 or 8 bits.
    return jax.lax.Precision.HIGHEST if dtype.itemsize >= 4 else None


@dataclasses.dataclass(frozen=True)
class UMT5Encoder:
    """The encoder of `config`.

    Parameters are `{"embedding": [token, channel], "layers": …, "norm": …}`, layers stacked on their leading axis.
    """

    config: UMT5Config

    @functools.cached_property
    def _layer(self) -> Declared:
        return Declared(lambda rngs: Layer(self.config, rngs))

    @functools.cached_property
    def _norm(self) -> Declared:
        c = self.config
        return Declared(lambda rngs: RmsNorm(c.dim, c.eps, jnp.dtype(c.dtype)))

    def init(self, key: jax.Array) -> Params:
        """Random parameters, float32."""
        c = self.config
        first, second = jax.random.split(key)
        return {
            "embedding": jax.random.normal(first, (c.vocabulary, c.dim)),
            "layers": jax.vmap(self._layer.init)(jax.random.split(second, c.layers)),
            "norm": {"scale": jnp.ones(c.dim)},
        }

    @functools.partial(jax.jit, static_argnames="self")
    def __call__(self, params: Params, ids: jax.Array, mask: jax.Array) -> jax.Array:
        """Embeddings `[batch, token, channel]`, zero where `mask` is False.

        ids: `[batch, token]` integers; mask: `[batch, token]`, True for tokens of the prompt (padding is not attended).
        """
        mask = mask.astype(bool)

        def step(x, params):
            return self._layer.bind(params)(x, mask), None

        x = jnp.take(params["embedding"], ids, axis=0).astype(self.config.dtype)
        x, _ = jax.lax.scan(step, x, params["layers"])
        return jnp.where(mask[..., None], self._norm.bind(params["norm"])(x), 0)
