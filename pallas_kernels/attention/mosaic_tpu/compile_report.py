"""Compiles every kernel for every chip at the sizes of Wan2.1 and prints what that shows, as Markdown.

    python -m pallas_kernels.attention.mosaic_tpu.compile_report [chip …]

Needs the libtpu wheel and no TPU. Nothing is run: times are the larger of matrix FLOPs over the chip's FLOP/s and HBM
bytes over its bytes/s, so no kernel can be faster, and how near one comes is not known.
"""

from __future__ import annotations

import dataclasses
import sys
from importlib.metadata import version

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels.attention import mosaic_tpu
from pallas_kernels.attention.api import attention
from pallas_kernels.attention.backend import Segment
from pallas_kernels.attention.mask import Cached
from pallas_kernels.attention.mosaic_tpu import aot
from pallas_kernels.attention.mosaic_tpu.blocks import blocks_for
from pallas_kernels.attention.shapes import FRAME, Case, case

MODELS = {"1.3B": 12, "14B": 40}
CASES = {
    "1.3B": ("tf_target_1", "tf_target_3", "tf_context_3", "full", "decode_1", "decode_3"),
    "14B": ("tf_target_3", "decode_3"),
}
DTYPE = jnp.bfloat16


def functions(shape: Case) -> dict:
    """The kernels' callers for a case, by kernel name; each takes q, own (k, v), context (k, v) or None, and lse.

    What has a tangent is what has one in training: queries and own keys and values, never a clean context. Arrays stand
    in for each other where only shapes matter.
    """
    scale = shape.dim**-0.5
    visible = shape.mask.visible(shape.queries, shape.own, shape.context)

    def segments(own, context):
        pairs = (own,) if context is None else (own, context)
        return tuple(Segment(k, v, rows) for (k, v), rows in zip(pairs, visible))

    def moving(own, context):
        return (own,) if context is None else (own, (None, None))

    def gradients(want_q, want):
        wanted = want_q, ((want, want),) * len(shape.segments)
        return lambda q, own, context, lse: mosaic_tpu.backward(
            q, segments(own, context), scale, q, lse, q, lse, wanted
        )

    forward = {"forward": lambda q, own, context, lse: mosaic_tpu.forward(q, segments(own, context), scale)}
    if shape.name.startswith("decode"):
        return forward
    gradient = {"backward_q": gradients(True, False), "backward_kv": gradients(False, True)}
    if shape.name.startswith("tf_context"):
        return forward | gradient
    return (
        forward
        | {
            "forward_tangent": lambda q, own, context, lse: mosaic_tpu.forward_tangent(
                q, segments(own, context), scale, q, moving(own, context)
            ),
            "tangent": lambda q, own, context, lse: mosaic_tpu.tangent(
                q, segments(own, context), scale, q, lse, q, moving(own, context)
            ),
        }
        | gradient
    )


def arguments(shape: Case, sharding) -> tuple:
    """Abstract arguments of `functions`."""

    def keys(tokens):
        x = jax.ShapeDtypeStruct((shape.batch, tokens, shape.kv_heads, shape.dim), DTYPE, sharding=sharding)
        return x, x

    q = jax.ShapeDtypeStruct((shape.batch, shape.queries, shape.heads, shape.dim), DTYPE, sharding=sharding)
    lse = jax.ShapeDtypeStruct((shape.batch, shape.heads, shape.queries), jnp.float32, sharding=sharding)
    return q, keys(shape.own), None if shape.context is None else keys(shape.context), lse


