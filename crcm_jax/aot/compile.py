"""The real train step, compiled for devices that are not there: what it needs, moves and computes on each of them.

For TPUs the compiler is theirs, from the libtpu wheel, with the Pallas kernels inside: the program is the one that a
slice would run. No compiler for GPUs runs without one, so for those the step is cut up for as many CPU devices: which
collectives a mesh takes is found out, and not how much memory.
"""

from __future__ import annotations

import contextlib
import functools
import math
import multiprocessing
import re
import resource
import tempfile
import time
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh
from ml_collections import ConfigDict

from crcm_jax import parts, recipes
from crcm_jax.aot import chips, dumps, flops, hlo
from crcm_jax.errors import UsageError, UserError
from crcm_jax.models.base import Condition
from crcm_jax.parallel import mesh as meshes
from crcm_jax.parallel import plan, rules
from crcm_jax.recipes import Training
from crcm_jax.recipes.options import rollout_plan
from crcm_jax.train import state as states
from crcm_jax.train.optimizer import Optimizer
from crcm_jax.train.step import Frozen, make_steps, step_name
from pallas_kernels.attention import mosaic_tpu

# How libtpu says that a program needs more memory than there is; of temporaries, where they alone are too much.
_NEEDED = re.compile(
    r"(?:Used|temporaries) \(?([\d.]+)([KMGT]?)\)? (?:of|exceeds available HBM) \(?([\d.]+)([KMGT]?)\b"
)


class Target(NamedTuple):
    """What to compile for. machine: how many devices one fast network joins; on_chip: whether for the chip itself."""

    topology: str
    devices: list[Any]
    chip: chips.Chip
    machine: int
    on_chip: bool


class Inputs(NamedTuple):
    """The arguments of a step, as shapes with shardings."""

    state: states.TrainState
    frozen: Frozen
    batch: dict[str, Any]

    def networks(self) -> dict[str, Any]:
        """The parameters of every network, by role."""
        return {**{name: player.params for name, player in self.state.players.items()}, **self.frozen.params}


class Run(NamedTuple):
    """A configuration on a target."""

    config: ConfigDict
    target: Target
    mesh: Mesh
    training: Training
    inputs: Inputs


class Traced(NamedTuple):
    """One player's step before compilation."""

    player: str
    program: Any
    """`jax.stages.Traced`."""
    seconds: float
    flops: float
    """Of matrix products, the whole step's over the number of devices."""
    compute_seconds: float
    """`flops` at the chip's peak."""


class Compiled(NamedTuple):
    """One player's step. Bytes are those on one device; 0 where it was not compiled for the chip."""

    seconds: float
    cpu_seconds: float
    """Of all threads together."""
    arguments: int
    """State and frozen trees: what `plan` counts, padded as the chip lays arrays out."""
    peak: int
    """Arguments, activations, gradients, buffers of communication, and the program itself, if there is one."""
    code: int
    """The program itself; 0 where the compiler stopped before it."""
    collectives: list[hlo.Collective]

    @property
    def link_seconds(self) -> float:
        """Everything that is sent, one after another, at the links' peak."""
        return sum(c.seconds for c in self.collectives)

    @property
    def largest_gather(self) -> int:
        """Bytes of the largest all-gather's result."""
        return max((c.largest for c in self.collectives if c.kind == "all-gather"), default=0)


def target(topology: str) -> Target:
    """The devices of a topology such as `v5p:2x2x1` or `h200:8`.

    UserError without libtpu, or if this process has already made fewer CPU devices than there would be GPUs; UsageError
    for a topology that nothing knows.
    """
    gpus = chips.gpus(topology)
    if gpus:
        with contextlib.suppress(RuntimeError):  # too late: then it has as many devices as it has
            jax.config.update("jax_num_cpu_devices", gpus.total)
        devices: list[Any] = jax.devices("cpu")
        if len(devices) < gpus.total:
            raise UserError(f"--topology={topology} needs a process of its own: this one has {len(devices)} devices")
        return Target(topology, devices[: gpus.total], gpus.chip, gpus.machine, on_chip=False)
    try:
        devices = list(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)
    except Exception as error:
        if "libtpu" in str(error).lower() or isinstance(error, ImportError | NotImplementedError):
            raise UserError(
                "compiling for a TPU needs its compiler, libtpu: pip install 'causal-rcm-jax[tpu]'"
            ) from error
        raise UsageError(
            f"--topology={topology} is not one that libtpu knows: use a generation and the chips along each side, "
            "for example v5p:2x2x1, v5p:4x4x8, v6e:16x16 or tpu7x:2x2x1, or GPUs by count, h200:8 or h100:8x4"
        ) from error
    return Target(topology, devices, chips.tpu(devices[0].device_kind), len(devices), on_chip=True)


