"""What a backend is: a module with the functions below, over segments of keys and values.

    unsupported(q, segments, scale)   -> None, or one sentence that says why it cannot serve these inputs
    forward(q, segments, scale)       -> o, lse
    tangent(q, segments, scale, o, lse, dq, dsegments)             -> do, dlse
    backward(q, segments, scale, o, lse, do, dlse, wanted)         -> dq, ((dk, dv), …)

q, o: `[B, N, H, D]`; lse: `[B, H, N]`, float32 or wider, −inf for a row that sees nothing. dq and every entry of
dsegments `((dk, dv), …)` is an array or None, and None means a tangent that is known to be zero: it must cost nothing.
wanted has the shape of `(dq, dsegments)` with booleans: results that are not wanted may be None.

A backend with `forward_tangent(q, segments, scale, dq, dsegments) -> o, lse, do, dlse` is asked for it where both are
needed at once.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax


class Segment(NamedTuple):
    """Keys and values `[B, M, Hkv, D]` and, per query, the key intervals it sees, as in `rows`.

    rows: int32 `[4, N]` for the whole batch, `[B, 4, N]` where entries differ, or None for all keys.
    """

    k: jax.Array
    v: jax.Array
    rows: Any
