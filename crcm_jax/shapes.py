"""What signatures say of arrays: `Float[Array, "batch frame height width channel"]`.

Axes are named as in the text: batch, frame, height, width and channel of latents or pixels, down and across of an image
in patches, token. In one call a name stands for one length. A test run checks every call of the modules that
tests/shape_checks.py lists; a program that users run checks none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

import jax
import numpy as np

if TYPE_CHECKING:
    Array: TypeAlias = jax.Array
else:
    Array = jax.Array | np.ndarray
"""Of JAX or of NumPy. To the type checker it is JAX's: what takes either does with both what it would do with that."""

Params: TypeAlias = Any
"""A nested dict of arrays."""
