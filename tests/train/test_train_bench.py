"""The bench: it runs, and what it calls useful is what the mathematics needs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from benchmarks import kernel_times
from benchmarks import train as bench
from benchmarks.train_work import Clip
from crcm_jax import compiler
from crcm_jax.aot.flops import matmul_flops
from crcm_jax.chunks import ChunkPattern
from crcm_jax.models.base import Condition
from crcm_jax.models.bound import Bound

FRAMES, TEXT = 5, 5


def clip(chunks=None):
    network = tiny.wan(chunks, attention="reference")
    return network, Clip(network.config, (FRAMES, tiny.HEIGHT, tiny.WIDTH), TEXT)


def counted(function, *arguments):
    return matmul_flops(jax.make_jaxpr(function)(*arguments).jaxpr)


def inputs(network):
    params = tiny.parameters(network)
    x, t = jnp.asarray(tiny.latents(1, 1, FRAMES)), jnp.full((1, 1), 0.5)
    return params, x, t, Condition({"text": jnp.asarray(tiny.normal(2, 1, TEXT, 8))})


def time_products(c):
    """Of the time's small network, which `bench_work` leaves out."""
    return 2 * (c.freq_dim * c.dim + c.dim**2 + 6 * c.dim**2)


def test_bidirectional_passes_are_what_a_program_without_masks_computes():
    network, shape = clip()
    c, work = network.config, shape.bidirectional()
    params, x, t, cond = inputs(network)
    forward = lambda params, x, t: Bound(network, params).velocity(x, t, cond)  # noqa: E731
    once = counted(forward, params, x, t)
    assert once == work.forward + time_products(c)

    moved = lambda x, t: jax.jvp(lambda x, t: forward(params, x, t), (x, t), (x, t))  # noqa: E731
    assert counted(moved, x, t) - once == work.tangent + time_products(c)

    both = counted(jax.grad(lambda params: jnp.sum(forward(params, x, t))), params)
    n = FRAMES * shape.tokens
    # No gradient in latents, text and frequencies; and without tiles nobody builds the scores again.
    unneeded = 2 * c.dim * (n * c.in_channels * 4 + TEXT * c.text_dim + c.freq_dim)
    scores = (work.own + work.across) / 2
    assert both - once == work.backward - scores + 2 * time_products(c) - unneeded


@pytest.mark.parametrize("chunks", [ChunkPattern(1, 1), ChunkPattern(1, 2), ChunkPattern(1, 1, window=2, sink=1)])
def test_allowed_pairs_are_counted_one_by_one(chunks):
    _, shape = clip(chunks)
    index = np.repeat(chunks.index(FRAMES), shape.tokens)
    query, key = index[:, None], index[None]
    near = (key > query - chunks.window) | (key < chunks.sink) if chunks.window else True
    layers, rate = shape.config.layers, 4 * shape.config.dim
    cross = rate * layers * len(index) * TEXT
    work = shape.teacher_forcing(chunks)
    assert work.own == rate * layers * (query == key).sum()
    assert work.across - cross == rate * layers * ((key < query) & near).sum()
    assert work.still == rate * (layers - 1) * (((key <= query) & near).sum() + len(index) * TEXT)

    parts = [shape.cached(chunks, chunk) for chunk in range(chunks.count(FRAMES))]
    assert sum(part.own for part in parts) == work.own
    assert sum(part.across for part in parts) == work.across
    assert sum(part.frozen for part in parts) == work.across - cross
    assert sum(part.products for part in parts) == work.moving


def test_last_layer_of_the_context_is_not_counted_beyond_its_keys():
    one = Clip(dataclasses.replace(clip()[0].config, layers=1), (2, 4, 6), TEXT)
    work, alone = one.teacher_forcing(ChunkPattern(1, 1)), one.bidirectional()
    c, n = one.config, 2 * one.tokens
    assert work.still == 0
    assert work.products - alone.products == n * (4 * c.dim**2 + 2 * c.in_channels * 4 * c.dim)


@pytest.mark.parametrize(
    "arguments, names",
    [
        (["--only", "jvp,optimiser"], ["student, jvp", "optimiser and average"]),
        (["--training", "sf_dmd", "--chunks", "1-3", "--only", "both scores"], ["both scores"]),
    ],
)
def test_it_runs(arguments, names, capsys, monkeypatch):
    monkeypatch.setattr(compiler, "options", lambda: {"xla_backend_optimization_level": 0})
    bench.main(["--tiny", "--repeats", "1", *arguments])
    said = capsys.readouterr().out
    for name in names:
        assert f"\n{name} " in said, said


def test_kernels_are_told_apart_by_kind_and_length(monkeypatch):
    times = [("attention_dq_mosaic_gpu_kernel", 3.0), ("nvjet_sm90_tst_256x160", 1.0), ("nvjet_sm90_tst_256x160", 0.1)]
    times += [("ncclDevKernel_AllGather_RING_LL", 0.5), ("loop_add_fusion_3", 0.25), ("memcpy128", 0.15)]
    monkeypatch.setattr(kernel_times, "kernels", lambda folder: iter(times))
    lines = [line.split() for line in kernel_times.table("").splitlines()]
    kinds = {" ".join(line[4:]): float(line[0]) for line in lines if len(line) > 3 and line[3] == "%"}
    assert kinds == {
        "attention": 3.0, "matrix products": 1.1, "collectives": 0.5, "element-wise": 0.25, "copies": 0.15
    }  # fmt: skip
    assert sum("nvjet" in " ".join(line) for line in lines) == 2
