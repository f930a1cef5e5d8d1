"""Speed and memory of the real train step with random weights, whole and by its parts.

    python -m benchmarks.train
    python -m benchmarks.train --training sf_dmd --only step
    python -m benchmarks.train --teacher 14b --chunks 3-3 --profile /tmp/trace

The step is the one that `crcm train` runs: its losses from the configuration, its optimiser, averages and guards, on
any mesh (`--mesh fsdp=4`). Parts are compiled by themselves, so that their sum need not be the step's time. "Useful"
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
from crcm_jax import build, compiler
from crcm_jax.configs import wan_shapes
from crcm_jax.models.guidance import guided_velocity
from crcm_jax.models.wan.config import REMAT
from crcm_jax.objectives import common
from crcm_jax.objectives.algorithm import Algorithm
from crcm_jax.objectives.sf_dmd import Scores, dmd_target
from crcm_jax.parallel import mesh as meshes
from crcm_jax.parallel import plan, rules
from crcm_jax.sampling.rollout import frozen_rollout, replay
from crcm_jax.train import ema
from crcm_jax.train import state as states
from crcm_jax.train.optimizer import Optimizer
from crcm_jax.train.step import make_steps
from pallas_kernels.attention import IMPLEMENTATIONS

TINY = {"dim": 32, "ffn_dim": 64, "heads": 4, "layers": 2, "freq_dim": 16}
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
    algorithm: Algorithm
    optimizers: tuple[Optimizer, Optimizer | None]
    state: states.TrainState
    others: dict[str, Any]
    batch: dict[str, jax.Array]

    def network(self, role: str = "student"):
        return build.network(self.config, role, self.mesh)

    def clip(self, role: str = "student") -> Clip:
        return Clip(self.network(role).config, self.batch["latents"].shape[1:4], self.config.text.length)

    @property
    def size(self) -> int:
        """Clips in a batch."""
        return self.config.data.batch_size


def configuration(a: argparse.Namespace):
    """`configs/wan_shapes.py` as the command line wants it."""
    names = {name.lower(): name for name in wan_shapes.SIZES}
    sizes = [names[a.size], *([names[a.teacher]] if a.teacher else [])]
    c = wan_shapes.get_config(",".join([a.training, *sizes]))
    first, _, size = a.chunks.partition("-")
    c.chunks.update({"first": int(first), "size": int(size or first)})
    c.data.update({"frames": 1 + (a.frames - 1) // 4, "height": a.height // 2, "width": a.width // 2})
    c.model.update({"remat": a.remat, "attention": a.attention})
    c.dmd.at_once = not a.chunkwise
    if a.tiny:
        c.data.update({"frames": 4 if c.chunks.size > 1 else 3, "height": 32, "width": 48})
        c.text.update({"length": 6, "dim": 64})
        c.model.update({**TINY, "text_dim": c.text.dim})
        c.sizes = {role: {} for role in c.sizes}
    for word in filter(None, a.mesh.split(",")):
        axis, _, length = word.partition("=")
        c.mesh[axis] = int(length)
    c.data.batch_size = a.batch or c.mesh.data * c.mesh.fsdp
    return c


def build_run(config) -> Run:
    """Random weights and data, made where they lie."""
    mesh = meshes.make(config)
    algorithm = rules.cut_gradients(build.algorithm(config, mesh), mesh)
    critic_optimizer = None if algorithm.critic is None else Optimizer.from_config(config.critic_optim)
    optimizers = Optimizer.from_config(config.optim), critic_optimizer
    dtype = jnp.dtype(config.param_dtype)

    def placed(make, *arguments, cut=None):
        cut = cut or rules.shardings(jax.eval_shape(make, *arguments), mesh)
        return jax.jit(make, out_shardings=cut)(*arguments)

    def weights(role, seed):
        return placed(lambda: random_params(build.network(config, role), dtype, seed))

    def normal(seed, *shape, cut=None):
        return placed(lambda: jax.random.normal(jax.random.key(seed), shape), cut=cut)

    data, text = config.data, (config.text.length, config.text.dim)
    latents = build.codec(config).latent_shape(data.frames, data.height, data.width)
    samples = meshes.samples(mesh)
    batch = {
        "latents": normal(11, data.batch_size, *latents, cut=samples),
        "text": normal(12, data.batch_size, *text, cut=samples),
    }
    others = {role: weights(role, seed) for seed, role in enumerate(algorithm.reads, 1)}
    critic = None if algorithm.critic is None else weights("critic", 9)
    state = placed(lambda p, q: states.create(p, optimizers[0], q, critic_optimizer), weights("student", 0), critic)
    return Run(config, mesh, algorithm, optimizers, state, {**others, "uncond": normal(10, 1, *text)}, batch)


def rows(run: Run, simulated: int) -> Iterator[Row]:
    """Everything there is to time; the last row uses the run's state up."""
    kind = run.config.training
    yield from {"tf_scm": _consistency, "sf_dmd": _matching}[kind](run, simulated)

    def update(mine, grads):
        params, average, opt = mine
        params, opt = run.optimizers[0].update(grads, opt, params)
        return (params, ema.update(average, params, jnp.int32(5), 6.9), opt), opt.count

    def arguments():
        state = run.state
        return (state.params, state.ema, state.opt), jax.tree.map(jnp.zeros_like, state.ema)

    yield Row("optimiser and average", update, arguments, 0.0, again=lambda mine: mine)


