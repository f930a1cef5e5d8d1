"""Tiled attention in pure XLA: O(N) memory on any device, and key tiles that no row may see cost nothing.

A loop over query blocks holds a loop over the key tiles that the block's rows may see, whose bounds are data; the loops
are written once, so a long sequence compiles as quickly as a short one. Derivatives are FlashAttention-2's backward and
the tangent from a saved log-sum-exp, over the same tiles.

Inside, everything is float32, or float64 for float64 inputs; probabilities are rounded to the inputs' dtype before they
multiply values, as fast kernels do.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from pallas_kernels.attention import rows as visibility
from pallas_kernels.attention.backend import Segment

BLOCK_Q = 256
BLOCK_K = 512


def unsupported(q, segments, scale):
    """Everything is supported."""
    return None


def forward(q, segments, scale):
    """See `backend`."""
    tiles = _Tiles(q, segments, scale)

    def block(q_block, lookups):
        def tile(carry, segment, seen, k, v):
            top, total, acc = carry
            scores = jnp.where(seen, tiles.scores(q_block, k), -jnp.inf)
            new = jnp.maximum(top, scores.max(axis=-1))
            base = jnp.where(jnp.isfinite(new), new, 0)
            weights = jnp.exp(scores - base[..., None])
            fade = jnp.exp(top - base)
            acc = acc * fade[..., None] + _dot("bhgqk,bhkd->bhgqd", weights.astype(v.dtype), v)
            return new, total * fade + weights.sum(axis=-1), acc

        shape = q_block.shape[:-1]
        zeros = jnp.zeros(shape, tiles.dtype)
        carry = (zeros - jnp.inf, zeros, jnp.zeros(q_block.shape, tiles.dtype))
        top, total, acc = tiles.visit(tile, carry, lookups)
        safe = jnp.where(total == 0, 1, total)
        return (acc / safe[..., None]).astype(q.dtype), jnp.where(total == 0, -jnp.inf, top + jnp.log(safe))

    _, (out, lse) = lax.scan(lambda _, xs: (None, block(*xs)), None, (tiles.q_blocks, tiles.lookups))
    return tiles.to_rows(out), tiles.to_vector(lse)


def tangent(q, segments, scale, o, lse, dq, dsegments):
    """See `backend`."""
    tiles = _Tiles(q, segments, scale)
    dkeys = [tuple(None if x is None else tiles.key_tiles(x) for x in pair) for pair in dsegments]

    def block(q_block, lookups, o_block, lse_block, dq_block):
        base = jnp.where(jnp.isfinite(lse_block), lse_block, 0)[..., None]

        def tile(carry, segment, seen, k, v, index):
            acc, mean = carry
            dk, dv = (None if x is None else x[index] for x in dkeys[segment])
            weights = jnp.where(seen, jnp.exp(tiles.scores(q_block, k) - base), 0)
            if dv is not None:
                acc = acc + _dot("bhgqk,bhkd->bhgqd", weights.astype(v.dtype), dv)
            dscores = [tiles.scores(a, b) for a, b in ((dq_block, k), (q_block, dk)) if a is not None and b is not None]
            if dscores:
                moved = weights * sum(dscores)
                acc = acc + _dot("bhgqk,bhkd->bhgqd", moved.astype(v.dtype), v)
                mean = mean + moved.sum(axis=-1)
            return acc, mean

        carry = (jnp.zeros(q_block.shape, tiles.dtype), jnp.zeros(q_block.shape[:-1], tiles.dtype))
        acc, mean = tiles.visit(tile, carry, lookups, with_index=True)
        return (acc - mean[..., None] * o_block.astype(tiles.dtype)).astype(q.dtype), mean

    xs = (tiles.q_blocks, tiles.lookups, tiles.query_blocks(o), tiles.vector_blocks(lse), tiles.query_blocks(dq))
    _, (out, mean) = lax.scan(lambda _, x: (None, block(*x)), None, xs)
    return tiles.to_rows(out), tiles.to_vector(mean)


def backward(q, segments, scale, o, lse, do, dlse, wanted):
    """See `backend`. Key and value gradients are summed over query blocks in order, so the result is deterministic."""
    tiles = _Tiles(q, segments, scale)
    want_q, want_segments = wanted
    delta = (do.astype(tiles.dtype) * o.astype(tiles.dtype)).sum(axis=-1).swapaxes(1, 2) - dlse

    def block(sums, xs):
        q_block, lookups, do_block, lse_block, delta_block = xs
        base = jnp.where(jnp.isfinite(lse_block), lse_block, 0)[..., None]

        def tile(carry, segment, seen, k, v, index):
            dq, sums = carry
            weights = jnp.where(seen, jnp.exp(tiles.scores(q_block, k) - base), 0)
            dweights = _dot("bhgqd,bhkd->bhgqk", do_block, v)
            dscores = (weights * (dweights - delta_block[..., None]) * scale).astype(q.dtype)
            if want_q:
                dq = dq + _dot("bhgqk,bhkd->bhgqd", dscores, k)
            dk, dv = sums[segment]
            if dk is not None:
                dk = dk.at[index].add(_dot("bhgqk,bhgqd->bhkd", dscores, q_block))
            if dv is not None:
                dv = dv.at[index].add(_dot("bhgqk,bhgqd->bhkd", weights.astype(q.dtype), do_block))
            return dq, (*sums[:segment], (dk, dv), *sums[segment + 1 :])

        dq = jnp.zeros(q_block.shape, tiles.dtype) if want_q else None
        dq, sums = tiles.visit(tile, (dq, sums), lookups, with_index=True)
        return sums, None if dq is None else dq.astype(q.dtype)

    sums = tuple(
        tuple(jnp.zeros(k.shape, tiles.dtype) if want else None for want in pair)
        for (k, _), pair in zip(tiles.keys, want_segments)
    )
    xs = (tiles.q_blocks, tiles.lookups, tiles.query_blocks(do), tiles.vector_blocks(lse), tiles.vector_blocks(delta))
    sums, dq = lax.scan(block, sums, xs)
    grads = tuple(tuple(None if x is None else tiles.to_keys(x, s.k) for x in pair) for s, pair in zip(segments, sums))
    return None if dq is None else tiles.to_rows(dq), grads


class _Lookup(NamedTuple):
    """For one segment: tile ranges `[4]` and the rows' intervals `[4, block]` or `[B, 4, block]` of one query block."""

    ranges: Any
    rows: Any


