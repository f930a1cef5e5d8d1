"""Rectified-flow and TrigFlow algebra, and the time distributions of training (spec causal_rcm 1, 2).

Rectified flow: x_t = (1−t)·x0 + t·ε with t in [0, 1]; the network predicts the velocity v = ε − x0 = dx/dt.
TrigFlow: x_θ = cosθ·x0 + sinθ·ε with θ in [0, π/2]; F = dx/dθ. The two are the same path at another speed and scale.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax.scipy.special import ndtr, ndtri
from jax.typing import ArrayLike
from jaxtyping import Float, Shaped

from crcm_jax.shapes import Array

Latents: TypeAlias = Float[Array, "batch frame *inner"]
Times: TypeAlias = Float[ArrayLike, "#batch #frame"] | Float[ArrayLike, ""]
"""Of every frame of every clip, in [0, 1]; one for all frames, all clips, or both."""
Numbers: TypeAlias = Float[ArrayLike, " ..."]


def expand(t: Shaped[ArrayLike, "*times"], x: Float[Array, " ..."]) -> Shaped[Array, " ..."]:
    """Times `[batch, frame]` (or a scalar) as something that broadcasts over latents x."""
    t = jnp.asarray(t)
    return t if t.ndim == 0 else t.reshape(*t.shape, *[1] * (x.ndim - t.ndim))


def interpolate(x0: Latents, noise: Latents, t: Times) -> Latents:
    """x_t = (1−t)·x0 + t·ε, latents `[batch, frame, …]`, times `[batch, frame or 1]`."""
    t = expand(t, x0)
    return (1 - t) * x0 + t * noise


def to_clean(x: Latents, v: Latents, t: Times) -> Latents:
    """The prediction of x0: x_t − t·v."""
    return x - expand(t, x) * v


def to_noise(x: Latents, v: Latents, t: Times) -> Latents:
    """The prediction of ε: x_t + (1−t)·v."""
    return x + (1 - expand(t, x)) * v


def euler(x: Latents, v: Latents, t: Times, t_next: Times) -> Latents:
    """One step of dx/dt = v from t to t_next."""
    return x - (expand(t, x) - expand(t_next, x)) * v


def shift(u: Numbers, s: float) -> Any:
    """s·u / (1 + (s−1)·u): pushes times towards noise for s > 1; the identity for s ≤ 0."""
    return u if s <= 0 else s * u / (1 + (s - 1) * u)


def unshift(t: Numbers, s: float) -> Any:
    """The inverse of `shift`."""
    return t if s <= 0 else t / (s - (s - 1) * t)


# TrigFlow


def trig_to_flow(theta: Numbers) -> Any:
    """θ → t = sinθ / (cosθ + sinθ)."""
    return jnp.sin(theta) / (jnp.cos(theta) + jnp.sin(theta))


def flow_to_trig(t: Numbers) -> Any:
    """t → θ = arctan(t / (1−t)), written so that t = 1 gives π/2 exactly."""
    return jnp.arctan2(t, 1 - t)


def trig_velocity(v: Latents, x: Latents, theta: Times) -> Latents:
    """TrigFlow's F = dx/dθ of the network whose velocity at x/(cosθ+sinθ) is v (spec causal_rcm 1.2, closed form)."""
    theta = expand(theta, x)
    cos, sin = jnp.cos(theta), jnp.sin(theta)
    return ((cos - sin) * x + v) / (cos + sin)


# Time distributions


@dataclasses.dataclass(frozen=True)
class UniformShift:
    """u ~ U[0, 1), t = shift(u; s)."""

    s: float = 5.0

    def quantile(self, u: Numbers) -> Any:
        """t whose cumulative probability is u."""
        return shift(u, self.s)

    def cdf(self, t: Numbers) -> Any:
        """Cumulative probability of t."""
        return unshift(t, self.s)


