"""TF-dCM: the discrete-time consistency objective under teacher forcing (spec causal_rcm 4.3)."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from crcm_jax import flow
from crcm_jax.models.base import Condition
from crcm_jax.models.bound import Bound
from crcm_jax.objectives import common


@dataclasses.dataclass(frozen=True)
class Levels:
    """The grid of a discrete consistency model: how many times it has, how they are shifted, and how many teacher steps
    lie between the two of them that are held together."""

    count: int = 48
    skip: int = 1
    shift: float = 3.0

    def draw(self, key, size: int):
        """Neighbouring times t_0 > … > t_skip, `[size, skip + 1]`."""
        return flow.consistency_times(key, size, self.skip, self.count, self.shift)


_LEVELS = Levels()


@dataclasses.dataclass(frozen=True)
class DiscreteTime:
    """The constants of TF-dCM. guidance: of the teacher. context_noise: of the student's context, the teacher's is
    clean."""

    levels: Levels = _LEVELS
    guidance: float = 3.0
    context_noise: common.ContextNoise = common.CLEAN
    scale: float = 100.0


def tf_dcm(
    student: Bound,
    batch,
    cond: Condition,
    key,
    *,
    teacher: Bound,
    uncond: Condition | None,
    constants: DiscreteTime = DiscreteTime(),
):
    """The student's x0 at t_0 must equal its x0 at t_n, `skip` teacher steps down the same trajectory.

    The target is the live student under stop-gradient (no EMA). Returns (losses `[batch]`, metrics).
    """
    c, levels = constants, constants.levels
    x0, held = batch["latents"], common.given(batch)
    time_key, noise_key, online_key, target_key = jax.random.split(key, 4)
    t = levels.draw(time_key, x0.shape[0])

    def now(k):
        return t[:, k : k + 1] if held is None else held.times(jnp.broadcast_to(t[:, k : k + 1], held.frames.shape))

    x, _ = common.noised(x0, jax.random.normal(noise_key, x0.shape), t[:, :1], held)

    def predict(student, x, t, key):
        view = common.context(key, x0, student.chunks, c.context_noise)
        return flow.to_clean(x, student.velocity(x, t, cond, view), t)

    online = predict(student, x, now(0), online_key)

    # The teacher's context is always clean, also where the student's is noisy.
    clean = common.context(key, x0, student.chunks)
    for k in range(levels.skip):
        v = teacher.guided(x, now(k), cond, uncond, c.guidance, clean)
        x = flow.euler(x, v, now(k), now(k + 1))
    target = predict(student.frozen(), x, now(levels.skip), target_key)

    error = common.frame_mean(jnp.square(online - jax.lax.stop_gradient(target)))
    return c.scale * jnp.sum(common.generated(error, held), 1), {}
