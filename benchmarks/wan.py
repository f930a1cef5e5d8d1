"""Speed of the Wan transformer with random weights: one velocity of a whole clip, and streaming it chunk by chunk.

    python -m benchmarks.wan
    XLA_PYTHON_CLIENT_MEM_FRACTION=.5 python -m benchmarks.wan --torch

Streaming is the transformer alone, through the sampler that `crcm sample` uses; frames/s are pixel frames. With
`--torch`, diffusers' `WanTransformer3DModel` runs on the same device with the same weights: its time, and how far the
two are apart. Compilation is not timed. `--tiny` checks the program itself, anywhere.
"""

from __future__ import annotations

import argparse
import math

import jax
import jax.numpy as jnp

from benchmarks.clock import first_and_best, seconds
from crcm_jax import compiler
from crcm_jax.chunks import ChunkPattern
from crcm_jax.models.base import Condition
from crcm_jax.models.bound import Bound
from crcm_jax.models.core.stack import listed
from crcm_jax.models.wan.config import WanConfig
from crcm_jax.models.wan.prompt import prompt
from crcm_jax.models.wan.transformer import WanTransformer
from crcm_jax.sampling import ContextRule, Few, Schedule, draw_noise, stream
from crcm_jax.sampling.schedule import MID_TIMES
from pallas_kernels.attention import IMPLEMENTATIONS

SIZES = ("1.3b", "14b")
TINY = {"dim": 32, "ffn_dim": 64, "heads": 2, "layers": 2, "freq_dim": 16, "text_dim": 16}

_NOISY, _NOISY_LATER = ContextRule(True), ContextRule(True, 1)
STREAMS = {
    "4 steps + context pass, frame-wise": (ChunkPattern(1, 1), Few()),
    "4 steps + context pass, chunks of 3": (ChunkPattern(3, 3), Few()),
    "2 steps, noisy context": (ChunkPattern(1, 1), Few(Schedule((2,), ((5 / 8,),)), _NOISY)),
    "2 steps, noisy context, 4 in chunk 0": (
        ChunkPattern(1, 1),
        Few(Schedule((4, 2), (MID_TIMES, (5 / 8,))), ContextRule(True, 1)),
    ),
    "1 step, noisy context": (ChunkPattern(1, 1), Few(Schedule((1,), ((),)), _NOISY)),
    "1 step, noisy context, 4 in chunk 0": (
        ChunkPattern(1, 1),
        Few(Schedule((4, 1), (MID_TIMES, ())), ContextRule(True, 1)),
    ),
}
"""Names, chunk patterns (frame-wise where nothing is said) and schedules (spec causal_rcm 6.1)."""


def random_params(network: WanTransformer, dtype, seed: int = 0):
    """Random weights in `dtype`, drawn on the device, never held in a wider type. No output is zero."""
    shapes, tree = jax.tree_util.tree_flatten_with_path(jax.eval_shape(network.init, jax.random.key(0)))

    @jax.jit
    def draw(key):
        leaves = []
        for i, (path, leaf) in enumerate(shapes):
            kernel, start = path[-1].key == "kernel", 1.0 if path[-1].key == "scale" else 0.0
            size = 1 / math.sqrt(leaf.shape[-2]) if kernel else 0.1
            leaves.append(start + size * jax.random.normal(jax.random.fold_in(key, i), leaf.shape, dtype))
        return jax.tree.unflatten(tree, leaves)

    return draw(jax.random.key(seed))


def flops(c: WanConfig, tokens: int, text: int) -> float:
    """Multiplications and additions of one velocity in which every token sees every token."""
    products = 6 * c.dim**2 + 2 * c.dim * c.ffn_dim
    attended = 2 * c.dim * (tokens + text)
    return 2.0 * c.layers * (tokens * (products + attended) + text * 2 * c.dim**2)


def bench_velocity(c: WanConfig, params, shape, cond: Condition, repeats: int) -> str:
    """One velocity of a whole clip, every frame seeing every frame."""
    x, t = jax.random.normal(jax.random.key(1), shape), jnp.full((1, 1), 0.7)
    velocity = jax.jit(Bound.velocity, compiler_options=compiler.options())
    model = Bound(WanTransformer(c), params)
    took = seconds(lambda: velocity(model, x, t, cond), repeats)
    tokens = math.prod(shape[1:4]) // math.prod(c.patch)
    work = flops(c, tokens, cond.prompt["text"].shape[1])
    return f"{took:8.3f} s  {work / took / 1e12:6.0f} TFLOP/s of {work / 1e12:.0f} TFLOP, {tokens} tokens"


def bench_stream(c: WanConfig, params, shape, cond: Condition, repeats: int, chunks: ChunkPattern, solver: Few) -> str:
    """A clip streamed chunk by chunk, without decoding."""
    model = Bound(WanTransformer(c, chunks, unrolled=isinstance(params["blocks"], list)), params)
    noise = draw_noise(jax.random.key(1), shape, solver.most)

    def run():
        return list(stream(model, cond, shape=shape, solver=solver, noise=noise))

    first, took = first_and_best(run, repeats)
    passes = sum(len(solver.times(chunk)) - 1 for chunk in range(chunks.count(shape[1])))
    passes += sum(not solver.context.noisy_at(i) for i in range(chunks.count(shape[1])))
    frames = 1 + 4 * (shape[1] - 1)
    each = f"{passes} passes of {1e3 * took / passes:.1f} ms"
    return f"{took:8.3f} s  {frames / took:6.1f} frames/s, {each}, compiled in {first - took:.0f} s"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="1.3b")
    for name, default in (("height", 480), ("width", 832), ("frames", 81), ("repeats", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--attention", choices=IMPLEMENTATIONS, help="[the best that applies]")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--only", default="", help="rows whose name holds this")
    parser.add_argument("--stacked", action="store_true", help="stream with the layers' weights stacked, not in a list")
    parser.add_argument("--torch", action="store_true", help="compare with diffusers' class")
    parser.add_argument("--tiny", action="store_true", help="a toy size")
    a = parser.parse_args()

    options = {"attention": a.attention, "dtype": a.dtype, "remat": "none"}
    c = WanConfig(**TINY, **options) if a.tiny else WanConfig.published(a.size, **options)
    height, width = (8, 12) if a.tiny else (a.height // 8, a.width // 8)
    shape = (1, 1 + (a.frames - 1) // 4, height, width, c.in_channels)
    params = random_params(WanTransformer(c), jnp.dtype(a.dtype))
    text = jax.random.normal(jax.random.key(2), (1, 512, c.text_dim)).at[:, 60:].set(0)
    cond = Condition(prompt(text))
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}: {a.size}, {a.dtype}, latents {shape}", flush=True)
    rows = {"velocity, bidirectional": lambda: bench_velocity(c, params, shape, cond, a.repeats)}
    layers = params if a.stacked else {**params, "blocks": listed(params["blocks"])}
    for name, (chunks, solver) in STREAMS.items():
        rows[name] = lambda chunks=chunks, solver=solver: bench_stream(
            c, layers, shape, cond, a.repeats, chunks, solver
        )
    for name, row in rows.items():
        if a.only in name:
            print(f"{name:38s} {row()}", flush=True)
    peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    print("peak of the device:", f"{peak / 2**30:.2f} GiB" if peak else "not reported")
    if a.torch:
        from benchmarks import wan_torch as bench_torch

        bench_torch.compare(c, params, shape, cond, a.repeats)


if __name__ == "__main__":
    main()
