"""`crcm aot`: compiles a configuration's train step for a TPU slice on a machine that has none."""

from __future__ import annotations

import importlib.util
import os

from crcm_jax.cli import train
from crcm_jax.errors import UsageError, UserError, blame_config

HELP = "compile the train step for a TPU slice, on any machine, and say what it needs"
EXAMPLE = "crcm aot --config=configs/wan_shapes.py:tf_scm --topology=v5p:2x2x1 --config.mesh.fsdp=4"

_USAGE = f"""usage: crcm aot --config=FILE.py[:VARIANT] --topology=GENERATION:AxBxC [--config.KEY=VALUE …]

{HELP[0].upper()}{HELP[1:]}.
Nothing runs and no weights are needed; the compiler is the libtpu wheel.

  --config     a Python file with get_config(variant)
  --topology   v5e:4x4, v5p:2x2x1, v6e:16x16, tpu7x:2x2x1, …: the generation and the chips along each side
  --config.mesh.{{data,fsdp,context,tensor}}   how the devices are used; the product is their number

for example:
  {EXAMPLE}"""

_ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "TPU_SKIP_MDS_QUERY": "1",
    # No chip is opened, so that another process may use libtpu meanwhile.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
"""What lets libtpu load on a machine that is no TPU host."""

_MESH = "--config.mesh."


def parse(argv: list[str]):
    """(configuration, topology) of a command line; UsageError, one sentence, for what is wrong with it.

    Mesh axes can be set in configurations that have no mesh of their own.
    """
    topology, axes, rest = None, {}, []
    for word in argv:
        name, _, value = word.partition("=")
        if name == "--topology":
            topology = value
        elif name.startswith(_MESH):
            if not value.isdigit():
                raise UsageError(f"{word}: the length of a mesh axis is a positive integer")
            axes[name.removeprefix(_MESH)] = int(value)
        else:
            rest.append(word)
    if not topology:
        raise UsageError(f"--topology is missing, for example: {EXAMPLE}")
    config, _ = train.parse([*rest, "--workdir=."])
    with config.unlocked():
        config.mesh = {**dict(config.get("mesh") or {}), **axes}
    return config, topology


def main(argv: list[str]) -> int:
    """Compiles every step of the configuration and prints what it needs; returns 0. UserError, one sentence, if libtpu
    is missing, the topology is unknown, the mesh is not one of its devices, or a step does not fit."""
    if any(word in ("-h", "--help", "-help") for word in argv):
        print(_USAGE)
        return 0
    config, topology = parse(argv)
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("compiling for a TPU needs its compiler, libtpu: pip install 'causal-rcm-jax[tpu]'")
    os.environ.update(_ENVIRONMENT)

    # Only now: a wrong command line is answered at once, and libtpu reads its environment when JAX loads.
    from crcm_jax import build
    from crcm_jax.parallel import ahead, plan
    from crcm_jax.parallel import mesh as meshes

    chips = ahead.devices(topology)
    room = ahead.hbm(chips[0])
    with blame_config():
        mesh = meshes.make(config, chips)
        algorithm = build.algorithm(config, mesh)
        arguments = ahead.inputs(config, algorithm, mesh)
    shape = tuple(mesh.shape.values())
    print(
        f"{topology}: {len(chips)} × {chips[0].device_kind}, {room / plan.GIB:.0f} GiB each; {meshes.describe(shape)}"
    )
    for line in ahead.undivided(arguments, mesh):
        print(line)
    kept = plan.of_state(arguments.state, arguments.others)
    print(f"on each device, from start to end:\n{plan.table(kept)}", flush=True)
    lack = plan.shortage(kept, mesh, room)
    if lack:
        raise UserError(lack)
    for player in ("student",) if algorithm.critic is None else ("student", "critic"):
        _report(ahead.compile_step(config, algorithm, mesh, arguments, player, room), room, len(chips))
    return 0


def _report(step, room: int, chips: int) -> None:
    gib = 1 << 30
    print(f"{step.player}'s step, compiled in {step.seconds:.0f} s, not run:")
    print(f"  {step.peak / gib:.2f} of {room / gib:.0f} GiB on each device ({100 * step.peak / room:.0f} %): ", end="")
    print(f"{step.arguments / gib:.2f} state and batch, {step.temporary / gib:.2f} temporary")
    print(
        f"  {step.flops / chips / 1e12:.1f} TFLOP of matrix products on each device, data-dependent loops counted once"
    )
    print("  collectives         in the program   runs a step   GiB a step   largest, MiB")
    for c in step.collectives:
        print(f"    {c.kind:<20} {c.instructions:>11} {c.runs:>13} {c.bytes / gib:>12.2f} {c.largest / 2**20:>14.1f}")
    if not step.collectives:
        print("    none")