def prepare(config: ConfigDict, target: Target) -> Run:
    """What a run of `config` passes to its steps, cut over the mesh; nothing is allocated.

    UsageError, or what the config's own checks raise, if it does not agree with itself or with the target.
    """
    if target.on_chip and not config.model.get("attention"):
        config = _with_attention(config, "mosaic_tpu")  # what it will be there, where the default device is a TPU
    mesh = meshes.make(config, target.devices)
    training = recipes.make(config, mesh)
    return Run(config, target, mesh, training, _inputs(config, training, mesh))


def trace_step(run: Run, player: str) -> Traced:
    """Traces the step of `player` and counts its work."""
    began = time.perf_counter()
    program = _trace(run, run.training, player)
    seconds = time.perf_counter() - began
    counted = program
    if run.config.model.get("attention") != "mosaic_tpu":
        # Kernels say what they cost; other attention hides it in loops over tiles.
        in_kernels = recipes.make(_with_attention(run.config, "mosaic_tpu"), run.mesh)
        counted = _trace(run, in_kernels, player)
    work = flops.matmul_flops(counted.jaxpr.jaxpr, _rolls(run)) / len(run.target.devices)
    return Traced(player, program, seconds, work, work / run.target.chip.flops)


def compile_step(run: Run, step: Traced) -> Compiled:
    """Compiles a traced step. UserError if it needs more memory than a device has, by how much, and what to do."""
    began, cpu_began = time.perf_counter(), time.process_time()
    with tempfile.TemporaryDirectory(prefix="crcm_aot_") as folder:
        compiled = _compile(run, step.player, step.program, folder)
        seconds = time.perf_counter() - began, time.process_time() - cpu_began
        if not run.target.on_chip:
            return Compiled(*seconds, 0, 0, 0, _collectives(run, compiled.as_text()))
        memory = compiled.memory_analysis()
        arguments, code = memory.argument_size_in_bytes, memory.generated_code_size_in_bytes
        peak = arguments + memory.output_size_in_bytes - memory.alias_size_in_bytes + memory.temp_size_in_bytes + code
        _check(run, step.player, peak)
        return Compiled(*seconds, arguments, peak, code, _collectives(run, dumps.text(folder)))


def optimise_step(run: Run, step: Traced) -> Compiled:
    """As `compile_step`, for a TPU, without the machine code, which takes most of the time: memory and collectives are
    settled before it.

    The compiler cannot be told to stop there. So it works in a process of its own, which traces the step again, and is
    ended as soon as the optimised program is written.
    """
    began, cpu_began = time.perf_counter(), _cpu_of_children()
    with tempfile.TemporaryDirectory(prefix="crcm_aot_") as folder:
        _optimise_elsewhere(run, step.player, folder)
        seconds = time.perf_counter() - began, _cpu_of_children() - cpu_began
        arguments, peak = dumps.memory(folder)
        _check(run, step.player, peak)
        return Compiled(*seconds, arguments, peak, 0, _collectives(run, dumps.text(folder)))


def layer_bytes(inputs: Inputs) -> int:
    """Bytes of the parameters of one layer, whole, of the network whose layers are largest."""
    blocks = [tree["blocks"] for tree in inputs.networks().values()]
    return max(sum(math.prod(x.shape[1:]) * x.dtype.itemsize for x in jax.tree.leaves(tree)) for tree in blocks)


def leaf_bytes(inputs: Inputs) -> int:
    """Bytes of the largest leaf of trained weights, as it lies on one device: what an update may put together."""
    players = [player.params for player in inputs.state.players.values()]
    return max(rules.device_bytes(leaf) for leaf in jax.tree.leaves(players))


def undivided(run: Run) -> list[str]:
    """One line for each weight, of each network, that a rule would cut and whose length does not divide."""
    lines: list[str] = []
    for tree in run.inputs.networks().values():
        rules.Layout(run.mesh, run.training.rules).shardings(tree, lines.append)
    return list(dict.fromkeys(lines))


