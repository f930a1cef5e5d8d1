"""Prints the table of errors against float64 for docs/benchmarks.md:

PYTHONPATH=. python tests/pallas_kernels/numerics_table.py chunked reference
"""

import sys

import jax
import jax.numpy as jnp
import test_attention_numerics as numerics

from pallas_kernels.attention.shapes import SMALL, case

COLUMNS = ("o", "lse", "do", "dq", "dk_own", "dv_own", "dk_context", "dv_context")


def main(backends):
    """One line for every backend, dtype and kind of input, and one for what an ideal kernel would give."""
    shape = case("teacher_forcing", SMALL)
    print("| backend | dtype | inputs |", " | ".join(COLUMNS), "|")
    print("|---" * (3 + len(COLUMNS)) + "|")
    for dtype in (jnp.bfloat16, jnp.float16, jnp.float32):
        name = jnp.dtype(dtype).name
        for kind in ("random", *numerics.ADVERSARIAL):
            inputs, tangents = numerics.adversarial(kind, shape, dtype)
            for backend in backends:
                try:
                    jax.eval_shape(numerics.caller(shape, backend), inputs)
                except ValueError:
                    continue
                got, cotangents = numerics.measure(shape, backend, inputs, tangents)
                line(backend, name, kind, numerics.errors(shape, inputs, tangents, got, cotangents))
            if dtype != jnp.float32:
                best = numerics.ideal(shape, inputs, tangents, cotangents, dtype)
                line("ideal", name, kind, numerics.errors(shape, inputs, tangents, best, cotangents))


def line(*cells):
    *names, found = cells
    print("|", " | ".join([*names, *(f"{found[c]:.1e}" for c in COLUMNS)]), "|", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
