"""Tensors as bytes: element types by name, and the changes of layout between foreign checkpoints and ours.

Elements are carried as unsigned integers of their width, so that nothing can round, and types that NumPy does not know
pass through like any other. Types go by their names in safetensors files ("BF16", "F32", …).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import ml_dtypes
import numpy as np

WIDTHS = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
    "F8_E4M3": 1, "F8_E5M2": 1, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1, "F8_E8M0": 1, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip
"""Bytes of an element. Types whose elements share bytes (F4, F6) and complex ones are not here: they cannot be read."""

WIDE = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
"""Types that the networks' weights can be loaded from."""

FLOATS = WIDE | {
    "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E4M3FNUZ": ml_dtypes.float8_e4m3fnuz, "F8_E5M2FNUZ": ml_dtypes.float8_e5m2fnuz,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,
}  # fmt: skip
"""Types that can be cast."""

_EXPONENTS = {"F64": 0x7FF0_0000_0000_0000, "F32": 0x7F80_0000, "F16": 0x7C00, "BF16": 0x7F80}

_BLOCK = 2 << 20
"""Bytes worked on at once where a whole tensor need not be."""


class Spec(NamedTuple):
    """A tensor without its elements."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return WIDTHS[self.dtype] * math.prod(self.shape)


class Transform(NamedTuple):
    """A change of layout. `rank` is the foreign tensor's number of axes, None for any."""

    rank: int | None
    to_ours: Callable[[np.ndarray], np.ndarray]
    to_theirs: Callable[[np.ndarray], np.ndarray]


def _permutation(*axes: int) -> Transform:
    back = tuple(np.argsort(axes).tolist())
    return Transform(len(axes), lambda a: a.transpose(axes), lambda a: a.transpose(back))


TRANSFORMS = {
    "same": Transform(None, lambda a: a, lambda a: a),
    "linear": _permutation(1, 0),
    "conv2d": _permutation(2, 3, 1, 0),
    "conv3d": _permutation(2, 3, 4, 1, 0),
    "patch": Transform(5, lambda a: a.reshape(len(a), -1).T, lambda a: a.T.reshape(a.shape[1], -1, 1, 2, 2)),
    "unit": Transform(3, lambda a: a.reshape(a.shape[1:]), lambda a: a[None]),
    "units": Transform(3, lambda a: a.reshape(a.shape[2:]), lambda a: a[None, None]),
    "gamma2d": Transform(3, lambda a: a.reshape(a.shape[:1]), lambda a: a[:, None, None]),
    "gamma3d": Transform(4, lambda a: a.reshape(a.shape[:1]), lambda a: a[:, None, None, None]),
    "stacked": Transform(None, lambda a: a.reshape(a.shape[1:]), lambda a: a[None]),
}
"""What the name tables' third column means."""


def shape_after(change: Callable[[np.ndarray], np.ndarray], shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """The shape that `change` gives an array of `shape`; None if it cannot be applied."""
    try:
        return change(np.broadcast_to(np.uint8(0), shape)).shape
    except (ValueError, IndexError, TypeError):
        return None


def raw(dtype: str) -> np.dtype:
    """The unsigned integer that carries an element of `dtype`."""
    return np.dtype(f"u{WIDTHS[dtype]}")


def blocks(array: np.ndarray) -> Iterator[np.ndarray]:
    """The array in order, as contiguous pieces of a few megabytes: a transposed view is never copied whole."""
    array = array.reshape(1) if array.ndim == 0 else array
    rows = max(1, _BLOCK * len(array) // max(1, array.nbytes))
    for start in range(0, len(array), rows):
        block = array[start : start + rows]
        if len(block) == 1 and block.nbytes > 2 * _BLOCK and block.ndim > 1:
            yield from blocks(block[0])
        else:
            yield np.ascontiguousarray(block)


def unusual(block: np.ndarray, dtype: str) -> bool:
    """Whether a piece of raw elements holds NaN or infinity."""
    if dtype not in FLOATS:
        return False
    if dtype not in _EXPONENTS:
        # The narrow types have codes of their own for what is no number.
        return not np.all(np.isfinite(block.view(FLOATS[dtype]).astype(np.float32)))
    exponent = block.dtype.type(_EXPONENTS[dtype])
    return bool(np.any((block & exponent) == exponent))


def cast(block: np.ndarray, dtype: str, to: str) -> np.ndarray:
    """Raw elements of one floating-point type as another's, rounded to nearest, to infinity where too large."""
    if dtype == to:
        return block
    with np.errstate(over="ignore", invalid="ignore"):
        return block.view(FLOATS[dtype]).astype(FLOATS[to]).view(raw(to))
