"""Three-axis rotary position tables (spec: Wan2.1 section 1.3)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

BASE = 10_000.0


def axis_widths(head_dim: int) -> tuple[int, int, int]:
    """Channels of the (time, height, width) axes: for 128, (44, 42, 42)."""
    side = 2 * (head_dim // 6)
    return head_dim - 2 * side, side, side


def table(start, frames: int, total: int, height: int, width: int, head_dim: int, dtype) -> tuple[jax.Array, jax.Array]:
    """(cos, sin) of every channel pair's angle, each `[frame, height·width, head_dim/2]`, pairs ordered (t, y, x).

    The frames are `start` (an int or a traced integer) … start + frames − 1 of a clip of `total`. Each axis is worked
    out on the host in float64, since a float32 product of index and frequency would lose digits; only the small
    per-axis tables become constants of the program.
    """
    shape = (frames, height, width)
    cosines: list[jax.Array] = []
    sines: list[jax.Array] = []
    for axis, (length, channels) in enumerate(zip((total, height, width), axis_widths(head_dim))):
        angle = np.arange(length)[:, None] * BASE ** (-2.0 * np.arange(channels // 2) / channels)
        for values, out in ((np.cos(angle), cosines), (np.sin(angle), sines)):
            values = jnp.asarray(values, dtype)
            if axis == 0:
                values = jax.lax.dynamic_slice_in_dim(values, start, frames, 0)
            along = [1, 1, 1, channels // 2]
            along[axis] = shape[axis]
            out.append(jnp.broadcast_to(values.reshape(along), (*shape, channels // 2)))
    cosine, sine = (jnp.concatenate(parts, -1).reshape(frames, -1, head_dim // 2) for parts in (cosines, sines))
    return cosine, sine
