"""The laws by which weights are averaged. Power functions: spec causal_rcm 7.1; Karras et al. 2024, "EDM2"."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from crcm_jax.models.base import Params


@dataclasses.dataclass(frozen=True)
class Power:
    """The power-function average whose width is `rate` of the training length.

    ValueError unless 0 < rate < 12^−½ ≈ 0.289, beyond which the exponent would be negative: an average that forgets
    nothing.
    """

    rate: float = 0.1

    def __post_init__(self):
        if not 0 < self.rate < 12**-0.5:
            raise ValueError(f"ema.rate {self.rate} must lie between 0 and {12**-0.5:.3f} (0.1 is the usual value)")

    @property
    def exponent(self) -> float:
        """γ of the averaging profile t^γ; a rate of 0.1 gives 6.9372.

        The largest real root of γ³ + 7γ² + (16 − s⁻²)γ + (12 − s⁻²) = 0.
        """
        roots = np.roots([1.0, 7.0, 16.0 - self.rate**-2, 12.0 - self.rate**-2])
        return float(max(root.real for root in roots if abs(root.imag) < 1e-9))

    def share(self, index: jax.Array) -> jax.Array:
        """1 − β_i, the newest parameters' share at update i = `index`: β_i = (1 − 1/(i+1))^(γ+1), β_0 = 0.

        Through log1p and expm1: 1 − β_i shrinks as (γ+1)/i, where float32 powers lose their digits.
        """
        i = index.astype(jnp.float32)
        return -jnp.expm1((self.exponent + 1.0) * jnp.log1p(-1.0 / (i + 1.0)))

    def update(self, average: Params, params: Params, index: jax.Array) -> Params:
        """See `recipes.base.Average`; the first update's parameters are the first average."""
        return _mixed(average, params, self.share(index), index < 1)


@dataclasses.dataclass(frozen=True)
class Decay:
    """β·average + (1 − β)·params from update number `start` on; before it, the parameters themselves."""

    decay: float = 0.99
    start: int = 0

    def update(self, average: Params, params: Params, index: jax.Array) -> Params:
        """See `recipes.base.Average`."""
        return _mixed(average, params, jnp.float32(1 - self.decay), index < self.start)


def _mixed(average: Params, params: Params, share: jax.Array, fresh: jax.Array) -> Params:
    """average + share·(params − average) in float32, or the parameters themselves where `fresh`."""

    def mix(old, new):
        new = new.astype(jnp.float32)
        return jnp.where(fresh, new, old + share * (new - old))

    return jax.tree.map(mix, average, params)
