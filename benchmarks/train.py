"""Speed and memory of the real train step with random weights, whole and by its parts.

    python -m benchmarks.train
    python -m benchmarks.train --training sf_dmd --only step
    python -m benchmarks.train --teacher 14b --chunks 3-3 --profile /tmp/trace

The step is the one that `crcm train` runs: its losses from the configuration, its optimiser, averages and guards, on
any mesh (`--mesh=fsdp=4`). Parts are compiled by themselves, so that their sum need not be the step's time. "Useful"
operations are counted by `bench_work`; compilation is timed apart. `--tiny` checks the program itself, anywhere.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from benchmarks import kernel_times
from benchmarks.train_work import Clip
from benchmarks.wan import random_params
from crcm_jax import compiler, parts, recipes
from crcm_jax.configs import wan_shapes
from crcm_jax.models.base import ITSELF, Condition, TeacherForcing
from crcm_jax.models.wan.config import REMAT
from crcm_jax.objectives import common
from crcm_jax.objectives.sf_dmd import Scores, dmd_target
from crcm_jax.parallel import axes, plan
from crcm_jax.parallel import mesh as meshes
from crcm_jax.parallel.rules import Layout
from crcm_jax.recipes import Training
from crcm_jax.recipes.options import conditions, matching
from crcm_jax.sampling.rollout import frozen_rollout, replay
from crcm_jax.train import state as states
from crcm_jax.train.optimizer import Optimizer
from crcm_jax.train.step import Frozen, make_steps, nets_of
from pallas_kernels.attention import IMPLEMENTATIONS

TINY = {"dim": 32, "ffn_dim": 64, "heads": 4, "layers": 2, "freq_dim": 16, "text_dim": 64}
TRAINING = ("tf_scm", "sf_dmd")
TIME = 0.7
"""At which t the parts run; work does not depend on it."""


class Row(NamedTuple):
    """One thing to time: `function(*arguments())`."""

    name: str
    function: Callable
    arguments: Callable[[], tuple]
    useful: float
    """Operations over all devices, 0 where they do not matter."""
    again: Callable | None = None
    """Where the first argument is given away and comes back as the first result: what makes it an argument again."""


@dataclasses.dataclass
class Run:
    """What a run of `config` holds, on the devices of `mesh`."""

    config: Any
    mesh: Mesh
    training: Training
    optimizers: dict[str, Optimizer]
    state: states.TrainState
    frozen: Frozen
    batch: dict[str, Any]

    @property
    def nets(self):
        return nets_of(self.training, self.state, self.frozen)

    def clip(self, role: str = "student") -> Clip:
        network = self.training.networks[role]
        return Clip(network.config, self.batch["latents"].shape[1:4], self.config.text.length)

    @property
    def size(self) -> int:
        """Clips in a batch."""
        return self.config.data.batch_size


def configuration(a: argparse.Namespace):
    """`configs/wan_shapes.py` as the command line wants it."""
    sizes = [a.size, *([a.teacher] if a.teacher else [])]
    c = wan_shapes.get_config(",".join([a.training, *sizes]))
    first, _, size = a.chunks.partition("-")
    c.chunks.update({"first": int(first), "size": int(size or first)})
    c.data.update({"frames": a.frames, "height": a.height, "width": a.width})
    c.model.update({"remat": a.remat, "attention": a.attention})
    c.dmd.at_once = not a.chunkwise
    if a.tiny:
        c.data.update({"frames": 13 if c.chunks.size > 1 else 9, "height": 64, "width": 96})
        c.text.length = 6
        c.model.update(TINY)
        c.sizes = {role: {} for role in c.sizes}
    c.mesh.update(meshes.parse(a.mesh))
    c.data.batch_size = a.batch or c.mesh.data * c.mesh.fsdp
    return c


def build_run(config) -> Run:
    """Random weights and data, made where they lie."""
    mesh = meshes.make(config)
    training = recipes.make(config, mesh)
    layout, dtype = Layout(mesh, training.rules), jnp.dtype(config.param_dtype)
    optimizers = {name: Optimizer.from_config(config[player.optim]) for name, player in training.players.items()}

    def placed(make, *arguments, cut=None):
        cut = cut or layout.shardings(jax.eval_shape(make, *arguments))
        return jax.jit(make, out_shardings=cut)(*arguments)

    def weights(role, seed):
        return placed(lambda: random_params(training.networks[role], dtype, seed))

    def normal(seed, *shape, cut=None):
        return placed(lambda: jax.random.normal(jax.random.key(seed), shape), cut=cut)

    def prompt(seed, rows, cut=None):
        return {name: normal(seed, rows, *shape, cut=cut) for name, shape in parts.prompt_shape(config).items()}

    size, samples = config.data.batch_size, meshes.samples(mesh)
    batch = {"latents": normal(11, size, *parts.latent_shape(config), cut=samples), "prompt": prompt(12, size, samples)}
    frozen = {role: weights(role, seed) for seed, role in enumerate(training.reads, 1)}
    players = {name: weights(name, 9 if i else 0) for i, name in enumerate(training.players)}
    state = placed(lambda params: states.create(params, training.players, optimizers), players)
    return Run(config, mesh, training, optimizers, state, Frozen(frozen, Condition(prompt(10, 1))), batch)


def rows(run: Run, simulated: int) -> Iterator[Row]:
    """Everything there is to time; the last row uses the run's state up."""
    yield from PARTS[run.training.recipe.name](run, simulated)
    law = run.training.players["student"].averages["ema"]

    def update(mine, grads):
        params, average, opt = mine
        params, opt = run.optimizers["student"].update(grads, opt, params)
        return (params, law.update(average, params, jnp.int32(5)), opt), opt.count

    def arguments():
        student = run.state.players["student"]
        ema = student.averages["ema"]
        return (student.params, ema, student.opt), jax.tree.map(jnp.zeros_like, ema)

    yield Row("optimiser and average", update, arguments, 0.0, again=lambda mine: mine)


