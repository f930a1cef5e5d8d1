"""TF-sCM: the continuous-time consistency objective under teacher forcing (spec causal_rcm 4.4)."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from crcm_jax import flow
from crcm_jax.models.base import Condition
from crcm_jax.models.bound import Bound
from crcm_jax.objectives import common

NORM_FLOOR = 0.1
"""Added to the tangent's norm, not a maximum with it (spec causal_rcm 10.15)."""


@dataclasses.dataclass(frozen=True)
class ContinuousTime:
    """The constants of TF-sCM.

    guidance: of the teacher. context_noise: of the student's context, the teacher's is clean. one_pass: the tangent's
    pass gives the loss its velocity too; otherwise τ comes from a pass of its own (less memory at once, one forward
    more).
    """

    times: flow.TimeDistribution = flow.LogNormal(-0.8, 1.6)
    guidance: float = 3.0
    context_noise: common.ContextNoise = common.CLEAN
    one_pass: bool = True
    scale: float = 100.0


def ramp(iteration, warmup: int):
    """r: how much of the tangent counts at this iteration, from 0 to 1 within `warmup` iterations."""
    return 1.0 if not warmup else jnp.minimum(1.0, iteration / warmup)


def tf_scm(
    student: Bound,
    batch,
    cond: Condition,
    key,
    *,
    teacher: Bound,
    uncond: Condition | None,
    r=1.0,
    constants: ContinuousTime = ContinuousTime(),
):
    """The consistency function f = x_t − t·v_θ must not change along the teacher's trajectory: g = df/dt → 0.

    τ = dv_θ/dt along dx/dt = v_T is one `jax.jvp` of the network; the clean context has no tangent, so none is
    computed for it. r: `ramp`. Returns (losses `[batch]`, metrics).
    """
    c = constants
    x0, held = batch["latents"], common.given(batch)
    time_key, noise_key, context_key = jax.random.split(key, 3)
    t = flow.sample_times(time_key, c.times, (x0.shape[0], 1))
    x, t_x = common.noised(x0, jax.random.normal(noise_key, x0.shape), t, held)
    stop = jax.lax.stop_gradient

    chunks = student.chunks
    clean = common.context(context_key, x0, chunks)
    v_T = common.generated(stop(teacher.guided(x, t_x, cond, uncond, c.guidance, clean)), held)

    view = common.context(context_key, x0, chunks, c.context_noise)

    def along(student: Bound):
        """The student's velocity as a function of (x, t), and the direction dx/dt, dt/dt of the trajectory."""
        dt = common.generated(jnp.ones_like(t_x), held)
        return (lambda x, t: student.velocity(x, t, cond, view)), (x, t_x), (v_T.astype(x.dtype), dt)

    if c.one_pass:
        v, tau = jax.jvp(*along(student))
    else:
        _, tau = jax.jvp(*along(student.frozen()))
        v = student.velocity(x, t_x, cond, view)
    v, tau = (u.astype(jnp.promote_types(u.dtype, jnp.float32)) for u in (v, stop(tau)))

    g = common.generated(-(stop(v) - v_T) - r * flow.expand(t, x) * tau, held)
    norm = jnp.sqrt(common.sample_sum(jnp.square(g)))
    g_hat = g / (flow.expand(norm, g) + NORM_FLOOR)
    losses = c.scale * common.sample_sum(common.generated(jnp.square(v - stop(v) - g_hat), held))
    return losses, {"tangent_norm": norm, "warmup": jnp.asarray(r)}
