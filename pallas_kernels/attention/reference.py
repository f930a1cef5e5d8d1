"""Plain attention: every score at once, differentiated by JAX itself to any order. O(N·M) memory.

Two uses: what the other backends are compared with (in float64), and the fastest way for small sequences on a CPU.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.attention import rows as visibility
from pallas_kernels.attention.backend import Segment


def attend(q, segments: tuple[Segment, ...], scale: float):
    """Returns o `[B, N, H, D]` in q's dtype and lse `[B, H, N]`, float32 or wider."""
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    batch, queries, heads, dim = q.shape
    kv_heads = segments[0].k.shape[2]
    grouped = (q.astype(dtype) * scale).reshape(batch, queries, kv_heads, heads // kv_heads, dim)
    scores = [_scores(grouped, segment) for segment in segments]
    top = functools.reduce(jnp.maximum, (s.max(axis=-1, initial=-jnp.inf) for s in scores))
    top = lax.stop_gradient(jnp.where(jnp.isfinite(top), top, 0))  # any constant serves: it cancels
    weights = [jnp.exp(s - top[..., None]) for s in scores]
    total = sum(w.sum(axis=-1) for w in weights)
    safe = jnp.where(total == 0, 1, total)
    out = sum(_dot("bhgqk,bkhd->bhgqd", w, segment.v.astype(dtype)) for w, segment in zip(weights, segments))
    out = out / safe[..., None]
    lse = jnp.where(total == 0, -jnp.inf, top + jnp.log(safe))
    out = out.transpose(0, 3, 1, 2, 4).reshape(q.shape).astype(q.dtype)
    return out, lse.reshape(batch, heads, queries)


def attend_by_rows(q, segments: tuple[Segment, ...], scale: float, block: int = 128):
    """The same for `block` queries at a time, each recomputed when differentiated: O(block·M) memory, every order."""
    queries = q.shape[1]
    if queries <= block:
        return attend(q, segments, scale)
    pad = -queries % block
    q_blocks = jnp.pad(q, ((0, 0), (0, pad), (0, 0), (0, 0)))
    q_blocks = q_blocks.reshape(q.shape[0], -1, block, *q.shape[2:]).swapaxes(0, 1)

    def row_blocks(rows):
        rows = jnp.pad(jnp.asarray(rows), ((0, 0),) * (rows.ndim - 1) + ((0, pad),))
        return jnp.moveaxis(rows.reshape(*rows.shape[:-1], -1, block), -2, 0)

    rows = [None if s.rows is None else row_blocks(s.rows) for s in segments]

    @jax.checkpoint
    def one(xs):
        q_block, row_block = xs
        return attend(q_block, tuple(s._replace(rows=r) for s, r in zip(segments, row_block)), scale)

    out, lse = lax.map(one, (q_blocks, rows))
    out = out.swapaxes(0, 1).reshape(q.shape[0], -1, *q.shape[2:])[:, :queries]
    return out, jnp.moveaxis(lse, 0, 2).reshape(q.shape[0], q.shape[2], -1)[..., :queries]


def _scores(grouped, segment):
    scores = _dot("bqhgd,bkhd->bhgqk", grouped, segment.k.astype(grouped.dtype))
    if segment.rows is None:
        return scores
    seen = visibility.membership(jnp.asarray(segment.rows), jnp.arange(segment.k.shape[1], dtype=jnp.int32))
    return jnp.where(seen, scores, -jnp.inf)


def _dot(subscripts, a, b):
    return jnp.einsum(subscripts, a, b, precision=lax.Precision.HIGHEST)
