"""One iteration: guarded gradient, accumulation, optimiser, EMA, counters.

A sample whose loss is not finite costs only itself: its gradient is never mixed with the others' (0·NaN is NaN, so a
mask on the loss alone would not do, spec causal_rcm 4.4.6). The gradient is taken again with a good sample's inputs
in its place and a weight of zero, and the update is the mean over the samples that were kept.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from crcm_jax import compiler
from crcm_jax.errors import UsageError
from crcm_jax.models.base import Params
from crcm_jax.objectives.algorithm import Algorithm, Batch, GradFn, Progress
from crcm_jax.parallel import rules
from crcm_jax.train import ema
from crcm_jax.train.optimizer import Optimizer
from crcm_jax.train.state import TrainState

PURPOSES = ("student", "critic", "init")
"""Each draws from its own stream of keys, so that neither's randomness depends on whether the other ran."""

Metrics = dict[str, jax.Array]
Step = Callable[[TrainState, dict[str, Params], Batch], tuple[TrainState, Metrics]]


def step_key(seed: int, purpose: str, iteration: jax.Array, microbatch: jax.Array | int) -> jax.Array:
    """The key of every draw made for `purpose` in one microbatch of one iteration."""
    key = jax.random.key(seed)
    for word in (PURPOSES.index(purpose), iteration, microbatch):
        key = jax.random.fold_in(key, word)
    return key


class Gradient(NamedTuple):
    """grads: Σ over kept samples of ∇loss / batch size, float32. kept: how many. loss, metrics: sums over them."""

    grads: Params
    kept: jax.Array
    loss: jax.Array
    metrics: Metrics


def _finite(tree: Params) -> jax.Array:
    return jnp.isfinite(optax.tree.norm(tree))


def guarded_gradient(
    grad_fn: GradFn,
    params: Params,
    others: dict[str, Params],
    batch: Batch,
    key: jax.Array,
    progress: Progress,
    share: float,
) -> Gradient:
    """Gradient of share·Σ of the finite samples' losses; `share` is one over the whole batch's size.

    The loop's body is compiled once and runs once, and once more for each time a kept sample turns out not finite.
    Should the gradient still not be finite although every loss is, the whole (micro)batch is given up.
    """
    size = jax.tree.leaves(batch)[0].shape[0]

    def run(keep):
        first_good = jnp.arange(size) == jnp.argmax(keep)

        def replace(x):
            good, kept = (mask.reshape(-1, *[1] * (x.ndim - 1)) for mask in (first_good, keep))
            # A sum, since x[i] would gather a batch that is cut over devices.
            return jnp.where(kept, x, jnp.sum(jnp.where(good, x, 0), 0, x.dtype))

        weights = jnp.where(keep, jnp.float32(share), 0.0)
        return grad_fn(params, others, jax.tree.map(replace, batch), key, progress, weights)

    def body(carry):
        keep, _, _ = carry
        result = run(keep)
        good = keep & jnp.isfinite(result[0][0])
        return good, jnp.all(good == keep), result

    def unfinished(carry):
        keep, settled, _ = carry
        return ~settled & jnp.any(keep)

    everyone = jnp.ones(size, bool)
    blank = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(run, everyone))
    keep, _, ((losses, metrics), grads) = jax.lax.while_loop(unfinished, body, (everyone, jnp.array(False), blank))

    grads = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
    keep = keep & _finite(grads)
    kept = jnp.sum(keep)

    def over_kept(x):
        # A metric is one number a sample, or one number for the batch, which then counts for each sample kept.
        x = jnp.broadcast_to(x.reshape(size, -1).mean(-1) if x.ndim and x.shape[0] == size else jnp.mean(x), (size,))
        return jnp.sum(jnp.where(keep, x.astype(jnp.float32), 0.0))

    grads = jax.tree.map(lambda g: jnp.where(kept > 0, g, 0.0), grads)
    return Gradient(grads, kept, over_kept(losses), {name: over_kept(value) for name, value in metrics.items()})


def accumulated_gradient(
    grad_fn: GradFn,
    params: Params,
    others: dict[str, Params],
    batch: Batch,
    progress: Progress,
    *,
    seed: int,
    purpose: str,
    microbatches: int,
) -> Gradient:
    """The same as one pass over the whole batch, in `microbatches` passes that need less memory.

    Microbatch m takes every `microbatches`-th sample, so that a batch sharded by its first axis stays where it is.
    """
    size = jax.tree.leaves(batch)[0].shape[0]

    def one(index, part):
        key = step_key(seed, purpose, progress.iteration, index)
        return guarded_gradient(grad_fn, params, others, part, key, progress, 1.0 / size)

    if microbatches == 1:
        return one(0, batch)
    parts = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, microbatches, *x.shape[1:]), 1, 0), batch)
    first = jax.tree.map(lambda x: x[0], parts)
    blank = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(one, 0, first))

    def add(total, item):
        return jax.tree.map(jnp.add, total, one(*item)), None

    return jax.lax.scan(add, blank, (jnp.arange(microbatches), parts))[0]


