"""Tangents of output and log-sum-exp, from both saved: with P = exp(S − lse) and Ṡ = s(q̇kᵀ + qk̇ᵀ),

    ȯ = (P∘Ṡ)v + Pv̇ − rowsum(P∘Ṡ)·o,    lse's tangent = rowsum(P∘Ṡ).

Terms of inputs without a tangent are left out, and so are segments that have none.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.attention.mosaic_tpu import tiles as t
from pallas_kernels.attention.mosaic_tpu.launch import by_queries


def tangent(q, segments, scale, o, lse, dq, dsegments, chip, blocks):
    """ȯ `[B, N, H, D]` and the tangent of lse `[B, H, N]`."""
    moving = [i for i, pair in enumerate(dsegments) if dq is not None or any(x is not None for x in pair)]
    if not moving:
        return jnp.zeros_like(o), jnp.zeros_like(lse)
    segments, dsegments = [segments[i] for i in moving], [dsegments[i] for i in moving]
    launch = by_queries("attention_tangent", chip, blocks, q, segments)
    launch.read_queries(q=q, o=o)
    launch.read_vectors(lse=lse)
    for number, segment in enumerate(segments):
        launch.read_keys(number, k=segment.k, v=segment.v)
    read_tangents(launch, dq, dsegments)
    launch.write_queries("do", o.dtype)
    launch.write_vector("dlse")
    launch.keep(mean=(1, blocks.q), acc=(launch.dim, blocks.q))
    lengths = [s.k.shape[1] for s in segments]

    def body(refs, step):
        @pl.when(step.first)
        def _():
            for name in ("mean", "acc"):
                refs[name][...] = jnp.zeros_like(refs[name])

        def visit(segment, masked):
            tile = step.inner[segment]
            weights = t.weights(refs["k", segment][...], refs["q"][...], refs["lse"][...], scale)
            if masked:
                seen = t.seen_by(refs["rows"][4 * segment : 4 * segment + 4, :], tile, weights.shape)
                weights = jnp.where(seen, weights, 0.0)
            acc = refs["acc"][...]
            if ("dv", segment) in refs:
                dv = refs["dv", segment][...]
                acc += t.dot_tn(t.without_tail(dv, tile, lengths[segment]) if masked else dv, weights)
            if (dscores := moved_scores(refs, segment)) is not None:
                moved = weights * dscores
                v = refs["v", segment][...]
                if masked:
                    moved = jnp.where(seen, moved, 0.0)
                    v = t.without_tail(v, tile, lengths[segment])
                acc += t.dot_tn(v, moved) * scale
                refs["mean"][...] += moved.sum(axis=0, keepdims=True)
            refs["acc"][...] = acc

        launch.for_each_kind(step, visit)

        @pl.when(step.last)
        def _():
            mean = refs["mean"][...] * scale
            out = refs["o"][...].astype(jnp.float32).T
            refs["do"][...] = (refs["acc"][...] - mean * out).T.astype(refs["do"].dtype)
            refs["dlse"][...] = mean

    results = launch.run(body, [1 + n for n in tangent_products(dq, dsegments)])
    return results["do"], results["dlse"]


def read_tangents(launch, dq, dsegments):
    """Adds those tangents that there are to a kernel's inputs."""
    if dq is not None:
        launch.read_queries(dq=dq)
    for number, (dk, dv) in enumerate(dsegments):
        launch.read_keys(number, **{name: x for name, x in (("dk", dk), ("dv", dv)) if x is not None})


def tangent_products(dq, dsegments):
    """Matrix products a tile of each segment takes for its tangents, on top of those for its weights."""
    moves = [(dq is not None) + (dk is not None) for dk, _ in dsegments]
    return [n + (n > 0) + (dv is not None) for n, (_, dv) in zip(moves, dsegments)]


def moved_scores(refs, segment):
    """q̇kᵀ + qk̇ᵀ of a tile, keys × queries, or None where neither has a tangent."""
    terms = []
    if "dq" in refs:
        terms.append(t.dot_nt(refs["k", segment][...], refs["dq"][...]))
    if ("dk", segment) in refs:
        terms.append(t.dot_nt(refs["dk", segment][...], refs["q"][...]))
    return sum(terms[1:], terms[0]) if terms else None
