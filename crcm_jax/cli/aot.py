"""`crcm aot`: compiles a configuration's train step for devices that this machine has not."""

from __future__ import annotations

import importlib.util
import os

from crcm_jax.cli import train
from crcm_jax.errors import UsageError, UserError, blame_config

HELP = "compile the train step for a TPU slice, or cut it up for GPUs, on any machine, and say what it needs"
EXAMPLE = "crcm aot --config=configs/wan2_1.py:tf,14b --topology=v5p:2x4x4 --config.mesh.fsdp=4 --config.mesh.context=8"

_USAGE = f"""usage: crcm aot --config=FILE.py[:VARIANT] --topology=KIND:SHAPE [--config.KEY=VALUE …] [--row]

{HELP[0].upper()}{HELP[1:]}.
Nothing runs and no weights are needed.

  --config     a Python file with get_config(variant)
  --topology   v5e:4x4, v5p:2x2x1, v6e:16x16, tpu7x:2x2x1, …: the generation and the chips along each side; compiled by
               the libtpu wheel. h200:8, h100:8x4: GPUs in a machine, and machines; the program is cut up, not compiled
  --config.mesh.{{data,fsdp,context,tensor}}   how the devices are used; the product is their number
  --row        print a row of a Markdown table in place of the report

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
_GIB = 1 << 30

COLUMNS = (
    "configuration", "topology", "mesh", "batch", "step", "GiB a device", "TFLOP a device", "all-gather, GB",
    "reduce, GB", "all-to-all, GB", "largest gather / layer, MB", "matrix units, s", "links, s", "compiled in, s",
)  # fmt: skip


def parse(argv: list[str]):
    """(configuration, topology, configuration's name) of a command line; UsageError, one sentence, for what is wrong.

    Mesh axes can be set in configurations that have no mesh of their own.
    """
    topology, name, axes, rest = None, "", {}, []
    for word in argv:
        key, _, value = word.partition("=")
        if key == "--topology":
            topology = value
        elif key.startswith(_MESH):
            if not value.isdigit():
                raise UsageError(f"{word}: the length of a mesh axis is a positive integer")
            axes[key.removeprefix(_MESH)] = int(value)
        else:
            name = value if key == "--config" else name
            rest.append(word)
    if not topology:
        raise UsageError(f"--topology is missing, for example: {EXAMPLE}")
    config, _ = train.parse([*rest, "--workdir=."])
    with config.unlocked():
        config.mesh = {**dict(config.get("mesh") or {}), **axes}
    return config, topology, name


def main(argv: list[str]) -> int:
    """Compiles every step of the configuration and prints what it needs; returns 0. UserError, one sentence, if libtpu
    is missing, the topology is unknown, the mesh is not one of its devices, or a step does not fit."""
    if any(word in ("-h", "--help", "-help") for word in argv):
        print(_USAGE)
        return 0
    as_row = "--row" in argv
    config, topology, name = parse([word for word in argv if word != "--row"])
    os.environ.update(_ENVIRONMENT)

    # Only now: a wrong command line is answered at once, and libtpu reads its environment when JAX loads.
    from crcm_jax.parallel import ahead, chips, plan
    from crcm_jax.parallel import mesh as meshes

    if not chips.gpus(topology) and importlib.util.find_spec("libtpu") is None:
        raise UserError("compiling for a TPU needs its compiler, libtpu: pip install 'causal-rcm-jax[tpu]'")
    target = ahead.target(topology)
    with blame_config():
        run = ahead.prepare(config, target)
    mesh, room = meshes.describe(tuple(run.mesh.shape.values())), target.chip.hbm
    kept = plan.of_state(run.inputs.state, run.inputs.others)
    if not as_row:
        print(f"{topology}: {len(target.devices)} × {target.chip.kind}, {room / _GIB:.0f} GiB each; {mesh}")
        for line in ahead.undivided(run):
            print(line)
        print(f"on each device, from start to end:\n{plan.table(kept)}", flush=True)
    lack = plan.shortage(kept, run.mesh, room)
    if lack:
        raise UserError(lack)
    layer = ahead.layer_bytes(run.inputs)
    for player in ("student",) if run.algorithm.critic is None else ("student", "critic"):
        step = ahead.compile_step(run, player)
        if as_row:
            print(_row((name, topology, mesh, str(config.data.batch_size)), step, layer), flush=True)
        else:
            print(_report(step, target, layer), flush=True)
    return 0


def _report(step, target, layer: int) -> str:
    """What is known of a compiled step, in lines."""
    room, how = target.chip.hbm, "compiled" if target.on_chip else "cut up on CPU devices"
    memory = "memory beyond the above is not known: that takes the compiler for these GPUs"
    if target.on_chip:
        memory = (
            f"{step.peak / _GIB:.2f} of {room / _GIB:.0f} GiB on each device ({100 * step.peak / room:.0f} %): "
            f"{step.arguments / _GIB:.2f} state and batch, {(step.peak - step.arguments) / _GIB:.2f} temporary"
        )
    gather = "no more" if step.largest_gather <= layer else "MORE"
    matrix, links = step.compute_seconds, step.link_seconds
    return "\n".join([
        f"{step.player}'s step, traced in {step.trace_seconds:.0f} s, {how} in {step.compile_seconds:.0f} s, not run:",
        f"  {memory}",
        f"  {step.flops / 1e12:.4g} TFLOP of matrix products on each device",
        "  collectives         in the program   runs a step   GB a step   largest, MB    sent, GB",
        *(
            f"    {c.kind:<20} {c.instructions:>11} {c.runs:>13} {c.bytes / 1e9:>11.3f} {c.largest / 1e6:>13.1f} "
            f"{c.sent / 1e9:>11.3f}"
            for c in step.collectives
        ),
        f"  largest all-gather {step.largest_gather / 1e6:.1f} MB: {gather} than a layer's parameters, "
        f"{layer / 1e6:.1f} MB",
        f"  roofline: {max(matrix, links):.3g} s if everything overlaps, {matrix + links:.3g} s if nothing does "
        f"(matrix units {matrix:.3g} s, links {links:.3g} s, at their peaks; docs/aot.md says what that leaves out)",
    ])  # fmt: skip


def _row(names: tuple[str, ...], step, layer: int) -> str:
    """The cells of `COLUMNS`."""
    moved = {c.kind: c.bytes / 1e9 for c in step.collectives}
    cells = [
        *names,
        step.player,
        f"{step.peak / _GIB:.1f}" if step.peak else "–",
        f"{step.flops / 1e12:.0f}",
        f"{moved.get('all-gather', 0):.1f}",
        f"{moved.get('all-reduce', 0) + moved.get('reduce-scatter', 0):.1f}",
        f"{moved.get('all-to-all', 0):.1f}",
        f"{step.largest_gather / 1e6:.0f} / {layer / 1e6:.0f}",
        f"{step.compute_seconds:.2f}",
        f"{step.link_seconds:.2f}",
        f"{step.trace_seconds + step.compile_seconds:.0f}",
    ]
    return "| " + " | ".join(cells) + " |"
