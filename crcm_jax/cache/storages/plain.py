"""The storage that keeps numbers as they are computed: bfloat16, of a network that computes in it."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Plain:
    """Arrays in `dtype`, or in the network's own compute dtype where that is None."""

    dtype: str | None = None

    def empty(self, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        """Zeros."""
        return jnp.zeros(shape, self.dtype or dtype)

    def read(self, packed: jax.Array) -> jax.Array:
        """The array itself."""
        return packed

    def write(self, packed: jax.Array, new: jax.Array, token: Any) -> jax.Array:
        """In place, where the compiler may."""
        return jax.lax.dynamic_update_slice_in_dim(packed, new.astype(packed.dtype), token, -3)


PLAIN = Plain()
