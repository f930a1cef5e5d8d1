"""Three-axis rotary position tables (spec wan21 1.3)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

BASE = 10_000.0
_STEP = 1024
"""A stream without end has room for `_STEP`² frames: at four pixel frames each and 16 a second, three days."""


def axis_widths(head_dim: int) -> tuple[int, int, int]:
    """Channels of the (time, height, width) axes: for 128, (44, 42, 42)."""
    side = 2 * (head_dim // 6)
    return head_dim - 2 * side, side, side


def table(
    start, frames: int, total: int | None, height: int, width: int, head_dim: int, dtype
) -> tuple[jax.Array, jax.Array]:
    """(cos, sin) of every channel pair's angle, each `[frame, height·width, head_dim/2]`, pairs ordered (t, y, x).

    The frames are `start` (an int or a traced integer) … start + frames − 1 of a clip of `total`, or of a stream
    without end where that is None. Each axis is worked out on the host in float64, since a float32 product of index and
    frequency would lose digits; only the small per-axis tables become constants of the program. Frames beyond the end
    are a ValueError, or NaN where `start` is traced: never another frame's.
    """
    shape = (frames, height, width)
    cosines: list[jax.Array] = []
    sines: list[jax.Array] = []
    for axis, channels in enumerate(axis_widths(head_dim)):
        rates = BASE ** (-2.0 * np.arange(channels // 2) / channels)
        if axis:
            parts = _waves(np.arange(shape[axis]), rates, dtype)
        else:
            parts = _along(start, frames, total, rates, dtype)
        for values, out in zip(parts, (cosines, sines)):
            along = [1, 1, 1, channels // 2]
            along[axis] = shape[axis]
            out.append(jnp.broadcast_to(values.reshape(along), (*shape, channels // 2)))
    cosine, sine = (jnp.concatenate(parts, -1).reshape(frames, -1, head_dim // 2) for parts in (cosines, sines))
    return cosine, sine


def _waves(positions: np.ndarray, rates: np.ndarray, dtype) -> tuple[jax.Array, jax.Array]:
    angle = positions[:, None] * rates
    return jnp.asarray(np.cos(angle), dtype), jnp.asarray(np.sin(angle), dtype)


def _along(start, frames: int, total: int | None, rates: np.ndarray, dtype) -> tuple[jax.Array, jax.Array]:
    """Frames start … start + frames − 1 of `total`, cut out of the table of all."""
    if total is None:
        return _endless(start, frames, rates, dtype)
    if isinstance(start, int) and start + frames > total:
        raise ValueError(f"frames {start} to {start + frames - 1} lie beyond a clip of {total} frames")
    cosine, sine = (
        jax.lax.dynamic_slice_in_dim(values, start, frames, 0) for values in _waves(np.arange(total), rates, dtype)
    )
    if isinstance(start, int):
        return cosine, sine
    # A slice would clamp, and show frames at another's place.
    within = start + frames <= total
    return jnp.where(within, cosine, jnp.nan), jnp.where(within, sine, jnp.nan)


def _endless(start, frames: int, rates: np.ndarray, dtype) -> tuple[jax.Array, jax.Array]:
    """Frames start … start + frames − 1 by angle addition: coarse steps of `_STEP` frames, and fine ones within."""
    position = start + jnp.arange(frames)
    coarse, fine = position // _STEP, position % _STEP
    (cos_a, sin_a), (cos_b, sin_b) = (
        tuple(jnp.take(values, index, 0, mode="fill") for values in _waves(np.arange(_STEP) * size, rates, dtype))
        for index, size in ((coarse, _STEP), (fine, 1))
    )
    return cos_a * cos_b - sin_a * sin_b, sin_a * cos_b + cos_a * sin_b