def step_row(run: Run, player: str, useful: float, simulated: int) -> Row:
    """The whole step of a player, at a point of the run where rollouts take `simulated` steps."""
    placed = jax.tree.map(lambda x: x.sharding, run.state)
    steps = make_steps(run.training, run.optimizers, seed=run.config.seed, shardings=placed)

    def count(x):
        return jax.device_put(jnp.int32(simulated - 1), x.sharding)

    def again(state):
        players = {name: p.replace(updates=count(p.updates)) for name, p in state.players.items()}
        run.state = state.replace(iteration=count(state.iteration), players=players)
        return run.state

    def arguments():
        return again(run.state), run.frozen, run.batch

    return Row(f"step of the {player}", steps[player], arguments, useful, again)


def _gradient(run: Run, view=ITSELF) -> Callable:
    """Gradient of a plain forward pass in parameters, cut as the step cuts it."""

    def gradient(model, x, t, cond, cotangent):
        def total(params):
            return jnp.sum(cotangent * model.replace(params=params).velocity(x, t, cond, view))

        return Layout(run.mesh, run.training.rules).in_pieces(jax.grad(total)(model.params))

    return gradient


def _consistency(run: Run, simulated: int) -> Iterator[Row]:
    batch, guidance = run.batch, run.config.objective.guidance
    chunks = run.training.networks["student"].chunks
    student = run.clip().teacher_forcing(chunks) * run.size
    teacher = run.clip("teacher").teacher_forcing(chunks) * (2 * run.size)
    yield step_row(run, "student", teacher.forward + student.forward + student.tangent + student.backward, 1)

    x, t, cond = batch["latents"], jnp.full((run.size, 1), TIME), common.condition(batch)
    view = TeacherForcing(x, jnp.zeros((1, 1)))

    def guided(nets, x, t, batch):
        cond, uncond = conditions(nets, batch)
        return nets["teacher"].guided(x, t, cond, uncond, guidance, TeacherForcing(x, jnp.zeros((1, 1))))

    yield Row("teacher with guidance", guided, lambda: (run.nets, x, t, batch), teacher.forward)

    def tangent(student, x, t, cond):
        def velocity(x, t):
            return student.velocity(x, t, cond, view)

        return jax.jvp(velocity, (x, t), (x, jnp.ones_like(t)))

    def model():
        return run.nets["student"]

    yield Row("student, jvp", tangent, lambda: (model(), x, t, cond), student.forward + student.tangent)
    useful = student.forward + student.backward
    yield Row("student, forward + backward", _gradient(run, view), lambda: (model(), x, t, cond, x), useful)


def _matching(run: Run, simulated: int) -> Iterator[Row]:
    batch, constants = run.batch, matching(run.config)
    chunks, plan = run.training.networks["student"].chunks, constants.plan
    shape = batch["latents"].shape
    passes = [run.clip().cached(chunks, chunk) for chunk in range(chunks.count(shape[1]))]
    per_chunk = [min(simulated, plan.schedule.most_steps(chunk)) + 1 for chunk in range(len(passes))]
    text = run.clip().prompt()
    rolled = (sum(p.forward * n for p, n in zip(passes, per_chunk)) + text.forward) * run.size
    replayed = sum(p.forward + p.backward for p in (text, *passes)) * run.size
    real, fake = run.clip("real").bidirectional() * (2 * run.size), run.clip("critic").bidirectional() * run.size
    yield step_row(run, "student", rolled + real.forward + fake.forward + replayed, simulated)
    yield step_row(run, "critic", rolled + fake.forward + fake.backward, simulated)
    key, cond = jax.random.key(0), common.condition(batch)

    def rolling(student, cond, n):
        return frozen_rollout(student, cond, key, plan, n, shape)

    def arguments():
        return run.nets["student"], cond, jnp.int32(simulated)

    yield Row(f"rollout of {simulated} steps", rolling, arguments, rolled)

    def target(x, nets, batch):
        cond, uncond = conditions(nets, batch)
        return dmd_target(x, key, Scores(nets["real"], nets["critic"], uncond), cond, constants)

    yield Row("both scores", target, lambda: (batch["latents"], run.nets, batch), real.forward + fake.forward)

    def again(student, cond, done, goal):
        return replay(student, cond, done, goal, jnp.ones(shape[0]), at_once=constants.at_once)

    def rolled_out():
        student = run.nets["student"]
        return student, cond, jax.jit(rolling)(student, cond, jnp.int32(1)), batch["latents"]

    yield Row("replay", again, rolled_out, replayed)
    x, t = batch["latents"], jnp.full((run.size, 1), TIME)
    useful = fake.forward + fake.backward
    yield Row("critic, forward + backward", _gradient(run), lambda: (run.nets["critic"], x, t, cond, x), useful)


