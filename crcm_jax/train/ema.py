"""Power-function EMA of the student's weights (spec causal_rcm 7.1; Karras et al. 2024, "EDM2")."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from crcm_jax.models.base import Params


def exponent(rate: float) -> float:
    """γ of the averaging profile t^γ whose width is `rate` of the training length; 0.1 gives 6.9372.

    The largest real root of γ³ + 7γ² + (16 − s⁻²)γ + (12 − s⁻²) = 0. ValueError unless 0 < rate < 12^−½ ≈ 0.289,
    beyond which γ would be negative: an average that forgets nothing.
    """
    if not 0 < rate < 12**-0.5:
        raise ValueError(f"ema.rate {rate} must lie between 0 and {12**-0.5:.3f} (0.1 is the usual value)")
    roots = np.roots([1.0, 7.0, 16.0 - rate**-2, 12.0 - rate**-2])
    return float(max(root.real for root in roots if abs(root.imag) < 1e-9))


def new_weight(index: jax.Array, gamma: float) -> jax.Array:
    """1 − β_i, the newest parameters' share at student update i = `index` (from 0): β_i = (1 − 1/(i+1))^(γ+1), β_0 = 0.

    Through log1p and expm1: 1 − β_i shrinks as (γ+1)/i, where float32 powers lose their digits.
    """
    i = index.astype(jnp.float32)
    return -jnp.expm1((gamma + 1.0) * jnp.log1p(-1.0 / (i + 1.0)))


def update(ema: Params, params: Params, index: jax.Array, gamma: float) -> Params:
    """The float32 average after student update `index`; `params` are the live ones, in their own (rounded) type."""
    share = new_weight(index, gamma)

    def average(old, new):
        new = new.astype(jnp.float32)
        return jnp.where(index < 1, new, old + share * (new - old))

    return jax.tree.map(average, ema, params)
