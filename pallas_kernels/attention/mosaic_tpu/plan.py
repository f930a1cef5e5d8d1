"""Which tiles a kernel visits, and in what order: a flat list of steps that the scalar core reads ahead of time.

A kernel's innermost grid axis runs over this list, so tiles that nobody may see cost nothing, and the pipeline that
loads the next step's tiles never drains. The list has one entry of a few integers per visited tile pair.

Where batch entries see different keys, each has a list of its own, and all run as many steps as the longest. A shorter
one is filled up with idle steps, which hold the last tiles and do nothing.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.attention import rows as visibility

FIRST, LAST, MASKED = 1, 2, 4  # bits of a step: the outer tile begins, it ends, some pair in the tile is invisible
SEGMENT = 8  # and, multiplied by the segment's number, which keys it reads
OUTER_SHIFT = 4  # above them: the number of the outer tile

MAX_STEPS = 1 << 15  # three words each: 384 KiB of the 1 MiB of scalar memory


class Plan(NamedTuple):
    """Steps, outer tile by outer tile.

    codes: int32 `[steps]`, the outer tile's number above the bits; `[B, steps]` where batch entries differ, and there
      −1 − code of an idle step.
    tiles: per segment, int32, shaped like `codes`, the inner tile to hold: in steps of another segment the one it read
      last, so that nothing is loaded.
    count: steps to run, an int or, with a traced mask, a traced int32.
    kinds: the (segment, masked) pairs that can occur.
    steps, loads: per segment, how many steps read it and how often the tile changes; upper bounds with a traced mask,
      the mean where batch entries differ.
    """

    codes: Any
    tiles: tuple[Any, ...]
    count: Any
    kinds: tuple[tuple[int, bool], ...]
    steps: tuple[int, ...]
    loads: tuple[int, ...]


def rows_of(segments, queries: int) -> list:
    """`rows` of segments, also where everything is visible; of each batch entry, if in one segment they differ."""
    return visibility.together(
        [visibility.everything(queries, s.k.shape[1]) if s.rows is None else s.rows for s in segments]
    )


def by_queries(segments, queries: int, block_q: int, block_k: int) -> Plan:
    """Steps whose outer tiles are query blocks and whose inner tiles are key tiles, segment after segment."""
    rows = rows_of(segments, queries)
    seen, whole = zip(*(_visits(r, s.k.shape[1], block_q, block_k, "edge") for r, s in zip(rows, segments)))
    tiles = [s.shape[-1] for s in seen]
    xp = np if all(isinstance(s, np.ndarray) for s in seen) else jnp
    return _planned(xp, xp.concatenate(seen, axis=-1), xp.concatenate(whole, axis=-1), tiles)


def by_keys(segment, queries: int, block_q: int, block_k: int) -> Plan:
    """Steps whose outer tiles are one segment's key tiles and whose inner tiles are query blocks.

    A query block that reaches beyond the last query counts as masked: what lies there must not enter the sums.
    """
    (rows,) = rows_of([segment], queries)
    seen, whole = _visits(rows, segment.k.shape[1], block_q, block_k, "constant")
    xp = np if isinstance(seen, np.ndarray) else jnp
    return _planned(xp, seen.swapaxes(-1, -2), whole.swapaxes(-1, -2), [seen.shape[-2]])


def longest(queries: int, keys: list[int], block_q: int, block_k: int) -> int:
    """Steps of a mask that hides nothing, for one batch entry."""
    return -(-queries // block_q) * sum(-(-n // block_k) for n in keys)


def _visits(rows, keys, block_q, block_k, padding):
    """Booleans `[query blocks, key tiles]`, of each batch entry where they differ: is some pair visible, are all?"""

    def of_entry(rows):
        xp = np if isinstance(rows, np.ndarray) else jnp
        rows = xp.pad(rows, ((0, 0), (0, -rows.shape[1] % block_q)), mode=padding)
        tile = xp.arange(-(-keys // block_k), dtype=np.int32)

        def inside(ranges):
            first1, end1, first2, end2 = (r[:, None] for r in ranges)
            return ((tile >= first1) & (tile < end1)) | ((tile >= first2) & (tile < end2))

        some, every = visibility.tile_ranges(rows, block_q, block_k)
        return inside(some), inside(every)

    return visibility.by_entry(of_entry, rows)


def _planned(xp, seen, whole, tiles) -> Plan:
    """The plan of what is seen, or of what each batch entry sees; arguments as for `_flatten`."""
    if seen.ndim == 2:
        return _flatten(xp, seen, whole, tiles)
    if xp is np:
        plans = [_flatten(np, s, w, tiles) for s, w in zip(seen, whole)]
        count = max(plan.count for plan in plans)
        lists = [_filled(np, plan.codes, plan.tiles, plan.count, count) for plan in plans]
        codes, held = jax.tree.map(lambda *xs: np.stack(xs), *lists)
        kinds = tuple(sorted({kind for plan in plans for kind in plan.kinds}))
        steps, loads = (
            tuple(-(-sum(of_entries) // len(plans)) for of_entries in zip(*counts))
            for counts in ([plan.steps for plan in plans], [plan.loads for plan in plans])
        )
        return Plan(codes, held, count, kinds, steps, loads)
    _, _, _, *known = _flatten(jnp, seen[0], whole[0], tiles)
    codes, held, counts = jax.vmap(lambda s, w: _flatten(jnp, s, w, tiles)[:3])(seen, whole)
    fill = jax.vmap(lambda codes, held, count: _filled(jnp, codes, held, count, codes.shape[0]))
    codes, held = fill(codes, held, counts)
    kinds, steps, loads = known
    return Plan(codes, held, counts.max(), kinds, steps, loads)


def _filled(xp, codes, held, count, length):
    """One batch entry's codes and tiles, idle from `count` steps on up to `length`."""
    position = xp.arange(length, dtype=np.int32)
    latest = xp.minimum(position, count - 1)
    codes = codes[latest]
    codes = xp.where(position < count, codes, -1 - (codes & ~(FIRST | LAST)))
    return codes, tuple(tiles[latest] for tiles in held)


