"""One iteration: guarded gradient, accumulation, optimiser, averages, counters.

A sample whose loss is not finite costs only itself: its gradient is never mixed with the others' (0·NaN is NaN, so a
mask on the loss alone would not do, spec causal_rcm 4.4.6). The gradient is taken again with a good sample's inputs
in its place and a weight of zero, and the update is the mean over the samples that were kept.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from crcm_jax import compiler
from crcm_jax.errors import UsageError
from crcm_jax.models.base import Condition, Params
from crcm_jax.models.bound import Bound
from crcm_jax.parallel.rules import Layout
from crcm_jax.recipes.base import Batch, GradFn, Nets, Player, Progress, Training
from crcm_jax.train.optimizer import Optimizer, OptimizerState
from crcm_jax.train.state import PlayerState, TrainState

PURPOSES = {"student": 0, "critic": 1, "init": 2}
"""Each purpose draws from its own stream of keys, so that nobody's randomness depends on whether another ran. Players
of other names have a word of their own."""

Metrics = dict[str, jax.Array]


class Frozen(NamedTuple):
    """What a run's losses read and nobody trains: networks' parameters by role, and the negative prompt."""

    params: dict[str, Params]
    uncond: Condition | None


Step = Any
"""A jitted `(state, frozen, batch) -> (state, metrics)`, with `jax.jit`'s `trace` and `lower`."""


def step_key(seed: int, purpose: str, iteration: jax.Array | int, microbatch: jax.Array | int) -> jax.Array:
    """The key of every draw made for `purpose` in one microbatch of one iteration."""
    key = jax.random.key(seed)
    for word in (PURPOSES.get(purpose, zlib.crc32(purpose.encode())), iteration, microbatch):
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
    grad_fn: GradFn, nets: Nets, batch: Batch, key: jax.Array, progress: Progress, share: float
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
        return grad_fn(nets, jax.tree.map(replace, batch), key, progress, weights)

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

    def over_kept(name, x):
        # A number for the batch counts for each sample kept.
        if x.ndim and x.shape != (size,):
            raise ValueError(f"metric {name} has shape {x.shape}: give one number, or one a sample, [{size}]")
        return jnp.sum(jnp.where(keep, jnp.broadcast_to(x, (size,)).astype(jnp.float32), 0.0))

    grads = jax.tree.map(lambda g: jnp.where(kept > 0, g, 0.0), grads)
    return Gradient(grads, kept, over_kept("loss", losses), {name: over_kept(name, x) for name, x in metrics.items()})


def accumulated_gradient(
    grad_fn: GradFn, nets: Nets, batch: Batch, progress: Progress, *, seed: int, purpose: str, microbatches: int
) -> Gradient:
    """The same as one pass over the whole batch, in `microbatches` passes that need less memory.

    Microbatch m takes every `microbatches`-th sample, so that a batch sharded by its first axis stays where it is.
    """
    size = jax.tree.leaves(batch)[0].shape[0]

    def one(index, part):
        key = step_key(seed, purpose, progress.iteration, index)
        return guarded_gradient(grad_fn, nets, part, key, progress, 1.0 / size)

    if microbatches == 1:
        return one(0, batch)
    parts = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, microbatches, *x.shape[1:]), 1, 0), batch)
    first = jax.tree.map(lambda x: x[0], parts)
    blank = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(one, 0, first))

    def add(total, item):
        return jax.tree.map(jnp.add, total, one(*item)), None

    return jax.lax.scan(add, blank, (jnp.arange(microbatches), parts))[0]


def _apply(
    optimizer: Optimizer, gradient: Gradient, size: int, params: Params, opt: OptimizerState
) -> tuple[Params, OptimizerState, jax.Array, Metrics]:
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


def nets_of(training: Training, state: TrainState, frozen: Frozen) -> Nets:
    """Every network of a run with its parameters, as losses read them: players, their averages, and what is frozen."""
    bound = {role: Bound(training.networks[role], params) for role, params in frozen.params.items()}
    for name, player in state.players.items():
        network = training.networks[name]
        bound[name] = Bound(network, player.params)
        bound |= {f"{name}.{average}": Bound(network, tree) for average, tree in player.averages.items()}
    return Nets(bound, frozen.uncond)


def step_name(player: str) -> str:
    """What a player's step is called as a compiled program, in profiles and in what the compiler writes of it."""
    return f"{player}_step"


def make_steps(
    training: Training,
    optimizers: Mapping[str, Optimizer],
    *,
    seed: int = 0,
    accumulate: int = 1,
    shardings: TrainState | None = None,
) -> dict[str, Step]:
    """The step of each player, jitted: `(state, frozen, batch) -> (state, metrics)`; the state is donated.

    shardings: how the state lies on the devices, before a step and so after it; None leaves that to the compiler.
    Metrics are float32 scalars; besides the objective's own: `loss`, `grad_norm`, `lr`, `bad_samples`, `skipped`,
    `bad_streak`, and `damaged_examples` if the batch counts them.
    """
    mesh = None if shardings is None else jax.tree.leaves(shardings)[0].mesh

    def pieces(tree):
        """Each device updates its own part of what it holds; gradients are summed by reduce-scatter, never whole."""
        return tree if mesh is None else Layout(mesh, training.rules).in_pieces(tree)

    def step_of(name: str, player: Player, optimizer: Optimizer):
        def cut(*args):
            result, grads = player.gradient(*args)
            return result, pieces(grads)

        def step(state: TrainState, frozen: Frozen, batch: Batch):
            size = jax.tree.leaves(batch)[0].shape[0]
            if size % accumulate:
                raise UsageError(f"a batch of {size} does not split into optim.accumulate = {accumulate} equal parts")
            nets, own = nets_of(training, state, frozen), state.players[name]
            gradient = accumulated_gradient(
                cut, nets, batch, state.progress, seed=seed, purpose=name, microbatches=accumulate
            )
            params, opt, learnt, metrics = _apply(optimizer, gradient, size, pieces(own.params), own.opt)
            params = pieces(params)
            metrics |= _damaged(batch)
            averages = {
                average: _averaged(law, own.averages[average], params, own.updates, learnt)
                for average, law in player.averages.items()
            }
            return _advanced(state, name, PlayerState(params, opt, own.updates + 1, averages), learnt, metrics)

        step.__name__ = step_name(name)
        return step

    options = compiler.options()
    jit = functools.partial(jax.jit, donate_argnames="state", out_shardings=(shardings, None), compiler_options=options)
    return {name: jit(step_of(name, player, optimizers[name])) for name, player in training.players.items()}


def _averaged(law, average: Params, params: Params, index: jax.Array, learnt: jax.Array) -> Params:
    """The average after an update, or as it was where the update taught nothing."""
    return jax.tree.map(lambda new, old: jnp.where(learnt, new, old), law.update(average, params, index), average)


def _advanced(
    state: TrainState, name: str, player: PlayerState, learnt: jax.Array, metrics: Metrics
) -> tuple[TrainState, Metrics]:
    """The state after an iteration of a player, and the metrics as they are logged."""
    streak = jnp.where(learnt, 0, state.bad_streak + 1)
    state = state.replace(
        iteration=state.iteration + 1,
        players={**state.players, name: player},
        bad_samples=state.bad_samples + metrics["bad_samples"],
        skipped_updates=state.skipped_updates + ~learnt,
        bad_streak=streak,
    )
    metrics = {key: jnp.float32(value) for key, value in metrics.items()}
    return state, metrics | {"bad_streak": jnp.float32(streak)}
