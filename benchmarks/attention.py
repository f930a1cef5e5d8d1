"""Benchmark at Wan2.1-1.3B shapes: `python -m benchmarks.attention`.

Prints a table of times and useful TFLOP/s: 4 floating-point operations per allowed query–key pair and channel for a
forward pass, 10 for a backward pass, 12 for forward and tangent, whatever a kernel really computes. Beside it, in the
same run, cuDNN through `jax.nn` where there is a GPU, and FlexAttention and SDPA where torch with a GPU is importable.

On a machine without an accelerator the shapes shrink to one that a CPU finishes.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
from typing import NamedTuple

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch wants memory too

import jax
import jax.numpy as jnp

from benchmarks.clock import draw, milliseconds
from pallas_kernels.attention import BlockCausal, TeacherForcing, attention, shapes

FORWARD, BACKWARD, FORWARD_TANGENT = 4, 10, 12


class Row(NamedTuple):
    """One line: what ran, where, how long, how much useful work that was."""

    workload: str
    by: str
    ms: float
    flops: float


def main(arguments=None):
    """Command line."""
    parser = argparse.ArgumentParser(description="Attention at Wan2.1-1.3B shapes.")
    parser.add_argument("--only", default="", help="run workloads whose name contains this")
    parser.add_argument("--implementation", help="backend; the default choice where left out")
    parser.add_argument("--no-torch", action="store_true", help="leave FlexAttention and SDPA out")
    options = parser.parse_args(arguments)
    small = jax.default_backend() == "cpu"
    ceiling = matrix_product_rate(512 if small else 8192)
    device = jax.devices()[0].device_kind
    print(f"{device}, jax {jax.__version__}; matrix product in bf16: {ceiling / 1e12:.3g} TFLOP/s", flush=True)
    rows = []

    def add(row):
        rows.append(row)
        print("  ", row.workload, "|", row.by, f"| {row.ms:.3f} ms", flush=True)

    for workload in (full, teacher_forcing, decoding):
        for row in workload(small, options):
            add(row)
    if not options.no_torch and not small:
        for row in torch_rows(options):
            add(row)
    print(table(rows, ceiling))
    print(memory(small, options))


def table(rows, ceiling) -> str:
    """Markdown, one line a row."""
    lines = ["| workload | by | ms | useful TFLOP/s | of the matrix product |", "|---|---|---|---|---|"]
    for row in rows:
        rate = row.flops / row.ms * 1e3
        lines.append(f"| {row.workload} | {row.by} | {row.ms:.2f} | {rate / 1e12:.3g} | {rate / ceiling:.0%} |")
    return "\n".join(lines)


def memory(small: bool, options) -> str:
    """Temporary memory of a teacher-forcing target's value, tangent and gradient, for half a clip and for all of it."""
    lines = [
        "| tokens | inputs, one tensor | temporaries of value and tangent | temporaries of the gradient |",
        "|---|---|---|---|",
    ]
    whole = cases(small)["tf_target_3"]
    for parts in (2, 1):
        tokens = whole.mask.chunk * (whole.queries // whole.mask.chunk // parts)
        case = dataclasses.replace(whole, queries=tokens, own=tokens, context=tokens)
        call = caller(case, options)
        inputs = jax.eval_shape(lambda case=case: draw(case, jnp.bfloat16))
        functions = (
            lambda x, dx, call=call: jax.jvp(call, (x,), (dx,)),
            lambda x, g, call=call: jax.vjp(call, x)[1](g["q"]),
        )
        sizes = [jax.jit(f).lower(inputs, inputs).compile().memory_analysis().temp_size_in_bytes for f in functions]
        sizes = [inputs["q"].size * 2, *sizes]
        lines.append(f"| {tokens} | " + " | ".join(f"{size / 2**20:.1f} MiB" for size in sizes) + " |")
    return "\n".join(lines)


def matrix_product_rate(size: int) -> float:
    """FLOP/s of a square bf16 matrix product: the ceiling in practice."""
    a, b = (jax.random.normal(key, (size, size), jnp.bfloat16) for key in jax.random.split(jax.random.key(0)))
    return 2 * size**3 / milliseconds(jnp.matmul, a, b) * 1e3


def cases(small: bool) -> dict[str, shapes.Case]:
    """The named cases; on a CPU a twentieth of the tokens, and two heads."""
    if not small:
        return {case.name: case for case in shapes.WAN}

    def shrink(case):
        mask = case.mask
        if isinstance(mask, (BlockCausal, TeacherForcing)):
            mask = dataclasses.replace(mask, first=mask.first // 20, chunk=mask.chunk // 20)
        elif case.context is not None:
            mask = dataclasses.replace(mask, stop=mask.stop // 20)
        lengths = {name: getattr(case, name) and getattr(case, name) // 20 for name in ("queries", "own", "context")}
        return dataclasses.replace(case, mask=mask, heads=2, kv_heads=2, **lengths)

    return {case.name: shrink(case) for case in shapes.WAN}


def work(case, factor: int, names=("own", "context")) -> float:
    """Useful FLOPs of a case."""
    return factor * case.batch * case.heads * case.dim * sum(n for name, n in case.pairs().items() if name in names)


def caller(case, options, **more):
    """The case as a function of its inputs."""

    def call(inputs):
        return attention(
            inputs["q"],
            *inputs["own"],
            context=inputs.get("context"),
            mask=case.mask,
            implementation=options.implementation,
            **more,
        )

    return call


def full(small, options):
    """Bidirectional attention: forward, forward and tangent, backward."""
    case = cases(small)["full"]
    inputs, tangents = draw(case, jnp.bfloat16), draw(case, jnp.bfloat16, seed=1)
    call = caller(case, options)
    if options.only in "full, forward":
        yield Row("full, forward", "this package", milliseconds(call, inputs), work(case, FORWARD))
        if cudnn := cudnn_of(small):
            yield Row("full, forward", "cuDNN", milliseconds(cudnn, inputs), work(case, FORWARD))
    if options.only in "full, forward+tangent":
        yield from tangent_rows("full, forward+tangent", case, options, inputs, tangents)
    if options.only in "full, backward":
        yield Row("full, backward", "this package", backward_time(call, inputs), work(case, BACKWARD))
        if cudnn := cudnn_of(small):
            yield Row("full, backward", "cuDNN", backward_time(cudnn, inputs), work(case, BACKWARD))


def teacher_forcing(small, options):
    """Both streams, as a layer of a teacher-forcing step runs them; frame by frame, and in chunks of 3 frames."""
    for chunk in (1, 3):
        target, context = (cases(small)[f"tf_{stream}_{chunk}"] for stream in ("target", "context"))
        name = f"teacher forcing, chunks of {chunk}"
        inputs, clean = draw(target, jnp.bfloat16), draw(context, jnp.bfloat16, seed=2)
        tangents = draw(target, jnp.bfloat16, seed=1)
        both = work(target, 1) + work(context, 1)
        calls = [(caller(target, options), inputs), (caller(context, options), clean)]
        if options.only in f"{name}, forward":
            ms = sum(milliseconds(call, x) for call, x in calls)
            yield Row(f"{name}, forward", "this package", ms, FORWARD * both)
        if options.only in f"{name}, backward":
            ms = sum(backward_time(call, x) for call, x in calls)
            yield Row(f"{name}, backward", "this package", ms, BACKWARD * both)
        if options.only in f"{name}, forward+tangent":
            ahead = milliseconds(calls[1][0], clean)
            label = f"{name}, forward+tangent of the target, forward of the context"
            for row in tangent_rows(label, target, options, inputs, tangents):
                yield row._replace(ms=row.ms + ahead, flops=row.flops + work(context, FORWARD))


def tangent_rows(label, case, options, inputs, tangents):
    """Value and tangent with a moving q, k, v and a context that stands still, in two passes and in one."""
    moving = {name: tangents[name] for name in ("q", "own")}
    context = {name: x for name, x in inputs.items() if name == "context"}
    here = {name: inputs[name] for name in moving}
    ways = ((False, "this package"), (True, "this package, one_pass"))
    for one_pass, by in ways if jax.default_backend() != "cpu" else ways[:1]:
        call = caller(case, options, one_pass=one_pass)

        def both(here, moving, context, call=call):
            return jax.jvp(lambda x: call(x | context), (here,), (moving,))

        yield Row(label, by, milliseconds(both, here, moving, context), work(case, FORWARD_TANGENT))


def decoding(small, options):
    """One chunk against a cache that holds the rest of the clip."""
    for chunk in (1, 3):
        case = cases(small)[f"decode_{chunk}"]
        name = f"decoding, a chunk of {chunk}"
        if options.only in name:
            inputs = draw(case, jnp.bfloat16)
            yield Row(name, "this package", milliseconds(caller(case, options), inputs), work(case, FORWARD))
            if cudnn := cudnn_of(small):
                joined = [jnp.concatenate(pair, axis=1) for pair in zip(inputs["context"], inputs["own"])]
                joined = {"q": inputs["q"], "own": tuple(joined)}
                yield Row(name, "cuDNN, keys joined beforehand", milliseconds(cudnn, joined), work(case, FORWARD))


def cudnn_of(small):
    """Unmasked attention by cuDNN, or None where there is none."""
    if small or jax.default_backend() != "gpu":
        return None
    return lambda inputs: jax.nn.dot_product_attention(inputs["q"], *inputs["own"], implementation="cudnn")


def backward_time(call, inputs) -> float:
    """Time of the transpose alone."""
    out, pull = jax.jit(lambda x: jax.vjp(call, x))(inputs)
    return milliseconds(lambda pull, g: pull(g), pull, jax.random.normal(jax.random.key(9), out.shape, out.dtype))


def torch_rows(options):
    """FlexAttention over the packed teacher-forcing layout, and SDPA, where torch has a GPU."""
    try:
        import torch
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention
    except ImportError:
        return
    if not torch.cuda.is_available():
        return
    named = cases(False)
    case = named["full"]

    def tensors(tokens):
        shape = case.batch, case.heads, tokens, case.dim
        return [torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]

    def measure(function, repeats=10):
        for _ in range(3):
            function()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        times = []
        for _ in range(repeats):
            begin.record()
            function()
            end.record()
            torch.cuda.synchronize()
            times.append(begin.elapsed_time(end))
        return sorted(times)[repeats // 2]

    def both_ways(name, by, function, q, k, v, pairs):
        out = function(q, k, v)
        g = torch.randn_like(out)
        with torch.no_grad():
            yield Row(f"{name}, forward", by, measure(lambda: function(q, k, v)), FORWARD * pairs)
        ms = measure(lambda: torch.autograd.grad(out, (q, k, v), g, retain_graph=True))
        yield Row(f"{name}, backward", by, ms, BACKWARD * pairs)

    if options.only in "full":
        sdpa = torch.nn.functional.scaled_dot_product_attention
        yield from both_ways("full", "torch SDPA", sdpa, *tensors(case.queries), work(case, 1))
    compiled = torch.compile(flex_attention)
    for chunk in (1, 3):
        name = f"teacher forcing, chunks of {chunk}"
        if options.only not in name:
            continue
        half, tokens = case.queries, chunk * shapes.FRAME

        def allowed(b, h, i, j, half=half, tokens=tokens):
            noisy_q, noisy_k = i >= half, j >= half
            chunk_q, chunk_k = (i % half) // tokens, (j % half) // tokens
            clean = ~noisy_q & ~noisy_k & (chunk_k <= chunk_q)
            return clean | (noisy_q & ~noisy_k & (chunk_k < chunk_q)) | (noisy_q & noisy_k & (chunk_k == chunk_q))

        mask = create_block_mask(allowed, None, None, 2 * half, 2 * half, device="cuda", _compile=True)
        pairs = work(named[f"tf_target_{chunk}"], 1) + work(named[f"tf_context_{chunk}"], 1)
        packed = tensors(2 * half)
        yield from both_ways(
            name, "torch FlexAttention", lambda q, k, v, mask=mask: compiled(q, k, v, block_mask=mask), *packed, pairs
        )


if __name__ == "__main__":
    main()