class _Tiles:
    """Inputs cut into blocks: queries `[block, B, Hkv, G, q, D]`, keys and values `[tile, B, Hkv, k, D]`."""

    def __init__(self, q, segments: tuple[Segment, ...], scale: float):
        self.dtype = jnp.promote_types(q.dtype, jnp.float32)
        self.scale = scale
        self.batch, self.queries, self.heads, self.dim = q.shape
        self.kv_heads = segments[0].k.shape[2]
        self.block_q = min(BLOCK_Q, _round_up(self.queries, 16))
        self.block_k = min(BLOCK_K, _round_up(max(s.k.shape[1] for s in segments), 16))
        self.q_blocks = self.query_blocks(q)
        self.keys = [(self.key_tiles(s.k), self.key_tiles(s.v)) for s in segments]
        self.lookups = tuple(self._lookup(s) for s in segments)

    def scores(self, q, k):
        return _dot("bhgqd,bhkd->bhgqk", q, k) * self.scale

    def visit(self, tile, carry, lookups, with_index=False):
        """Folds `tile` over the key tiles that the query block may see, segment after segment."""
        for segment, ((k_tiles, v_tiles), lookup) in enumerate(zip(self.keys, lookups)):
            first1, end1, first2, end2 = lookup.ranges

            def body(step, carry, segment=segment, k_tiles=k_tiles, v_tiles=v_tiles, lookup=lookup):
                first1, end1, first2, _ = lookup.ranges
                index = jnp.where(step < end1 - first1, first1 + step, first2 + step - (end1 - first1))
                keys = index * self.block_k + jnp.arange(self.block_k, dtype=jnp.int32)
                seen = visibility.membership(lookup.rows, keys)
                extra = (index,) if with_index else ()
                return tile(carry, segment, seen, k_tiles[index], v_tiles[index], *extra)

            carry = lax.fori_loop(0, end1 - first1 + end2 - first2, body, carry)
        return carry

    def query_blocks(self, x):
        if x is None:
            return None
        x = jnp.pad(x, ((0, 0), (0, -self.queries % self.block_q), (0, 0), (0, 0)))
        x = x.reshape(self.batch, -1, self.block_q, self.kv_heads, self.heads // self.kv_heads, self.dim)
        return x.transpose(1, 0, 3, 4, 2, 5)

    def key_tiles(self, x):
        x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % self.block_k), (0, 0), (0, 0)))
        return x.reshape(self.batch, -1, self.block_k, self.kv_heads, self.dim).transpose(1, 0, 3, 2, 4)

    def vector_blocks(self, x):
        x = jnp.pad(x, ((0, 0), (0, 0), (0, -self.queries % self.block_q)))
        x = x.reshape(self.batch, self.kv_heads, self.heads // self.kv_heads, -1, self.block_q)
        return jnp.moveaxis(x, 3, 0)

    def to_rows(self, x):
        x = x.transpose(1, 0, 4, 2, 3, 5).reshape(self.batch, -1, self.heads, self.dim)
        return x[:, : self.queries]

    def to_vector(self, x):
        return jnp.moveaxis(x, 0, 3).reshape(self.batch, self.heads, -1)[..., : self.queries]

    def to_keys(self, x, like):
        x = x.transpose(1, 0, 3, 2, 4).reshape(self.batch, -1, self.kv_heads, self.dim)
        return x[:, : like.shape[1]].astype(like.dtype)

    def _lookup(self, segment):
        keys = segment.k.shape[1]
        rows = segment.rows
        if rows is None:
            rows = jnp.zeros((4, self.queries), jnp.int32).at[1].set(keys)
        rows = jnp.pad(jnp.asarray(rows), ((0, 0),) * (rows.ndim - 1) + ((0, -self.queries % self.block_q),))
        if rows.ndim == 2:
            ranges, _ = visibility.tile_ranges(rows, self.block_q, self.block_k)
            return _Lookup(ranges.T, rows.reshape(4, -1, self.block_q).swapaxes(0, 1))
        # One loop serves all batch entries: it visits the tiles that a row of any of them may see.
        blocks = rows.reshape(self.batch, 4, -1, self.block_q)
        all_rows = blocks.transpose(1, 2, 0, 3).reshape(4, -1)
        ranges, _ = visibility.tile_ranges(all_rows, self.batch * self.block_q, self.block_k)
        return _Lookup(ranges.T, jnp.moveaxis(blocks, 2, 0))


def _round_up(n, multiple):
    return -(-n // multiple) * multiple


def _dot(subscripts, a, b):
    wide = jnp.promote_types(a.dtype, jnp.float32)
    precision = lax.Precision.HIGHEST if a.dtype == wide else None
    return jnp.einsum(subscripts, a, b, precision=precision, preferred_element_type=wide)
