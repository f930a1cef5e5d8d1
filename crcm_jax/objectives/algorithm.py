"""The one shape that every training type has, so that one loop trains them all."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax

from crcm_jax.models.base import Params

Batch = dict[str, jax.Array]
"""`latents` `[batch, frame, height, width, channel]` and `text` `[batch, token, channel]`, float32."""


class Progress(NamedTuple):
    """How far a run is; int32 scalars, traced, so that no step count recompiles a step."""

    iteration: jax.Array
    student_updates: jax.Array
    critic_updates: jax.Array


LossFn = Callable[..., tuple[jax.Array, dict[str, jax.Array]]]
"""`(params, others, batch, key, progress) -> (losses [batch], metrics)`; pure, one loss a sample."""

GradFn = Callable[..., tuple[tuple[jax.Array, dict[str, jax.Array]], Params]]
"""`(params, others, batch, key, progress, weights) -> ((losses, metrics), gradient of Σ_b weights_b·losses_b)`."""


def gradient_of(loss: LossFn) -> GradFn:
    """The plain way from a loss to its gradient: one reverse pass over the weighted sum of the samples' losses."""

    def grad_fn(params, others, batch, key, progress, weights):
        def total(params):
            losses, metrics = loss(params, others, batch, key, progress)
            # A weight of zero removes a sample even where its loss is not finite.
            return jax.numpy.sum(jax.numpy.where(weights > 0, weights * losses, 0.0)), (losses, metrics)

        grads, aux = jax.grad(total, has_aux=True)(params)
        return aux, grads

    return grad_fn


@dataclasses.dataclass(frozen=True)
class Algorithm:
    """A training type: what the student (and the critic, if there is one) minimise, and when.

    `others` that a GradFn receives are the trees it reads but does not train: `teacher`, `real` (frozen), `uncond`
    (the negative prompt's embedding, `[1, token, channel]`), and the other player (`critic` for the student's loss,
    `student` for the critic's). `reads` names the frozen ones.
    """

    student: GradFn
    critic: GradFn | None = None
    reads: tuple[str, ...] = ()
    student_update_freq: int = 1
    """A student update every so many iterations, critic updates in between (spec causal_rcm 4.5)."""
    student_only_iterations: int = 0
    """The first iterations all update the student (`tangent_warmup` of the joint type)."""

    def is_student_phase(self, iteration: int) -> bool:
        """Whether `iteration` (from 0) updates the student (spec causal_rcm 4.5, phases)."""
        if self.critic is None or iteration < self.student_only_iterations:
            return True
        return (iteration - self.student_only_iterations) % self.student_update_freq == 0

    def counts(self, iteration: int) -> tuple[int, int]:
        """(student updates, critic updates) that precede `iteration`."""
        warm, freq = self.student_only_iterations, self.student_update_freq
        if self.critic is None or iteration <= warm:
            return iteration, 0
        student = warm + -(-(iteration - warm) // freq)
        return student, iteration - student
