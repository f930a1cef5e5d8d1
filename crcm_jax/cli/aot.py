"""`crcm aot`: compiles a configuration's train step for devices that this machine has not."""

from __future__ import annotations

import argparse
import importlib.util
import os
from typing import TYPE_CHECKING

from crcm_jax.cli import _config, _places
from crcm_jax.cli._parser import Parser
from crcm_jax.errors import UsageError, UserError, blame_config
from crcm_jax.parallel import axes

if TYPE_CHECKING:
    from ml_collections import ConfigDict

HELP = "compile the train step for a TPU slice, or cut it up for GPUs, on any machine, and say what it needs"
EXAMPLE = "crcm aot --config=configs/wan2_1.py:tf,14b --topology=v5p:2x4x4 --config.mesh.fsdp=4 --config.mesh.context=8"

_DETAIL = """\
Nothing runs and no weights are needed. Any key of the configuration can be set, --config.data.batch_size=32."""

_ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "TPU_SKIP_MDS_QUERY": "1",
    # No chip is opened, so that another process may use libtpu meanwhile.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    # Meant for this machine's devices; libtpu ends the process at one that it does not know.
    "XLA_FLAGS": "",
    # The compiler writes nothing of a program that comes out of JAX's cache.
    "JAX_ENABLE_COMPILATION_CACHE": "false",
}
"""What lets libtpu load on a machine that is no TPU host."""

_MESH = "--config.mesh."
_GIB = 1 << 30

COLUMNS = (
    "configuration", "topology", "mesh", "batch", "step", "kept, GiB", "peak, GiB", "TFLOP", "all-gather, GB",
    "reduce, GB", "all-to-all, GB", "largest gather / layer, MB", "matrix units, s", "links, s", "compiled in, CPU s",
)  # fmt: skip
"""Of `--row`. Bytes and TFLOP are those of one device."""


def parser() -> Parser:
    """The command line of `crcm aot`, but for --config.KEY=VALUE."""
    p = Parser(
        "crcm aot",
        description=f"{HELP[0].upper()}{HELP[1:]}.\n\n{_DETAIL}",
        examples=[EXAMPLE],
        suggest=_config.key_for,
    )
    add = p.add_argument
    add("--config", type=_config.file, metavar="FILE.py[:VARIANT]", help="a Python file with get_config(variant)")
    add(
        "--topology", type=_places.given, metavar="KIND:SHAPE",
        help="v5e:4x4, v5p:2x2x1, v6e:16x16, tpu7x:2x2x1, …: the generation and the chips along each side, compiled by "
        "the libtpu wheel; h200:8, h100:8x4: GPUs in a machine, and machines: the program is cut up, not compiled",
    )  # fmt: skip
    add(
        "--mesh",
        type=_config.mesh,
        action=_config.Axes,
        metavar="AXES",
        help=f"{axes.HELP} [config.mesh]",
    )
    add(
        "--trace", action="store_true", help="stop before the compiler, which takes minutes: weights and work are known"
    )
    add(
        "--no-code", action="store_true",
        help="for TPUs: stop before machine code is generated, which takes most of the time; memory, but for the "
        "program's own, and collectives are settled by then",
    )  # fmt: skip
    add("--row", action="store_true", help="print a row of a Markdown table in place of the report")
    return p


def parse(argv: list[str]) -> tuple[ConfigDict, argparse.Namespace]:
    """(configuration, options) of a command line; UsageError, one sentence, for what is wrong.

    Mesh axes can be set in configurations that have no mesh of their own.
    """
    keys, words = _config.split(argv)
    axes = ",".join(word.removeprefix(_MESH) for word in keys if word.startswith(_MESH))
    options = parser().parse_args([*words, *([f"--mesh={axes}"] if axes else [])])
    for name, what in (("config", "--config=FILE.py"), ("topology", "--topology")):
        if getattr(options, name) is None:
            raise UsageError(f"{what} is missing, for example: {EXAMPLE}")
    keys = [word for word in keys if not word.startswith(_MESH)]
    return _config.load(options.config, keys, options.mesh, new_axes=True), options


def main(argv: list[str]) -> int:
    """Compiles every step of the configuration and prints what it needs; returns 0. UserError, one sentence, if libtpu
    is missing, the topology is unknown, the mesh is not one of its devices, or a step does not fit."""
    return run(*parse(argv))