def _inputs(config: ConfigDict, training: Training, mesh: Mesh) -> Inputs:
    key = jax.eval_shape(jax.random.key, 0)
    dtype = jnp.dtype(config.param_dtype)
    layout = rules.Layout(mesh, training.rules)

    def weights(role):
        return jax.eval_shape(lambda k: jax.tree.map(lambda x: x.astype(dtype), training.networks[role].init(k)), key)

    optimizers = _optimizers(config, training)
    state = jax.eval_shape(
        lambda params: states.create(params, training.players, optimizers), {name: weights(name) for name in optimizers}
    )
    size, cut = config.data.batch_size, meshes.samples(mesh)

    def prompt(rows, sharding):
        shapes = parts.prompt_shape(config).items()
        return {n: jax.ShapeDtypeStruct((rows, *shape), jnp.float32, sharding=sharding) for n, shape in shapes}

    latents = jax.ShapeDtypeStruct((size, *parts.latent_shape(config)), jnp.float32, sharding=cut)
    uncond = Condition(prompt(1, meshes.whole(mesh)))
    frozen = Frozen({role: layout.abstract(weights(role)) for role in training.reads}, uncond)
    return Inputs(layout.abstract(state), frozen, {"latents": latents, "prompt": prompt(size, cut)})


def _trace(run: Run, training: Training, player: str):
    steps = make_steps(
        training,
        _optimizers(run.config, training),
        seed=run.config.seed,
        accumulate=run.config.optim.get("accumulate", 1),
        shardings=jax.tree.map(lambda x: x.sharding, run.inputs.state),
    )
    with mosaic_tpu.compile_for(run.target.chip.name if run.target.on_chip else "v5p"):
        return steps[player].trace(*run.inputs)


def _compile(run: Run, player: str, program: Any, folder: str):
    """program: `jax.stages.Traced`; folder: for what the compiler writes beside."""
    if not run.target.on_chip:
        # Only how the program is cut up is of interest, not how well a CPU would run it.
        options = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
        return program.lower().compile(compiler_options=options)
    options = dumps.options(folder, step_name(player))
    try:
        return program.lower(lowering_platforms=("tpu",)).compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        used = _NEEDED.search(str(error))
        if not used:
            raise
        need, has = (float(used[i]) * 1024 ** " KMGT".index(used[i + 1] or " ") for i in (1, 3))
        raise UserError(_lack(run, player, need, has)) from error


def _optimise_elsewhere(run: Run, player: str, folder: str) -> None:
    """Returns once `folder` is complete. UserError as `_compile`; RuntimeError if the compiler gave up."""
    processes = multiprocessing.get_context("spawn")
    answers, answer = processes.Pipe(duplex=False)
    arguments = run.config, run.target.topology, player, folder, answer
    process = processes.Process(target=_optimise_here, args=arguments, daemon=True)
    process.start()
    answer.close()
    try:
        while not dumps.complete(folder):
            if answers.poll(0.2):
                raise answers.recv()
    except EOFError:
        process.join()
        if not dumps.complete(folder):
            raise RuntimeError(f"the compiler ended with {process.exitcode}; it says above why") from None
    finally:
        process.kill()
        process.join()


def _optimise_here(config: ConfigDict, topology: str, player: str, folder: str, answer: Connection) -> None:
    """In the process that `_optimise_elsewhere` ends."""
    try:
        run = prepare(config, target(topology))
        _compile(run, player, _trace(run, run.training, player), folder)
    except UserError as error:
        answer.send(error)


def _cpu_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _check(run: Run, player: str, peak: int) -> None:
    if peak > run.target.chip.hbm:
        raise UserError(_lack(run, player, peak, run.target.chip.hbm))


def _collectives(run: Run, text: str) -> list[hlo.Collective]:
    speed = functools.partial(chips.speed, run.target.chip, run.target.machine)
    return hlo.collectives(text, len(run.target.devices), speed, _rolls(run))


def _rolls(run: Run) -> int:
    """How often the loop runs over a rollout's steps, whose number changes from update to update, at most: the last
    step stands by itself."""
    return max(1, rollout_plan(run.config).schedule.most - 1)


def _with_attention(config: ConfigDict, name: str) -> ConfigDict:
    config = ConfigDict(config.to_dict())
    config.model.attention = name
    return config


def _lack(run: Run, player: str, need: float, has: float) -> str:
    return (
        f"the {player}'s step does not fit: it needs {need / plan.GIB:.1f} GiB on each device, "
        f"{(need - has) / plan.GIB:.1f} GiB more than the {has / plan.GIB:.1f} GiB it has: "
        f"{plan.mend(run.mesh, need / has)}"
    )


def _optimizers(config: ConfigDict, training: Training) -> dict[str, Optimizer]:
    return {name: Optimizer.from_config(config[player.optim]) for name, player in training.players.items()}
