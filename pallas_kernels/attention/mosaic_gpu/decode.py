"""One chunk against its cache, with the keys shared out among copies of the queries.

A frame at 480p has 1,560 queries: 13 blocks of 128 in each of 12 heads, 156 programs for a GPU's 132 multiprocessors,
so that the second round leaves most of them idle. With every query repeated `parts` times, each copy over an equal
share of the keys it may see, rounds are full. The shares' outputs are weighed by their log-sum-exps, as the softmax
over all keys would have weighed them. Which keys a copy sees is the mask's business: kernel and cache stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.attention.mask import Cached, Intervals, visible_in

BLOCK = 128
"""Queries of one program of the Hopper kernel."""
MULTIPROCESSORS = 132
"""Of an H100 or H200 SXM, one program each at a time; what is assumed where the device does not tell."""
MOST_PARTS = 6
COST = 0.02
"""What one more part costs, as a fraction of the attention: copies of queries, and outputs to add up (measured)."""


def choose_parts(shape: tuple[int, ...], multiprocessors: int | None = None) -> int:
    """The number of parts that keeps most multiprocessors (of the default device) busy, for queries of `shape`."""
    batch, queries, heads, _ = shape
    there = multiprocessors or getattr(jax.devices()[0], "core_count", None) or MULTIPROCESSORS
    programs = -(-queries // BLOCK) * heads * batch

    def busy(parts: int) -> float:
        rounds = -(-parts * programs // there)
        return parts * programs / (rounds * there) - COST * parts

    return max(range(1, MOST_PARTS + 1), key=busy)


def attend_in_parts(call: Callable, arrays, mask: Cached, parts: int):
    """o `[B, N, H, D]` and lse `[B, H, N]` under `mask`, with the visible keys cut into `parts` equal shares.

    call: (q, (k, v), (k, v) of the context), a mask, and what it lets see there -> o and lse.
    """
    q, (k, v), context = arrays
    batch, queries, heads, dim = q.shape
    padded = -(-queries // BLOCK) * BLOCK  # a program's queries must be of one part
    copies = jnp.pad(q, ((0, 0), (0, padded - queries), (0, 0), (0, 0)))
    copies = jnp.tile(copies, (1, parts, 1, 1))

    # Visible keys in one line: the sink, the cache from start to stop, then the chunk's own.
    stop, start, sink = (_of_entries(x) for x in (mask.stop, mask.start, mask.sink))
    sink = jnp.minimum(sink, stop)
    near = jnp.maximum(stop - start, 0)
    edges = (sink + near + k.shape[1]) * np.arange(parts + 1, dtype=np.int32) // parts
    low, high = (jnp.repeat(x, padded, axis=-1) for x in (edges[..., :-1], edges[..., 1:]))

    def share(first, length, before):
        """The part of `length` keys from number `first` on that a copy sees, `before` keys lying ahead in the line."""
        return first + jnp.clip(low - before, 0, length), first + jnp.clip(high - before, 0, length)

    own = share(0, k.shape[1], sink + near)
    seen = Intervals(own=(own,), context=(share(0, sink, 0), share(start, near, sink)))
    arrays = copies, (k, v), context
    out, lse = call(arrays, seen, visible_in(arrays, seen))
    out = out.reshape(batch, parts, padded, heads, dim)[:, :, :queries]
    lse = lse.reshape(batch, heads, parts, padded)[..., :queries]
    weights = jax.nn.softmax(lse, axis=2)
    wide = jnp.promote_types(q.dtype, jnp.float32)
    out = jnp.einsum("bpnhd,bhpn->bnhd", out.astype(wide), weights.astype(wide), precision="highest")
    return out.astype(q.dtype), jax.nn.logsumexp(lse, axis=2)


def _of_entries(value):
    """A scalar, or `[B, 1]` of one value a batch entry."""
    value = jnp.asarray(value, jnp.int32)
    return value[:, None] if value.ndim else value
