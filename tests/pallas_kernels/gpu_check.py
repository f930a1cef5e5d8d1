"""Holds the Hopper kernels to the plain implementation in float32 on the GPU at hand, and times them:

PYTHONPATH=. python tests/pallas_kernels/gpu_check.py [errors] [times]

Both where neither is named. Prints a table, and ends with exit status 1 where an error is beyond its limit. Inputs are
random and bfloat16; the plain implementation gets the same, cast to float32. An error is ‖x − y‖ / ‖y‖.
"""

import dataclasses
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import attention as bench
from benchmarks.clock import draw, milliseconds
from pallas_kernels.attention import attention, mosaic_gpu
from pallas_kernels.attention.mosaic_gpu.decode import choose_parts
from pallas_kernels.attention.shapes import BY_ENTRY, SMALL, WAN_CAPTIONS, case

SHARED = (
    "full_context", "one_query", "block_causal_window", "teacher_forcing_ragged", "teacher_forcing_window", "cached",
    "cached_window", "intervals", "empty_rows", "empty_tiles",
)  # fmt: skip
ROUNDED, EXACT = 6e-3, 1e-3
"""Limits for results in bfloat16, which an ideal kernel misses by 2.5e-3, and for float32 ones."""
LIMITS = {"o": ROUNDED, "lse": EXACT, "do": ROUNDED, "dlse": EXACT, "dq": ROUNDED, "dk": ROUNDED, "dv": ROUNDED}


def caller(shape, implementation, mask, **how):
    """The case as a function of its inputs."""

    def call(x):
        return attention(
            x["q"],
            *x["own"],
            context=x.get("context"),
            mask=mask,
            implementation=implementation,
            return_lse=True,
            **how,
        )

    return call


def results(shape, implementation, inputs, tangents, cotangents, traced):
    """Value, tangent and gradient in two passes, and value and tangent in one, by name."""

    @jax.jit
    def run(inputs, tangents, cotangents, mask):
        mask = mask if traced else shape.mask
        call = caller(shape, implementation, mask)
        (o, lse), (do, dlse) = jax.jvp(call, (inputs,), (tangents,))
        (grads,) = jax.vjp(call, inputs)[1](jax.tree.map(lambda g, x: g.astype(x.dtype), cotangents, (o, lse)))
        together = jax.jvp(caller(shape, implementation, mask, one_pass=True), (inputs,), (tangents,))
        own = {"q": grads["q"]} | {f"{x}_{name}": grads[name][i] for name in shape.segments for i, x in enumerate("kv")}
        one = {f"{name} one_pass": x for name, x in zip(("o", "lse", "do", "dlse"), jax.tree.leaves(together))}
        return {"o": o, "lse": lse, "do": do, "dlse": dlse} | {f"d{name}": x for name, x in own.items()} | one

    return run(inputs, tangents, cotangents, shape.mask)


def error(value, truth):
    """‖value − truth‖ / ‖truth‖; infinite where one of them is finite and the other is not."""
    value, truth = np.asarray(value, np.float64), np.asarray(truth, np.float64)
    finite = np.isfinite(truth)
    if not np.array_equal(np.isfinite(value), finite):
        return np.inf
    return np.linalg.norm(value[finite] - truth[finite]) / (np.linalg.norm(truth[finite]) or 1.0)


def compared(shape, traced, implementation="mosaic_gpu"):
    """Errors by name, and the share of its limit that the worst takes."""
    inputs, tangents = draw(shape, jnp.bfloat16), draw(shape, jnp.bfloat16, seed=1)
    wide = lambda tree: jax.tree.map(lambda x: x.astype(jnp.float32), tree)  # noqa: E731
    lse = jax.jit(caller(shape, "reference", shape.mask))(wide(inputs))[1]
    g = draw(shape, jnp.bfloat16, seed=2)["q"]
    g_lse = jnp.where(jnp.isfinite(lse), jax.random.normal(jax.random.key(3), lse.shape), 0)
    truth = results(shape, "reference", wide(inputs), wide(tangents), (wide(g), g_lse), traced=False)
    found = results(shape, implementation, inputs, tangents, (g, g_lse), traced)
    errors = {name: error(found[name], truth[name]) for name in truth}
    return errors, max(e / LIMITS[name.split("_")[0].split(" ")[0]] for name, e in errors.items())


