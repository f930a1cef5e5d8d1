"""Gradients from output and log-sum-exp, in two kernels: one sums over keys, the other over queries.

With P = exp(S − lse), Ṗ = ȯvᵀ and δ = rowsum(ȯ∘o) − lse's cotangent (FlashAttention-2, with ȯ the cotangent of o):

    dS = P∘(Ṗ − δ),    dq = s·dS k,    dk = s·dSᵀ q,    dv = Pᵀ ȯ.

Each result is summed by one core in the plan's order, so that it is the same every time.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.attention.mosaic_tpu import tiles as t
from pallas_kernels.attention.mosaic_tpu.launch import by_keys, by_queries


def delta(o, do, dlse):
    """δ `[B, H, N]` in float32."""
    return (do.astype(jnp.float32) * o.astype(jnp.float32)).sum(axis=-1).swapaxes(1, 2) - dlse


def backward_q(q, segments, scale, lse, delta, do, chip, blocks):
    """dq `[B, N, H, D]`."""
    launch = by_queries("attention_backward_q", chip, blocks, q, segments)
    launch.read_queries(q=q, do=do)
    launch.read_vectors(lse=lse, delta=delta)
    for number, segment in enumerate(segments):
        launch.read_keys(number, k=segment.k, v=segment.v)
    launch.write_queries("dq", q.dtype)
    launch.keep(acc=(launch.dim, blocks.q))
    lengths = [s.k.shape[1] for s in segments]

    def body(refs, step):
        @pl.when(step.first)
        def _():
            refs["acc"][...] = jnp.zeros_like(refs["acc"])

        def visit(segment, masked):
            k, tile = refs["k", segment][...], step.inner[segment]
            dscores = _weights(refs, segment, scale) * _moved_weights(refs, segment)
            if masked:
                seen = t.seen_by(refs["rows"][4 * segment : 4 * segment + 4, :], tile, dscores.shape)
                dscores = jnp.where(seen, dscores, 0.0)
                k = t.without_tail(k, tile, lengths[segment])
            refs["acc"][...] += t.dot_tn(k, dscores)

        launch.for_each_kind(step, visit)

        @pl.when(step.last)
        def _():
            refs["dq"][...] = (refs["acc"][...] * scale).T.astype(refs["dq"].dtype)

    return launch.run(body, [3] * len(segments))["dq"]


def backward_kv(q, segment, scale, lse, delta, do, wanted, chip, blocks):
    """(dk, dv) of one segment, `[B, M, Hkv, D]`; wanted: two booleans, at least one of them true."""
    names = [name for name, want in zip(("dk", "dv"), wanted) if want]
    launch = by_keys("attention_backward_kv", chip, blocks, q, segment)
    launch.read_queries(q=q, do=do)
    launch.read_vectors(lse=lse, delta=delta)
    launch.read_keys(0, k=segment.k, v=segment.v)
    for name in names:
        launch.write_keys(name, segment.k)
    launch.keep(**{f"{name}_sum": (blocks.k, launch.dim) for name in names})

    def body(refs, step):
        @pl.when(step.first)
        def _():
            for name in names:
                refs[f"{name}_sum"][...] = jnp.zeros_like(refs[f"{name}_sum"])

        def visit(_, masked):
            q, do, tile = refs["q"][...], refs["do"][...], step.inner[0]
            weights = _weights(refs, 0, scale)
            if masked:
                seen = t.seen_by(refs["rows"][...], step.outer, weights.shape)
                seen &= t.before_end(tile, weights.shape, launch.queries)
                q, do = (t.without_tail(x, tile, launch.queries) for x in (q, do))
                weights = jnp.where(seen, weights, 0.0)
            if "dv" in names:
                refs["dv_sum"][...] += t.dot_nn(weights, do)
            if "dk" in names:
                dscores = weights * _moved_weights(refs, 0)
                if masked:
                    dscores = jnp.where(seen, dscores, 0.0)
                refs["dk_sum"][...] += t.dot_nn(dscores, q)

        launch.for_each_kind(step, visit)

        @pl.when(step.last)
        def _():
            for name in names:
                total = refs[f"{name}_sum"][...] * (scale if name == "dk" else 1.0)
                refs[name][...] = total.astype(refs[name].dtype)

    results = launch.run(body, [1 + ("dv" in names) + 2 * ("dk" in names)])
    return results.get("dk"), results.get("dv")


def _weights(refs, segment, scale):
    """P of a tile, keys × queries; anything where a pair is invisible."""
    return t.weights(refs["k", segment][...], refs["q"][...], refs["lse"][...], scale)


def _moved_weights(refs, segment):
    """Ṗ − δ of a tile, keys × queries."""
    return t.dot_nt(refs["v", segment][...], refs["do"][...]) - refs["delta"][...]