def step_row(run: Run, player: str, useful: float, simulated: int) -> Row:
    """The whole step of "student" or "critic", at a point of the run where rollouts take `simulated` steps."""
    placed = jax.tree.map(lambda x: x.sharding, run.state)
    c = run.config
    steps = make_steps(run.algorithm, *run.optimizers, ema_rate=c.ema.rate, seed=c.seed, shardings=placed)

    def again(state):
        now = jax.tree.map(lambda x: jax.device_put(jnp.int32(simulated - 1), x.sharding), state.progress)
        run.state = state.replace(progress=now)
        return run.state

    def arguments():
        return again(run.state), run.others, run.batch

    return Row(f"step of the {player}", steps[player == "critic"], arguments, useful, again)


def _gradient(run: Run, network, **view) -> Callable:
    """Gradient of a plain forward pass in parameters, cut as the step cuts it."""

    def gradient(params, x, t, cond, cotangent):
        def total(params):
            return jnp.sum(cotangent * network.velocity(params, x, t, cond, **view))

        return rules.in_pieces(jax.grad(total)(params), run.mesh)

    return gradient


def _consistency(run: Run, simulated: int) -> Iterator[Row]:
    others, batch = run.others, run.batch
    chunks, guidance = build.chunk_pattern(run.config), run.config.objective.guidance
    student = run.clip().teacher_forcing(chunks) * run.size
    teacher = run.clip("teacher").teacher_forcing(chunks) * (2 * run.size)
    yield step_row(run, "student", teacher.forward + student.forward + student.tangent + student.backward, 1)

    x, t, cond = batch["latents"], jnp.full((run.size, 1), TIME), common.condition(batch)
    context = x, jnp.zeros((1, 1))
    network, teaching = run.network(), run.network("teacher")

    def guided(params, x, t, batch, uncond):
        uncond = common.unconditioned(batch, uncond)
        cond = common.condition(batch)
        return guided_velocity(teaching, params, x, t, cond, uncond, guidance, context=(x, jnp.zeros((1, 1))))

    arguments = lambda: (others["teacher"], x, t, batch, others["uncond"])  # noqa: E731
    yield Row("teacher with guidance", guided, arguments, teacher.forward)

    def tangent(params, x, t, cond):
        velocity = lambda x, t: network.velocity(params, x, t, cond, context=context)  # noqa: E731
        return jax.jvp(velocity, (x, t), (x, jnp.ones_like(t)))

    yield Row("student, jvp", tangent, lambda: (run.state.params, x, t, cond), student.forward + student.tangent)
    gradient = _gradient(run, network, context=context)
    arguments, useful = lambda: (run.state.params, x, t, cond, x), student.forward + student.backward
    yield Row("student, forward + backward", gradient, arguments, useful)


def _matching(run: Run, simulated: int) -> Iterator[Row]:
    c = run.config
    others, batch = run.others, run.batch
    chunks, steps = build.chunk_pattern(c), build.rollout_plan(c)
    shape = batch["latents"].shape
    passes = [run.clip().cached(chunks, chunk) for chunk in range(chunks.count(shape[1]))]
    per_chunk = [min(simulated, steps.most_steps(chunk)) + 1 for chunk in range(len(passes))]
    text = run.clip().prompt()
    rolled = (sum(p.forward * n for p, n in zip(passes, per_chunk)) + text.forward) * run.size
    replayed = sum(p.forward + p.backward for p in (text, *passes)) * run.size
    real, fake = run.clip("real").bidirectional() * (2 * run.size), run.clip("critic").bidirectional() * run.size
    yield step_row(run, "student", rolled + real.forward + fake.forward + replayed, simulated)
    yield step_row(run, "critic", rolled + fake.forward + fake.backward, simulated)
    network, key = run.network(), jax.random.key(0)
    cond = common.condition(batch)
    rolling = lambda params, cond, n: frozen_rollout(network, params, cond, key, steps, n, shape, chunks)  # noqa: E731
    arguments = lambda: (run.state.params, cond, jnp.int32(simulated))  # noqa: E731
    yield Row(f"rollout of {simulated} steps", rolling, arguments, rolled)

    critic = run.network("critic")

    def target(x, real, fake, batch, uncond):
        scores = Scores(run.network("real"), real, critic, fake)
        cond, uncond = common.condition(batch), common.unconditioned(batch, uncond)
        times = build.flow.time_distribution(**c.dmd.times)
        return dmd_target(x, key, scores, cond, uncond, times=times, guidance=c.dmd.guidance)

    arguments = lambda: (batch["latents"], others["real"], run.state.critic, batch, others["uncond"])  # noqa: E731
    yield Row("both scores", target, arguments, real.forward + fake.forward)

    def again(params, cond, done, goal):
        return replay(network, params, cond, done, goal, jnp.ones(shape[0]), chunks, at_once=c.dmd.at_once)

    def rolled_out():
        return run.state.params, cond, jax.jit(rolling)(run.state.params, cond, jnp.int32(1)), batch["latents"]

    yield Row("replay", again, rolled_out, replayed)
    x, t = batch["latents"], jnp.full((run.size, 1), TIME)
    gradient = _gradient(run, critic)
    useful = fake.forward + fake.backward
    yield Row("critic, forward + backward", gradient, lambda: (run.state.critic, x, t, cond, x), useful)


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
        donate = {"donate_argnums": 0} if row.again else {}
        jitted = jax.jit(row.function, compiler_options=compiler.options(), **donate)
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
    sizes = [name.lower() for name in wan_shapes.SIZES]
    parser.add_argument("--training", choices=TRAINING, default=TRAINING[0])
    parser.add_argument("--size", choices=sizes, default=sizes[0])
    parser.add_argument("--teacher", choices=sizes, help="size of the teacher and of both scores [the student's]")
    parser.add_argument("--chunks", default="1-1", help="frames of the first chunk and of the others")
    parser.add_argument("--mesh", default="", help="axes and lengths, as in data=2,context=2 [one device]")
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