@dataclasses.dataclass(frozen=True)
class LogNormal:
    """log σ ~ N(mean, std²), t = σ / (1+σ): logit-normal in t."""

    mean: float = -0.8
    std: float = 1.6

    def quantile(self, u: Numbers) -> Any:
        """t whose cumulative probability is u."""
        return jax.nn.sigmoid(self.mean + self.std * ndtri(u))

    def cdf(self, t: Numbers) -> Any:
        """Cumulative probability of t."""
        return ndtr((jnp.log(t) - jnp.log1p(jnp.negative(t)) - self.mean) / self.std)


TimeDistribution = UniformShift | LogNormal


def time_distribution(name: str, **parameters) -> TimeDistribution:
    """`uniform_shift` (s) or `log_normal` (mean, std); ValueError for another name."""
    known = {"uniform_shift": UniformShift, "log_normal": LogNormal}
    if name not in known:
        raise ValueError(f"time distribution {name!r} is not one of {', '.join(known)}")
    return known[name](**parameters)


def sample_times(
    key: jax.Array, distribution: TimeDistribution, shape: Sequence[int], dtype: Any = jnp.float32
) -> Float[Array, " ..."]:
    """Independent times of `distribution`, in [0, 1]."""
    if isinstance(distribution, LogNormal):
        # Straight from a normal draw: a uniform one would cut the tails at the dtype's resolution.
        return jax.nn.sigmoid(distribution.mean + distribution.std * jax.random.normal(key, shape, dtype))
    return jnp.clip(distribution.quantile(jax.random.uniform(key, shape, dtype)), 0, 1)


def fopp_times(
    key: jax.Array, distribution: TimeDistribution, batch: int, chunks: int
) -> Float[Array, "{batch} {chunks}"]:
    """FoPP: non-decreasing chunk times `[batch, chunk]`; the anchor keeps the marginal `distribution`
    (spec causal_rcm 2).

    An anchor chunk is drawn uniformly and its time from the distribution; earlier chunks are order statistics of
    uniforms below it, later ones above it, realised as normalised sums of exponentials, all in cumulative probability.
    """
    anchor_key, time_key, left_key, right_key = jax.random.split(key, 4)
    anchor = jax.random.randint(anchor_key, (batch, 1), 0, chunks)
    u = distribution.cdf(sample_times(time_key, distribution, (batch, 1)))
    index = jnp.arange(chunks)[None]

    def fractions(key, count):
        """Entry j: the (j+1)-th of `count` ordered uniforms on (0, 1), for j < count."""
        draws = jax.random.exponential(key, (batch, chunks))
        sums = jnp.cumsum(draws, 1)
        return sums / jnp.take_along_axis(sums, count, 1)

    left = u * fractions(left_key, anchor)
    later = jnp.maximum(index - anchor - 1, 0)
    right = u + (1 - u) * jnp.take_along_axis(fractions(right_key, chunks - 1 - anchor), later, 1)
    ordered = jnp.where(index < anchor, left, jnp.where(index == anchor, u, right))
    return jnp.clip(distribution.quantile(jnp.clip(ordered, 0, 1)), 0, 1)


def consistency_times(
    key: jax.Array, batch: int, steps: int, total: int, s: float
) -> Float[Array, "{batch} {steps}+1"]:
    """Times t_0 > … > t_steps of a discrete consistency step, `[batch, steps+1]` (spec causal_rcm 2, `tf_dcm`).

    u ~ U[0, 1 − steps/total), t_k = shift(1 − (u + k/total); s).
    """
    u = jax.random.uniform(key, (batch, 1), maxval=1 - steps / total)
    return shift(1 - (u + jnp.arange(steps + 1) / total), s)


def gaussian_bell(t: Numbers) -> Any:
    """Weight exp(−2(t−½)²) − exp(−½), zero at both ends (spec causal_rcm 4.1)."""
    return jnp.exp(-2 * jnp.square(t - 0.5)) - math.exp(-0.5)