def check_errors() -> bool:
    """Prints the largest errors of every case; whether all are within limits, and a wrong mask is not."""
    good = True
    print("| case | mask | parts | " + " | ".join(LIMITS) + " | |\n" + "|---" * (len(LIMITS) + 4) + "|")
    shapes = [case(name, SMALL) for name in SHARED] + list(BY_ENTRY)
    for shape in shapes:
        for traced in (False, True) if jax.tree.leaves(shape.mask) else (False,):
            errors, worst = compared(shape, traced)
            cells = [max(e for n, e in errors.items() if n.split("_")[0].split(" ")[0] == column) for column in LIMITS]
            parts = choose_parts((shape.batch, shape.queries, shape.heads, shape.dim))
            parts = parts if type(shape.mask).__name__ == "Cached" else 1
            good &= bool(worst <= 1)
            row = [shape.name, "traced" if traced else "static", str(parts), *(f"{e:.1e}" for e in cells)]
            print("| " + " | ".join(row) + f" | {'ok' if worst <= 1 else 'WRONG'} |", flush=True)
    shape = case("captions", BY_ENTRY)
    inputs = draw(shape, jnp.bfloat16)
    exchanged = dataclasses.replace(shape.mask, lengths=shape.mask.lengths[::-1])
    there, other = (jax.jit(caller(shape, "mosaic_gpu", mask))(inputs)[0] for mask in (shape.mask, exchanged))
    shown = error(other, there)
    print(f"\ncaptions exchanged between entries: {shown:.1e}, which must be beyond {ROUNDED}", flush=True)
    return good and bool(shown > ROUNDED)


def print_times():
    """Milliseconds of the cases of docs/benchmarks.md, and of captions that a batch shares and does not."""
    print("\n| workload | by | ms |\n|---|---|---|")
    options = types.SimpleNamespace(only="", implementation="mosaic_gpu")
    for workload in (bench.full, bench.teacher_forcing, bench.decoding):
        for row in workload(False, options):
            if row.by.startswith("this package"):
                print(f"| {row.workload} | {row.by} | {row.ms:.3f} |", flush=True)
    for shape in WAN_CAPTIONS:
        name = "lengths" if "tf" in shape.name else "sink"
        for kind, lengths in (
            ("one length", 512),
            ("equal lengths by entry", (512, 512)),
            ("of 77 and 512", (77, 512)),
        ):
            one = dataclasses.replace(shape, mask=dataclasses.replace(shape.mask, **{name: lengths}))
            inputs, tangents = draw(one, jnp.bfloat16), draw(one, jnp.bfloat16, seed=1)
            call = bench.caller(one, options)
            still = {"context": inputs["context"]}
            moving = {name: inputs[name] for name in ("q", "own")}
            times = {"forward": milliseconds(call, inputs)}
            if "tf" in shape.name:
                times["forward+tangent"] = milliseconds(
                    lambda x, dx, still, call=call: jax.jvp(lambda x: call(x | still), (x,), (dx,)),
                    moving, {name: tangents[name] for name in moving}, still,
                )  # fmt: skip
                times["backward"] = bench.backward_time(call, inputs)
            for work, ms in times.items():
                print(f"| {shape.name}, {work} | captions {kind} | {ms:.3f} |", flush=True)


def main(words):
    """Command line; the exit status."""
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}", flush=True)
    if reason := mosaic_gpu._no_hopper():
        print(f"nothing to check: {reason}")
        return 1
    good = check_errors() if not words or "errors" in words else True
    if not words or "times" in words:
        print_times()
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
