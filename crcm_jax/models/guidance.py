"""Classifier-free guidance (spec causal_rcm 1.5)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from crcm_jax.models.base import Condition, Network


def guided_velocity(network: Network, params, x, t, cond: Condition, uncond: Condition | None, scale: float, **view):
    """v_u + scale·(v_c − v_u), both branches in one batch of twice the size.

    x `[batch, frame, height, width, channel]`; t `[batch or 1, frame or 1]`; `view` is the network's `context`, if any.
    Plain velocity, one branch, where scale ≤ 1 or there is no `uncond`.
    """
    if scale <= 1 or uncond is None:
        return network.velocity(params, x, t, cond, **view)
    batch = x.shape[0]

    def twice(leaf):
        return leaf if leaf.shape[0] == 1 and batch > 1 else jnp.concatenate([leaf, leaf])

    both = jax.tree.map(lambda c, u: jnp.concatenate([c, jnp.broadcast_to(u, c.shape)]), cond, uncond)
    v = network.velocity(params, twice(x), twice(jnp.asarray(t)), both, **jax.tree.map(twice, view))
    return combine(v[:batch], v[batch:], scale)


def combine(v_cond, v_uncond, scale: float):
    """Guidance of two velocities, in at least float32."""
    v_cond, v_uncond = (v.astype(jnp.promote_types(v.dtype, jnp.float32)) for v in (v_cond, v_uncond))
    return v_uncond + scale * (v_cond - v_uncond)
