"""Output and log-sum-exp, and in the same pass their tangents: one softmax that is corrected as keys come in."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.attention.mosaic_tpu import plan as plans
from pallas_kernels.attention.mosaic_tpu import tiles as t
from pallas_kernels.attention.mosaic_tpu.blocks import Blocks

NAME = "forward"


def forward(q, segments, scale, chip, blocks: Blocks):
    """o `[B, N, H, D]` and lse `[B, H, N]`."""
    batch, queries, heads, dim = q.shape
    groups = heads // segments[0].k.shape[2]
    plan = plans.by_queries(segments, queries, blocks.q, blocks.k)

    def at_queries(b, h, step, codes, *_):
        return b, h, codes[step] >> plans.OUTER_SHIFT

    def at_keys(segment):
        return lambda b, h, step, codes, *tiles: (b, lax.div(h, groups), tiles[segment][step])

    in_specs = [t.rows_spec(4 * len(segments), blocks.q, at_queries), t.spec(blocks.q, dim, at_queries)]
    inputs = [t.all_rows(segments, queries), t.view(q)]
    for number, segment in enumerate(segments):
        in_specs += [t.spec(blocks.k, dim, at_keys(number))] * 2
        inputs += [t.view(segment.k), t.view(segment.v)]
    kernel = functools.partial(
        _kernel, kinds=plan.kinds, lengths=[s.k.shape[1] for s in segments], scale=scale * t.LOG2E
    )
    o, lse = t.call(
        kernel,
        chip,
        plan,
        (batch, heads, plan.count),
        in_specs,
        [t.spec(blocks.q, dim, at_queries), t.vector_spec(blocks.q, at_queries)],
        [t.viewed(q.shape, q.dtype), jax.ShapeDtypeStruct((batch, heads, 1, queries), jnp.float32)],
        [(1, blocks.q), (1, blocks.q), (dim, blocks.q)],
        inputs,
        NAME,
    )
    return t.unview(o, dim), lse[:, :, 0]


def _kernel(codes, *refs, kinds, lengths, scale):
    tiles, refs = refs[: len(lengths)], refs[len(lengths) :]
    rows, q, *keys = refs[: 2 + 2 * len(lengths)]
    o, lse, top, total, acc = refs[2 + 2 * len(lengths) :]
    step = pl.program_id(2)
    code = codes[step]

    @pl.when(t.has(code, plans.FIRST))
    def _():
        top[...] = jnp.full_like(top, -jnp.inf)
        total[...] = jnp.zeros_like(total)
        acc[...] = jnp.zeros_like(acc)

    def visit(segment, masked):
        k, v = keys[2 * segment][...], keys[2 * segment + 1][...]
        scores = t.dot_nt(k, q[...]) * scale
        if masked:
            tile = tiles[segment][step]
            seen = t.seen_by(rows[4 * segment : 4 * segment + 4], tile, scores.shape)
            scores = jnp.where(seen, scores, -jnp.inf)
            v = t.without_tail(v, tile, lengths[segment])
        old = top[...]
        new = jnp.maximum(old, scores.max(axis=0, keepdims=True))
        base = jnp.where(new == -jnp.inf, 0.0, new) if masked else new
        weights = jnp.exp2(scores - base)
        fade = jnp.exp2(old - base)
        top[...] = new
        total[...] = total[...] * fade + weights.sum(axis=0, keepdims=True)
        acc[...] = acc[...] * fade + t.dot_tn(v, weights)

    t.for_each_kind(kinds, code, visit)

    @pl.when(t.has(code, plans.LAST))
    def _():
        none = total[...] == 0
        safe = jnp.where(none, 1.0, total[...])
        o[...] = (acc[...] / safe).T.astype(o.dtype)
        lse[...] = jnp.where(none, -jnp.inf, (top[...] + jnp.log2(safe)) / t.LOG2E)
