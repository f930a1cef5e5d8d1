"""Measures block sizes on the GPU at hand: `python -m benchmarks.attention_autotune [--write]`.

Tries every candidate of every kernel and head dim at a long teacher-forcing shape, prints the times, and with `--write`
puts the fastest into the table that the kernels read.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json

import jax
import jax.numpy as jnp

from benchmarks.clock import draw, milliseconds
from pallas_kernels.attention import mosaic_gpu
from pallas_kernels.attention.backend import Segment
from pallas_kernels.attention.mosaic_gpu import blocks
from pallas_kernels.attention.shapes import Case, case

CANDIDATES = tuple(
    blocks.Blocks(tile, stages, first) for tile, stages, first in itertools.product((64, 128), (2, 3, 4), (True,))
)


def autotune(kernel: str, case: Case, candidates=CANDIDATES) -> dict[blocks.Blocks, float]:
    """Milliseconds of `kernel` (a name in the table) at `case` for every candidate that compiles, fastest first."""
    inputs, tangents = draw(case, jnp.bfloat16), draw(case, jnp.bfloat16, seed=1)
    q, others, dq, d_own = inputs["q"], [inputs[name] for name in case.segments], tangents["q"], tangents["own"]
    still = ((None, None),) * (len(others) - 1)
    visible = case.mask.visible(case.queries, case.own, case.context)
    scale = case.dim**-0.5
    want_q = kernel == "dq"
    wanted = want_q, ((not want_q, not want_q),) * len(others)

    def segments(others):
        return tuple(Segment(*pair, rows) for pair, rows in zip(others, visible))

    def run(q, others, dq, own_tangents, o, lse):
        tangents = dq, (own_tangents, *still)
        if kernel == "forward":
            return mosaic_gpu.forward(q, segments(others), scale)
        if kernel == "forward_tangent":
            return mosaic_gpu.forward_tangent(q, segments(others), scale, *tangents)
        if kernel == "tangent":
            return mosaic_gpu.tangent(q, segments(others), scale, o, lse, *tangents)
        return mosaic_gpu.backward(q, segments(others), scale, o, lse, dq, jnp.zeros_like(lse), wanted)

    o, lse = jax.jit(lambda q, others: mosaic_gpu.forward(q, segments(others), scale))(q, others)
    times = {}
    for candidate in candidates:
        with blocks.trying(kernel, case.dim, candidate):
            try:
                times[candidate] = milliseconds(lambda *args: run(*args), q, others, dq, d_own, o, lse)
            except ValueError as error:  # does not fit into shared memory
                print(f"  {kernel} {case.dim} {candidate}: {str(error).splitlines()[0]}", flush=True)
    return dict(sorted(times.items(), key=lambda item: item[1]))


def main(arguments=None):
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", default="tf_target_1", help="a case of pallas_kernels.attention.shapes.WAN")
    parser.add_argument("--kernels", default="forward,tangent,forward_tangent,dq,dkv")
    parser.add_argument("--dims", default="64,128")
    parser.add_argument("--write", action="store_true", help="update the table")
    options = parser.parse_args(arguments)
    table = json.loads(blocks.TABLE.read_text())
    for kernel, dim in itertools.product(options.kernels.split(","), options.dims.split(",")):
        times = autotune(kernel, dataclasses.replace(case(options.case), dim=int(dim)))
        for candidate, ms in times.items():
            print(f"{kernel} {dim} {candidate}: {ms:.2f} ms", flush=True)
        best = dataclasses.asdict(next(iter(times)))
        table.setdefault(kernel, {})[dim] = best
    if options.write:
        lines = ",\n".join(f"  {json.dumps(kernel)}: {json.dumps(dims)}" for kernel, dims in table.items())
        blocks.TABLE.write_text(f"{{\n{lines}\n}}\n")


if __name__ == "__main__":
    main()
