"""A run: data in, iterations, log lines, clips and checkpoints out, until it is done or told to stop."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax

from crcm_jax.errors import blame_config
from crcm_jax.models.base import Params
from crcm_jax.parallel import mesh as meshes
from crcm_jax.parallel import plan, processes
from crcm_jax.parallel.rules import Layout
from crcm_jax.recipes.base import Training
from crcm_jax.saving import storage
from crcm_jax.train import identity, logging, state
from crcm_jax.train.checkpoint import Checkpoints
from crcm_jax.train.optimizer import Optimizer
from crcm_jax.train.step import Frozen, make_steps

SAMPLES = "samples"

Sampler = Callable[[Params, int, Path], None]
"""`(EMA weights, iteration, folder)`: writes clips into the folder."""


@dataclasses.dataclass
class Initial:
    """What a new run starts from, lying on its mesh already. `run` empties `players`, by name, so that weights of which
    it has its own copy can be freed."""

    players: dict[str, Params]
    frozen: Frozen


def run(
    config,
    workdir: str | Path,
    *,
    training: Training,
    data: Iterable[dict[str, Any]],
    init: Initial,
    sampler: Sampler | None = None,
) -> state.TrainState:
    """Trains until `config.train.steps` iterations or a signal, going on from the workdir's last whole checkpoint.

    data: its iterator gives numpy batches of one shape (to each of several processes its `processes.rows`) and has
    `get_state` (bytes, or anything JSON can hold) and `set_state`. Returns the last state, saved. UserError: the
    workdir holds another run or only damaged checkpoints, no sample's loss was finite for three iterations, a
    checkpoint could not be written, processes were started with different configurations.
    """
    workdir = Path(workdir)
    identity.require_same(config)
    with contextlib.ExitStack() as stack:

        def claim():
            stack.enter_context(identity.claim(workdir, config, ours=(storage.FOLDER, logging.JSONL)))

        processes.decided_by_first(claim)
        return _run(config, workdir, training, data, init, sampler)


def _run(config, workdir, training, data, init, sampler) -> state.TrainState:
    mesh = meshes.make(config)
    layout = Layout(mesh, training.rules)
    with blame_config():
        optimizers = {name: Optimizer.from_config(config[p.optim]) for name, p in training.players.items()}

        def fresh(params):
            return state.create(params, training.players, optimizers)

        like = layout.abstract(jax.eval_shape(fresh, init.players))
        placed = jax.tree.map(lambda x: x.sharding, like)
        accumulate = config.optim.get("accumulate", 1)
        steps = make_steps(training, optimizers, seed=config.seed, accumulate=accumulate, shardings=placed)
    settings, iterator, frozen = config.train, iter(data), init.frozen
    plan.refuse_what_cannot_fit(plan.of_state(like, layout.abstract(frozen.params)), mesh)

    checkpoints = Checkpoints(workdir, config, settings.keep)
    restored = checkpoints.restore(like)
    if restored is None:
        # Compiled, so that each device makes its own part and none holds the whole.
        now, window = jax.jit(fresh, out_shardings=placed)(init.players), None
    else:
        now, data_state, window = restored
        iterator.set_state(data_state)
    restored = None
    init.players.clear()
    iteration = int(now.iteration)
    first = processes.is_first()
    if iteration and first:
        print(f"crcm: {workdir} goes on from iteration {iteration}", file=sys.stderr)

    sections = {name: player.optim for name, player in training.players.items()}
    log = logging.RunLog(
        workdir, iteration, settings.steps, settings.log_every, window, sections=sections, quiet=not first
    )
    cut, size = meshes.samples(mesh), config.data.batch_size
    compiled = set()

    def save():
        log.flush()
        with jax.transfer_guard("allow"):
            checkpoints.save(now, iterator.get_state(), log.state())

    # Closed in reverse: a save under way is finished, and its failure reported, whatever happens, a signal too.
    with processes.StopSignal() as stop, contextlib.closing(log), checkpoints:
        while iteration < settings.steps and not stop.agreed():
            player = training.turns.player(iteration)
            with log.waiting():
                batch = processes.place(next(iterator), cut, size)
            # Tracing moves constants to the device; once compiled, a step that moves anything by accident is a mistake.
            with jax.transfer_guard("disallow" if player in compiled else "allow"):
                now, metrics = steps[player](now, frozen, batch)
            compiled.add(player)
            iteration += 1
            counts = {f"{name}_updates": count for name, count in training.turns.counts(iteration).items()}
            log.push(iteration, player, metrics, counts)
            checkpoints.check()
            if settings.save_every and iteration % settings.save_every == 0:
                save()
            if sampler and settings.sample_every and iteration % settings.sample_every == 0:
                weights = processes.whole(now.players["student"].averages["ema"])
                if first:
                    (workdir / SAMPLES).mkdir(exist_ok=True)
                    sampler(weights, iteration, workdir / SAMPLES)
        save()
    return now
