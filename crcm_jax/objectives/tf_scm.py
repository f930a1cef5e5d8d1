"""TF-sCM: the continuous-time consistency objective under teacher forcing (spec causal_rcm 4.4)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from crcm_jax import flow
from crcm_jax.chunks import ChunkPattern
from crcm_jax.models.base import Condition, Network
from crcm_jax.models.guidance import guided_velocity
from crcm_jax.objectives import common

NORM_FLOOR = 0.1
"""Added to the tangent's norm, not a maximum with it (spec causal_rcm 10.15)."""


def tf_scm(
    network: Network, params, batch, cond: Condition, key, *,
    teacher_network: Network, teacher, uncond: Condition | None, chunks: ChunkPattern, iteration,
    times: flow.TimeDistribution = flow.LogNormal(-0.8, 1.6), guidance: float = 3.0, warmup: int = 1000,
    context_noise=common.ContextNoise(), one_pass: bool = True, scale: float = 100.0,
):  # fmt: skip
    """The consistency function f = x_t − t·v_θ must not change along the teacher's trajectory: g = df/dt → 0.

    τ = dv_θ/dt along dx/dt = v_T is one `jax.jvp` of the network; the clean context has no tangent, so none is
    computed for it. `one_pass` shares the primal of that jvp with the loss; otherwise τ comes from a pass of its own
    (less memory at once, one forward more). Returns (losses `[batch]`, metrics).
    """
    x0 = batch["latents"]
    time_key, noise_key, context_key = jax.random.split(key, 3)
    t = flow.sample_times(time_key, times, (x0.shape[0], 1))
    x = flow.interpolate(x0, jax.random.normal(noise_key, x0.shape), t)
    stop = jax.lax.stop_gradient

    clean = common.context(context_key, x0, chunks, common.ContextNoise())
    v_T = stop(guided_velocity(teacher_network, teacher, x, t, cond, uncond, guidance, context=clean))

    seen = common.context(context_key, x0, chunks, context_noise)
    student = lambda params: lambda x, t: network.velocity(params, x, t, cond, context=seen)  # noqa: E731
    if one_pass:
        v, tau = jax.jvp(student(params), (x, t), (v_T.astype(x.dtype), jnp.ones_like(t)))
    else:
        _, tau = jax.jvp(student(stop(params)), (x, t), (v_T.astype(x.dtype), jnp.ones_like(t)))
        v = student(params)(x, t)
    v, tau = (u.astype(jnp.promote_types(u.dtype, jnp.float32)) for u in (v, stop(tau)))

    r = 1.0 if not warmup else jnp.minimum(1.0, iteration / warmup)
    g = -(stop(v) - v_T) - r * flow.expand(t, x) * tau
    norm = jnp.sqrt(common.sample_sum(jnp.square(g)))
    g_hat = g / (flow.expand(norm, g) + NORM_FLOOR)
    losses = scale * common.sample_sum(jnp.square(v - stop(v) - g_hat))
    return losses, {"tangent_norm": norm, "warmup": jnp.asarray(r)}