PARTS = {"tf_scm": _consistency, "sf_dmd": _matching}
"""The parts of each recipe's step that are timed by themselves."""


class Timing(NamedTuple):
    """One row's result. Bytes are the compiler's, on one device."""

    seconds: float
    compile_seconds: float
    arguments: int
    peak: int


def measure(row: Row, repeats: int, profile: str | None = None) -> Timing:
    """Compiles a row and times it: the fastest of `repeats` calls after one untimed."""
    jitted = row.function
    if not hasattr(jitted, "lower"):
        jitted = jax.jit(row.function, compiler_options=compiler.options(), donate_argnums=0 if row.again else ())
    arguments = list(row.arguments())
    began = time.perf_counter()
    compiled = jitted.lower(*arguments).compile()
    compiling = time.perf_counter() - began
    memory = compiled.memory_analysis()
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    best = float("inf")

    def call() -> float:
        began = time.perf_counter()
        result = jax.block_until_ready(compiled(*arguments))
        took = time.perf_counter() - began
        if row.again:
            arguments[0] = row.again(result[0])
        return took

    call()
    for _ in range(repeats):
        best = min(best, call())
    if profile:
        with jax.profiler.trace(profile):
            call()
    return Timing(best, compiling, memory.argument_size_in_bytes, held + memory.temp_size_in_bytes)


def _report(row: Row, took: Timing, devices: int, ceiling: float) -> str:
    work = ""
    if row.useful:
        rate = row.useful / took.seconds / devices
        work = f"{row.useful / 1e12:8.1f} {rate / 1e12:8.0f} {100 * rate / ceiling:5.0f} %"
    memory = f"{took.arguments / plan.GIB:7.1f} {took.peak / plan.GIB:7.1f}"
    return f"{row.name:30s} {took.seconds:9.4f} {work:24s} {memory} {took.compile_seconds:7.0f}"


def _parse(arguments) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = wan_shapes.SIZES
    parser.add_argument("--training", choices=TRAINING, default=TRAINING[0])
    parser.add_argument("--size", choices=sizes, default=sizes[0])
    parser.add_argument("--teacher", choices=sizes, help="size of the teacher and of both scores [the student's]")
    parser.add_argument("--chunks", default="1-1", help="frames of the first chunk and of the others")
    parser.add_argument("--mesh", default="", help=f"{axes.HELP} [one device]")
    parser.add_argument("--batch", type=int, help="clips in a batch [data × fsdp]")
    for name, default in (("height", 480), ("width", 832), ("frames", 81), ("repeats", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--simulated", type=int, default=4, help="steps of a rollout in sf_dmd")
    parser.add_argument("--chunkwise", action="store_true", help="replay chunk by chunk instead of all at once")
    parser.add_argument("--remat", choices=REMAT, default="attention")
    parser.add_argument("--attention", choices=IMPLEMENTATIONS, help="[the best that applies]")
    parser.add_argument("--ceiling", type=float, default=790.0, help="TFLOP/s of a large product on one device")
    parser.add_argument("--only", default="", help="rows whose name holds one of these, separated by commas")
    parser.add_argument("--profile", metavar="FOLDER", help="trace one more step, and say where its time went")
    parser.add_argument("--tiny", action="store_true", help="a toy size")
    return parser.parse_args(arguments)


def main(arguments=None) -> None:
    """Command line."""
    a = _parse(arguments)
    config = configuration(a)
    run = build_run(config)
    device, devices = jax.devices()[0], run.mesh.size
    latents = run.batch["latents"].shape
    print(
        f"{a.training}, {a.size} ← {a.teacher or a.size}, chunks of {a.chunks}, latents {latents}, remat {a.remat}; "
        f"{devices} × {device.device_kind} ({meshes.describe(tuple(run.mesh.shape.values()))}), jax {jax.__version__}"
    )
    print(f"{'':30s} {'s':>9s} {'TFLOP':>8s} {'TFLOP/s':>8s} {'ceiling':>7s} {'held':>7s} {'GiB':>7s} {'compile':>7s}")
    for row in rows(run, a.simulated):
        if not any(word.strip() in row.name for word in a.only.split(",")):
            continue
        profile = a.profile if row.name.startswith("step") else None
        took = measure(row, a.repeats, profile)
        print(_report(row, took, devices, 1e12 * a.ceiling), flush=True)
        if profile:
            print(kernel_times.table(profile))
    peak = (device.memory_stats() or {}).get("peak_bytes_in_use")
    print("peak of the device:", f"{peak / plan.GIB:.1f} GiB" if peak else "not reported")


if __name__ == "__main__":
    main()
