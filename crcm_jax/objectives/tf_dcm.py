"""TF-dCM: the discrete-time consistency objective under teacher forcing (spec causal_rcm 4.3)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from crcm_jax import flow
from crcm_jax.chunks import ChunkPattern
from crcm_jax.models.base import Condition, Network
from crcm_jax.models.guidance import guided_velocity
from crcm_jax.objectives import common


def tf_dcm(
    network: Network, params, batch, cond: Condition, key, *,
    teacher_network: Network, teacher, uncond: Condition | None, chunks: ChunkPattern,
    guidance: float = 3.0, levels: int = 48, skip: int = 1, time_shift: float = 3.0,
    context_noise=common.ContextNoise(), scale: float = 100.0,
):  # fmt: skip
    """The student's x0 at t_0 must equal its x0 at t_n, `skip` teacher steps down the same trajectory.

    The target is the live student under stop-gradient (no EMA). Returns (losses `[batch]`, metrics).
    """
    x0 = batch["latents"]
    time_key, noise_key, online_key, target_key = jax.random.split(key, 4)
    t = flow.consistency_times(time_key, x0.shape[0], skip, levels, time_shift)
    now = lambda k: t[:, k : k + 1]  # noqa: E731
    x = flow.interpolate(x0, jax.random.normal(noise_key, x0.shape), now(0))

    def predict(params, x, t, key):
        seen = common.context(key, x0, chunks, context_noise)
        return flow.to_clean(x, network.velocity(params, x, t, cond, context=seen), t)

    online = predict(params, x, now(0), online_key)

    # The teacher's context is always clean, also where the student's is noisy.
    clean = common.context(key, x0, chunks, common.ContextNoise())
    for k in range(skip):
        v = guided_velocity(teacher_network, teacher, x, now(k), cond, uncond, guidance, context=clean)
        x = flow.euler(x, v, now(k), now(k + 1))
    target = predict(jax.lax.stop_gradient(params), x, now(skip), target_key)

    error = common.frame_mean(jnp.square(online - jax.lax.stop_gradient(target)))
    return scale * jnp.sum(error, 1), {}
