"""One chunk against its cache, with the keys shared out among copies of the queries.

A frame at 480p has 1,560 queries: 13 blocks of 128 in each of 12 heads, 156 programs for a GPU's 132 multiprocessors,
so that the second round leaves most of them idle. With every query repeated `parts` times, each copy over an equal
share of the keys it may see, rounds are full. The shares' outputs are weighed by their log-sum-exps, as the softmax
over all keys would have weighed them. Which keys a copy sees is the mask's business: kernel and cache stay as they are.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.attention import Cached, Intervals, attention

BLOCK = 128
"""Queries of one program of the Hopper kernel."""
MULTIPROCESSORS = 132
"""Of an H100 or H200 SXM, one program each at a time."""
MOST_PARTS = 6
COST = 0.02
"""What one more part costs, as a fraction of the attention: copies of queries, and outputs to add up (measured)."""


def attend_cached(q, k, v, *, context, mask: Cached, implementation: str | None):
    """`attention` under a `Cached` mask, in as many parts as suit the device. q `[batch, token, head, channel]`."""
    parts = choose_parts(q.shape) if _hopper_kernel(q, implementation) else 1
    if parts == 1:
        return attention(q, k, v, context=context, mask=mask, implementation=implementation)
    return attend_in_parts(q, k, v, context, mask, parts, implementation)


def choose_parts(shape: tuple[int, ...]) -> int:
    """The number of parts that keeps most multiprocessors busy, for queries of `shape`."""
    batch, queries, heads, _ = shape
    programs = -(-queries // BLOCK) * heads * batch

    def busy(parts: int) -> float:
        rounds = -(-parts * programs // MULTIPROCESSORS)
        return parts * programs / (rounds * MULTIPROCESSORS) - COST * parts

    return max(range(1, MOST_PARTS + 1), key=busy)


def attend_in_parts(q, k, v, context, mask: Cached, parts: int, implementation: str | None = None):
    """`attention` under `mask`, equal to it but for rounding, with the visible keys cut into `parts` equal shares."""
    batch, queries, heads, dim = q.shape
    padded = -(-queries // BLOCK) * BLOCK  # a program's queries must be of one part
    copies = jnp.pad(q, ((0, 0), (0, padded - queries), (0, 0), (0, 0)))
    copies = jnp.tile(copies, (1, parts, 1, 1))

    # Visible keys in one line: the sink, the cache from start to stop, then the chunk's own.
    stop, start = jnp.asarray(mask.stop, jnp.int32), jnp.asarray(mask.start, jnp.int32)
    sink = jnp.minimum(mask.sink, stop)
    near = jnp.maximum(stop - start, 0)
    edges = (sink + near + k.shape[1]) * np.arange(parts + 1, dtype=np.int32) // parts
    low, high = (jnp.repeat(x, padded) for x in (edges[:-1], edges[1:]))

    def share(first, length, before):
        """The part of `length` keys from number `first` on that a copy sees, `before` keys lying ahead in the line."""
        return first + jnp.clip(low - before, 0, length), first + jnp.clip(high - before, 0, length)

    own = share(0, k.shape[1], sink + near)
    seen = Intervals(own=(own,), context=(share(0, sink, 0), share(start, near, sink)))
    out, lse = attention(
        copies, k, v, context=context, mask=seen, implementation=implementation, return_lse=True
    )  # fmt: skip
    out = out.reshape(batch, parts, padded, heads, dim)[:, :, :queries]
    weights = jax.nn.softmax(lse.reshape(batch, heads, parts, padded)[..., :queries], axis=2)
    wide = jnp.promote_types(q.dtype, jnp.float32)
    return jnp.einsum("bpnhd,bhpn->bnhd", out.astype(wide), weights.astype(wide), precision="highest").astype(q.dtype)


def _hopper_kernel(q, implementation: str | None) -> bool:
    """Whether `attention` will take its Hopper kernel."""
    if implementation not in (None, "mosaic_gpu") or q.dtype.itemsize != 2 or q.shape[-1] not in (64, 128):
        return False
    return str(getattr(jax.devices()[0], "compute_capability", "")).startswith("9.")