def _flatten(xp, seen, whole, tiles):
    """The plan that visits `seen` row by row; `tiles` splits its columns into segments."""
    nothing = ~seen.any(axis=1, keepdims=True)
    first_column = xp.arange(seen.shape[1]) == 0
    seen = seen | (nothing & first_column)  # results are written even where there is nothing to see
    if xp is np:
        outer, column = np.nonzero(seen)
        count = len(outer)
        masked = ~whole[outer, column]
    else:
        count = seen.sum(dtype=np.int32)
        outer, column = jnp.nonzero(seen, size=seen.size, fill_value=0)
        masked = ~whole[outer, column]
    position = xp.arange(len(outer), dtype=np.int32)
    before = xp.concatenate([outer[:1] - 1, outer[:-1]])
    after = xp.concatenate([outer[1:], outer[-1:] + 1])
    last = (after != outer) | (position == count - 1)
    bounds = np.cumsum([0, *tiles])
    segment = sum((column >= b).astype(np.int32) for b in bounds[1:-1]) if len(tiles) > 1 else xp.zeros_like(position)
    codes = (outer << OUTER_SHIFT) + FIRST * (before != outer) + LAST * last + MASKED * masked + SEGMENT * segment
    held = []
    for number, start in enumerate(bounds[:-1]):
        latest = xp.where(segment == number, position, 0)
        latest = np.maximum.accumulate(latest) if xp is np else lax.cummax(latest)
        held.append(xp.where(segment[latest] == number, column[latest] - start, 0).astype(np.int32))
    kinds = tuple(
        (number, edge)
        for number in range(len(tiles))
        for edge in (False, True)
        if xp is jnp or ((segment == number) & (masked == edge)).any()
    )
    if xp is np:
        steps = tuple(int((segment == number).sum()) for number in range(len(tiles)))
        loads = tuple(1 + int((np.diff(h) != 0).sum()) for h in held)
    else:
        steps = loads = tuple(seen.shape[0] * n for n in tiles)
    return Plan(codes.astype(np.int32), tuple(held), count, kinds, steps, loads)