def run(config: ConfigDict, options: argparse.Namespace) -> int:
    """Compiles what was parsed."""
    topology = options.topology
    os.environ.update(_ENVIRONMENT)

    # Only now: a wrong command line is answered at once, and libtpu reads its environment when JAX loads.
    from crcm_jax.aot import chips
    from crcm_jax.aot import compile as ahead
    from crcm_jax.parallel import mesh as meshes
    from crcm_jax.parallel import plan

    if not chips.gpus(topology) and importlib.util.find_spec("libtpu") is None:
        raise UserError("compiling for a TPU needs its compiler, libtpu: pip install 'causal-rcm-jax[tpu]'")
    target = ahead.target(topology)
    with blame_config():
        run = ahead.prepare(config, target)
    mesh, room = meshes.describe(tuple(run.mesh.shape.values())), target.chip.hbm
    kept = plan.of_state(run.inputs.state, run.inputs.frozen.params)
    if not options.row:
        print(f"{topology}: {len(target.devices)} × {target.chip.kind}, {room / _GIB:.0f} GiB each; {mesh}")
        for line in ahead.undivided(run):
            print(line)
        print(f"on each device, from start to end:\n{plan.table(kept)}", flush=True)
    lack = plan.shortage(kept, run.mesh, room)
    if lack:
        raise UserError(lack)
    layer, leaf = ahead.layer_bytes(run.inputs), ahead.leaf_bytes(run.inputs)
    compile_step = ahead.optimise_step if options.no_code and target.on_chip else ahead.compile_step
    for player in run.training.players:
        traced = ahead.trace_step(run, player)
        compiled = None if options.trace else compile_step(run, traced)
        if options.row:
            names = (
                options.config,
                topology,
                mesh,
                str(config.data.batch_size),
                player,
                f"{sum(kept.values()) / _GIB:.3g}",
            )
            print(_row(names, traced, compiled, layer), flush=True)
        else:
            print(_report(traced, compiled, target, layer, leaf), flush=True)
    return 0


def _report(traced, compiled, target, layer: int, leaf: int) -> str:
    """What is known of a step, in lines."""
    matrix = traced.compute_seconds
    lines = [
        f"{traced.player}'s step, traced in {traced.seconds:.0f} s:",
        f"  {traced.flops / 1e12:.4g} TFLOP of matrix products on each device, {matrix:.3g} s at its peak",
    ]
    if compiled is None:
        return "\n".join(lines)
    links = compiled.link_seconds
    room, how = target.chip.hbm, "cut up on CPU devices"
    memory = "memory beyond the above is not known: that takes the compiler for these GPUs"
    if target.on_chip:
        how = "compiled" if compiled.code else "optimised, no machine code generated,"
        held, peak, code = (size / _GIB for size in (compiled.arguments, compiled.peak, compiled.code))
        memory = (
            f"{peak:.2f} of {room / _GIB:.0f} GiB on each device ({100 * compiled.peak / room:.0f} %): "
            f"{held:.2f} state and batch, {peak - held - code:.2f} temporary, "
            + (f"{code:.2f} program" if code else "and the program, not known")
        )
    lines += [f"  {how} in {compiled.seconds:.0f} s ({compiled.cpu_seconds:.0f} s of CPU), not run", f"  {memory}"]
    if compiled.largest_gather <= layer:
        gather = f"no more than a layer's parameters, {layer / 1e6:.1f} MB"
    elif compiled.largest_gather <= leaf:
        gather = f"no more than a device keeps of one leaf of weights, {leaf / 1e6:.1f} MB"
    else:
        gather = f"MORE than a layer's parameters, {layer / 1e6:.1f} MB, and than is kept of any leaf of weights"
    lines += [
        "  collectives         in the program   runs a step   GB a step   largest, MB    sent, GB",
    ]
    lines += [
        f"    {c.kind:<20} {c.instructions:>11} {c.runs:>13} {c.bytes / 1e9:>11.3f} {c.largest / 1e6:>13.1f} "
        f"{c.sent / 1e9:>11.3f}"
        for c in compiled.collectives
    ] or ["    none"]
    lines += [
        f"  largest all-gather {compiled.largest_gather / 1e6:.1f} MB: {gather}",
        f"  roofline: {max(matrix, links):.3g} s if everything overlaps, {matrix + links:.3g} s if nothing does "
        f"(matrix units {matrix:.3g} s, links {links:.3g} s, at their peaks; docs/aot.md says what that leaves out)",
    ]
    return "\n".join(lines)


def _row(names: tuple[str, ...], traced, compiled, layer: int) -> str:
    """The cells of `COLUMNS`; those that only a compiler knows are – without one."""
    known = {
        "TFLOP": f"{traced.flops / 1e12:.4g}",
        "matrix units, s": f"{traced.compute_seconds:.3g}",
    }
    if compiled is not None:
        known["compiled in, CPU s"] = f"{compiled.cpu_seconds:.0f}"
        if compiled.peak:
            known["peak, GiB"] = f"{compiled.peak / _GIB:.3g}" + ("" if compiled.code else " + program")
        moved = {c.kind: c.bytes / 1e9 for c in compiled.collectives}
        known |= {
            "all-gather, GB": f"{moved.get('all-gather', 0):.3g}",
            "reduce, GB": f"{moved.get('all-reduce', 0) + moved.get('reduce-scatter', 0):.3g}",
            "all-to-all, GB": f"{moved.get('all-to-all', 0):.3g}",
            "largest gather / layer, MB": f"{compiled.largest_gather / 1e6:.3g} / {layer / 1e6:.3g}",
            "links, s": f"{compiled.link_seconds:.3g}",
        }
    cells = [*names, *(known.get(column, "–") for column in COLUMNS[len(names) :])]
    return "| " + " | ".join(cells) + " |"