def _apply(
    optimizer: Optimizer, gradient: Gradient, size: int, params: Params, opt
) -> tuple[Params, object, jax.Array, Metrics]:
    """(parameters, optimiser state, whether there was an update, metrics)."""
    scale = size / jnp.maximum(gradient.kept, 1)
    grads = jax.tree.map(lambda g: g * scale, gradient.grads)
    norm = optax.tree.norm(grads)
    learnt = (gradient.kept > 0) & jnp.isfinite(norm)
    updated = optimizer.update(grads, opt, params)
    params, new_opt = jax.tree.map(lambda new, old: jnp.where(learnt, new, old), updated, (params, opt))
    metrics = {name: value / gradient.kept for name, value in gradient.metrics.items()}
    metrics |= {
        "loss": gradient.loss / gradient.kept,
        "grad_norm": norm,
        "lr": optimizer.learning_rate(opt.count),
        "bad_samples": size - gradient.kept,
        "skipped": ~learnt,
    }
    return params, new_opt, learnt, metrics


def _damaged(batch: Batch) -> Metrics:
    """How many damaged examples were passed over for the batch's, where its data count them."""
    return {"damaged_examples": jnp.sum(batch["damaged"])} if "damaged" in batch else {}


def make_steps(
    algorithm: Algorithm,
    optimizer: Optimizer,
    critic_optimizer: Optimizer | None = None,
    *,
    ema_rate: float = 0.1,
    seed: int = 0,
    accumulate: int = 1,
    shardings: TrainState | None = None,
) -> tuple[Step, Step | None]:
    """(student step, critic step or None), jitted: `(state, others, batch) -> (state, metrics)`; the state is donated.

    shardings: how the state lies on the devices, before a step and so after it; None leaves that to the compiler.
    `others` holds the frozen trees that the algorithm reads. Metrics are float32 scalars; besides the objective's own:
    `loss`, `grad_norm`, `lr`, `bad_samples`, `skipped`, `bad_streak`, and `damaged_examples` if the batch counts them.
    """
    gamma = ema.exponent(ema_rate)

    mesh = None if shardings is None else jax.tree.leaves(shardings)[0].mesh

    def pieces(params):
        """Each device updates its own part of what it holds."""
        return params if mesh is None else rules.in_pieces(params, mesh)

    def advance(state, size, kept, learnt, metrics, **changes):
        streak = jnp.where(learnt, 0, state.bad_streak + 1)
        state = state.replace(
            bad_samples=state.bad_samples + (size - kept),
            skipped_updates=state.skipped_updates + ~learnt,
            bad_streak=streak,
            **changes,
        )
        return state, {name: jnp.float32(value) for name, value in metrics.items()} | {
            "bad_streak": jnp.float32(streak)
        }

    def gradient_of(grad_fn, params, others, batch, progress, purpose):
        size = jax.tree.leaves(batch)[0].shape[0]
        if size % accumulate:
            raise UsageError(f"a batch of {size} does not split into optim.accumulate = {accumulate} equal parts")
        gradient = accumulated_gradient(
            grad_fn, params, others, batch, progress, seed=seed, purpose=purpose, microbatches=accumulate
        )
        return gradient, size

    def student_step(state, others, batch):
        if state.critic is not None:
            others = others | {"critic": state.critic}
        progress = state.progress
        gradient, size = gradient_of(algorithm.student, state.params, others, batch, progress, "student")
        params, opt, learnt, metrics = _apply(optimizer, gradient, size, pieces(state.params), state.opt)
        params = pieces(params)
        metrics |= _damaged(batch)
        averaged = ema.update(state.ema, params, progress.student_updates, gamma)
        averaged = jax.tree.map(lambda new, old: jnp.where(learnt, new, old), averaged, state.ema)
        progress = progress._replace(iteration=progress.iteration + 1, student_updates=progress.student_updates + 1)
        changes = {"params": params, "ema": averaged, "opt": opt, "progress": progress}
        return advance(state, size, gradient.kept, learnt, metrics, **changes)

    def critic_step(state, others, batch):
        others = others | {"student": state.params}
        progress = state.progress
        gradient, size = gradient_of(algorithm.critic, state.critic, others, batch, progress, "critic")
        critic, opt, learnt, metrics = _apply(critic_optimizer, gradient, size, pieces(state.critic), state.critic_opt)
        critic = pieces(critic)
        metrics |= _damaged(batch)
        progress = progress._replace(iteration=progress.iteration + 1, critic_updates=progress.critic_updates + 1)
        changes = {"critic": critic, "critic_opt": opt, "progress": progress}
        return advance(state, size, gradient.kept, learnt, metrics, **changes)

    options = compiler.options()
    jit = functools.partial(jax.jit, donate_argnums=0, out_shardings=(shardings, None), compiler_options=options)
    return jit(student_step), None if algorithm.critic is None else jit(critic_step)
