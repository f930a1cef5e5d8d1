"""The arithmetic on one tile.

Scores are held transposed, keys × queries. Everything that belongs to a query (maximum, sum, log-sum-exp, intervals) is
then a row vector: reductions run down the sublanes, nothing is broadcast across lanes, and vectors are stored as they
are. Exponentials are powers of two, which is what the hardware computes.
"""

from __future__ import annotations

import math

import jax.numpy as jnp
from jax import lax

_LOG2E = math.log2(math.e)


def exp_scaled(x, scale: float):
    """exp(scale · x). Scores keep their own unit until their maximum is subtracted, which costs nothing and spares the
    largest of them, whose difference is exact, a rounding."""
    return jnp.exp2(x * (scale * _LOG2E))


def weights(k, q, lse, scale: float):
    """P = exp(S − lse) of a tile, keys × queries, lse `[1, queries]`; anything where a pair is invisible."""
    return exp_scaled(dot_nt(k, q) - lse * (1 / scale), scale)


def seen_by(rows, tile, shape):
    """Booleans `[keys, queries]` of a tile: rows `[4, queries]`, tile number, shape."""
    lo1, hi1, lo2, hi2 = (rows[i : i + 1] for i in range(4))
    key = tile * shape[0] + lax.broadcasted_iota(jnp.int32, shape, 0)
    return ((key >= lo1) & (key < hi1)) | ((key >= lo2) & (key < hi2))


def without_tail(x, tile, length: int):
    """A tile `[tokens, D]` with zeros beyond the array's end, where anything may be, not-a-number included."""
    block = x.shape[0]
    if length % block == 0:
        return x
    token = tile * block + lax.broadcasted_iota(jnp.int32, x.shape, 0)
    return jnp.where(token < length, x, jnp.zeros_like(x))


def before_end(tile, shape, queries: int):
    """Booleans `[keys, queries]`: is the query of a query tile one of `queries`?"""
    return tile * shape[1] + lax.broadcasted_iota(jnp.int32, shape, 1) < queries


def dot_nt(a, b):
    """a bᵀ in float32."""
    return _dot(a, b, ((1,), (1,)))


def dot_tn(a, b):
    """aᵀ b in float32; b is rounded to a's dtype."""
    return _dot(a, b.astype(a.dtype), ((0,), (0,)))


def dot_nn(a, b):
    """a b in float32; a is rounded to b's dtype."""
    return _dot(a.astype(b.dtype), b, ((1,), (0,)))


def _dot(a, b, contract):
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    return lax.dot_general(a, b, (contract, ((), ())), precision=precision, preferred_element_type=jnp.float32)
