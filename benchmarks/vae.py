"""Speed and memory of the Wan autoencoders with random weights, on whatever device there is.

    python -m benchmarks.vae --height 480 --width 832 --frames 81

Compilation is not timed. "decode, later chunk" is what a stream pays for each chunk after its first.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import time

import jax
import jax.numpy as jnp

from crcm_jax.models.vae.config import CONVOLUTIONS, PUBLISHED
from crcm_jax.models.vae.wan import WanVAE


def random_params(vae: WanVAE):
    """Unit-variance layers in the compute dtype."""
    shapes, tree = jax.tree.flatten(jax.eval_shape(vae.init, jax.random.key(0)))

    def draw(i, shape):
        if len(shape) == 1:
            return jnp.ones(shape, vae.config.dtype)
        return jax.random.normal(jax.random.key(i), shape, vae.config.dtype) / math.sqrt(math.prod(shape[:-1]))

    return jax.tree.unflatten(tree, [draw(i, s.shape) for i, s in enumerate(shapes)])


def measure(function, *args, repeats: int) -> tuple[float, str]:
    """(seconds of the fastest of `repeats` calls, what the compiled program holds in memory at once)."""
    program = jax.jit(function).lower(*args).compile()
    jax.block_until_ready(program(*args))
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(program(*args))
        best = min(best, time.perf_counter() - start)
    found = program.memory_analysis()
    if found is None:
        return best, "memory not reported"
    sizes = found.argument_size_in_bytes, found.output_size_in_bytes, found.temp_size_in_bytes
    total, given, results, between = (s / 2**30 for s in (sum(sizes), *sizes))
    return best, f"{total:.2f} GiB (arguments {given:.2f}, results {results:.2f}, between {between:.2f})"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", choices=PUBLISHED, default="2.1")
    for name, default in (("height", 480), ("width", 832), ("frames", 81), ("batch", 1), ("repeats", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--step", type=int, default=1, help="latent frames at once within a whole clip")
    parser.add_argument("--chunk", type=int, default=1, help="latent frames a chunk of the stream")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--convolution", choices=CONVOLUTIONS, default="fold")
    parser.add_argument("--width-scale", type=float, default=1.0, help="scale the networks' widths, to try things out")
    parser.add_argument("--torch", action="store_true", help="time diffusers' class for 2.1 too")
    a = parser.parse_args()

    config = PUBLISHED[a.version](dtype=a.dtype, step=a.step, convolution=a.convolution)
    sizes = {name: max(1, int(getattr(config, name) * a.width_scale)) for name in ("encoder_dim", "decoder_dim")}
    vae = WanVAE(dataclasses.replace(config, **sizes))
    params = random_params(vae)
    shape = vae.latent_shape(a.frames, a.height, a.width)
    z = jax.random.normal(jax.random.key(1), (a.batch, *shape))
    video = jax.random.uniform(jax.random.key(2), (a.batch, a.frames, a.height, a.width, 3), minval=-1)
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}: Wan {a.version}, {a.dtype}, {a.convolution}")
    print(f"{a.batch} × {a.frames} frames of {a.height}×{a.width}, latents {shape}, {a.step} latent frames at once")

    def report(name, frames, function, *args):
        took, note = measure(function, *args, repeats=a.repeats)
        print(f"{name:20s} {took * 1e3:10.1f} ms {a.batch * frames / took:8.1f} frames/s   {note}", flush=True)

    first, later = z[:, : a.chunk], z[:, a.chunk : 2 * a.chunk]
    report("decode, whole clip", a.frames, vae.decode, params, z)
    report("decode, first chunk", 4 * a.chunk - 3, vae.decode_chunk, params, first)
    if later.shape[1] == a.chunk:
        cache = vae.decode_chunk(params, first)[1]
        report("decode, later chunk", 4 * a.chunk, vae.decode_chunk, params, later, cache)
    report("encode, whole clip", a.frames, vae.encode, params, video)
    peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    print("peak of the device:", f"{peak / 2**30:.2f} GiB" if peak else "not reported")
    if a.torch:
        from benchmarks import wan_torch as bench_torch

        bench_torch.vae(a.frames, a.height, a.width, a.repeats)


if __name__ == "__main__":
    main()