def rows_of_table(chip_name: str):
    """Compiles all cases for a chip; yields the cells of a row as each is done."""
    chip, sharding = aot.chip_named(chip_name), SingleDeviceSharding(aot.devices(chip_name)[0])
    needs: dict = {}
    for model, heads in MODELS.items():
        for name in CASES[model]:
            shape = dataclasses.replace(case(name), heads=heads, kv_heads=heads)
            args = arguments(shape, sharding)
            for kernel, function in functions(shape).items():
                memory = aot.compiled(function, args, chip).memory_analysis()
                kernels = aot.costs(function, args, chip)
                keys = [Segment(k, k, None) for k, _ in (x for x in args[1:3] if x is not None)]
                blocks = blocks_for(kernel, chip, args[0], keys)
                key = kernel, blocks, len(keys)
                if key not in needs:  # heads and lengths do not change it
                    needs[key] = aot.vmem(function, args, chip)
                flops, moved = sum(k.flops for k in kernels), sum(k.bytes for k in kernels)
                seen = sum(shape.pairs().values()) * shape.heads * shape.batch
                by_flops, by_bytes = flops / chip.flops, moved / chip.bandwidth
                yield (
                    model,
                    name,
                    kernel,
                    f"{blocks.q}×{blocks.k}",
                    f"{needs[key] / 2**20:.1f}",
                    f"{memory.temp_size_in_bytes / 2**20:.0f}",
                    f"{moved / 1e9:.2f}",
                    f"{flops / 1e12:.2f}",
                    f"{sum(k.entries for k in kernels) / seen:.2f}",
                    f"{1e3 * max(by_flops, by_bytes):.2f}",
                    "matrix" if by_flops > by_bytes else "HBM",
                )


def sharded(chip_name: str) -> str:
    """Compiles value, tangent and gradient of teacher forcing on a data × heads mesh, and a decode of traced length."""
    chip, all_devices = aot.chip_named(chip_name), aot.devices(chip_name)
    shape = dataclasses.replace(case("tf_target_3"), batch=2)
    mesh = Mesh(np.array(all_devices[:4]).reshape(2, 2), ("data", "heads"), axis_types=(AxisType.Auto,) * 2)
    spec = P("data", None, "heads")

    def call(q, k, v, context_k, context_v):
        return attention(q, k, v, context=(context_k, context_v), mask=shape.mask, implementation="mosaic_tpu")

    split = jax.shard_map(call, mesh=mesh, in_specs=(spec,) * 5, out_specs=spec, check_vma=False)

    def derivatives(q, k, v, context_k, context_v):
        def own(q, k, v):
            return split(q, k, v, context_k, context_v)

        return jax.jvp(own, (q, k, v), (q, k, v)), jax.vjp(split, q, k, v, context_k, context_v)[1](q)

    q, (own, _), (context, _), _ = arguments(shape, NamedSharding(mesh, spec))
    memory = aot.compiled(derivatives, (q, own, own, context, context), chip).memory_analysis()
    one = arguments(case("decode_1"), SingleDeviceSharding(all_devices[0]))
    stop = jax.ShapeDtypeStruct((), jnp.int32, sharding=SingleDeviceSharding(all_devices[0]))

    def decode(q, own, context, stop):
        mask = Cached(stop, start=stop - 6 * FRAME, sink=FRAME)
        return attention(q, *own, context=context, mask=mask, implementation="mosaic_tpu")

    aot.compiled(decode, (*one[:3], stop), chip)
    return (
        f"shard_map, data 2 × heads {mesh.shape['heads']}, tf_target_3 with batch 2: value, tangent and gradient "
        f"compiled; {memory.temp_size_in_bytes / 2**20:.0f} MiB of temporaries a device. A decode whose cache length "
        "and window are traced: compiled."
    )


def main(chips):
    """Prints the report for some chips."""
    if reason := aot.why_not():
        raise SystemExit(f"cannot compile: {reason}")
    jax.config.update("jax_platforms", "cpu")
    print(f"libtpu {version('libtpu')}, jax {jax.__version__}. Compiled, not run.\n")
    header = (
        "model | case | kernel | tile q×k | VMEM MiB | XLA temp MiB | HBM GB | matrix TFLOP | computed/visible pairs | "
        "roofline ms | bound by"
    )
    for chip_name in chips:
        chip = aot.chip_named(chip_name)
        print(
            f"### {chip_name}\n\nPer device: {chip.flops / 1e12:.0f} TFLOP/s, {chip.bandwidth / 1e12:.2f} TB/s, "
            f"{chip.vmem // 2**20} MiB of VMEM a core, of which kernels may take {chip.vmem_limit // 2**20}.\n"
        )
        print(f"| {header} |\n|{'---|' * (header.count('|') + 1)}")
        for row in rows_of_table(chip_name):
            print("| " + " | ".join(row) + " |", flush=True)
        print(f"\n{sharded(chip_name)}\n", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:] or [chip.name for chip in mosaic_tpu.CHIPS])
