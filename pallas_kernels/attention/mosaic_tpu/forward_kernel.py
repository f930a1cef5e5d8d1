"""Output and log-sum-exp, and in the same pass their tangents: one softmax that is corrected as keys come in."""

from __future__ import annotations

import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.attention.mosaic_tpu import tiles as t
from pallas_kernels.attention.mosaic_tpu.launch import by_queries
from pallas_kernels.attention.mosaic_tpu.tangent_kernel import moved_scores, read_tangents, tangent_products


def forward(q, segments, scale, chip, blocks, dq=None, dsegments=None):
    """o `[B, N, H, D]` and lse `[B, H, N]`; with dsegments also the tangents of both, along dq and dsegments."""
    with_tangent = dsegments is not None
    launch = by_queries("attention_forward_tangent" if with_tangent else "attention_forward", chip, blocks, q, segments)
    launch.read_queries(q=q)
    for number, segment in enumerate(segments):
        launch.read_keys(number, k=segment.k, v=segment.v)
    launch.write_queries("o", q.dtype)
    launch.write_vector("lse")
    vector, matrix = (1, blocks.q), (launch.dim, blocks.q)
    launch.keep(top=vector, total=vector, acc=matrix)
    if with_tangent:
        read_tangents(launch, dq, dsegments)
        launch.write_queries("do", q.dtype)
        launch.write_vector("dlse")
        launch.keep(mean=vector, dacc=matrix)
    lengths = [s.k.shape[1] for s in segments]
    sums = ["total", "acc", *(("mean", "dacc") if with_tangent else ())]

    def body(refs, step):
        @pl.when(step.first)
        def _():
            refs["top"][...] = jnp.full(vector, -jnp.inf, jnp.float32)
            for name in sums:
                refs[name][...] = jnp.zeros_like(refs[name])

        def visit(segment, masked):
            k, v = refs["k", segment][...], refs["v", segment][...]
            scores = t.dot_nt(k, refs["q"][...])
            if masked:
                tile = step.inner[segment]
                seen = t.seen_by(refs["rows"][4 * segment : 4 * segment + 4, :], tile, scores.shape)
                scores = jnp.where(seen, scores, -jnp.inf)
                v = t.without_tail(v, tile, lengths[segment])
            old = refs["top"][...]
            new = jnp.maximum(old, scores.max(axis=0, keepdims=True))
            base = jnp.where(new == -jnp.inf, 0.0, new) if masked else new
            weights = t.exp_scaled(scores - base, scale)
            fade = t.exp_scaled(old - base, scale)
            refs["top"][...] = new
            refs["total"][...] = refs["total"][...] * fade + weights.sum(axis=0, keepdims=True)
            refs["acc"][...] = refs["acc"][...] * fade + t.dot_tn(v, weights)
            if not with_tangent:
                return
            dacc = refs["dacc"][...] * fade
            if ("dv", segment) in refs:
                dv = refs["dv", segment][...]
                dacc += t.dot_tn(t.without_tail(dv, tile, lengths[segment]) if masked else dv, weights)
            mean = refs["mean"][...] * fade
            if (dscores := moved_scores(refs, segment)) is not None:
                moved = weights * dscores
                if masked:
                    moved = jnp.where(seen, moved, 0.0)
                dacc += t.dot_tn(v, moved) * scale
                mean += moved.sum(axis=0, keepdims=True)
            refs["dacc"][...] = dacc
            refs["mean"][...] = mean

        launch.for_each_kind(step, visit)

        @pl.when(step.last)
        def _():
            total = refs["total"][...]
            safe = jnp.where(total == 0, 1.0, total)
            out = refs["acc"][...] / safe
            refs["o"][...] = out.T.astype(refs["o"].dtype)
            refs["lse"][...] = jnp.where(total == 0, -jnp.inf, refs["top"][...] * scale + jnp.log(safe))
            if with_tangent:
                mean = refs["mean"][...] * scale / safe
                refs["do"][...] = (refs["dacc"][...] / safe - mean * out).T.astype(refs["do"].dtype)
                refs["dlse"][...] = mean

    tangents = tangent_products(dq, dsegments) if with_tangent else [0] * len(segments)
    results = launch.run(body, [2 + n for n in tangents])
    return tuple(results[name] for name in (("o", "lse", "do", "dlse") if with_tangent else ("o", "lse")))
