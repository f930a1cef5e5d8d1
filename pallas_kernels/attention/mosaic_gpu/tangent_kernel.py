"""Tangent kernel for Hopper: ȯ from q̇, k̇, v̇, alone from a saved lse, or together with the forward pass.

The same walk as the forward kernel's, with a second accumulator. S = s·q kᵀ and Ṡ = s·(q̇ kᵀ + q k̇ᵀ) give
p = exp(S − lse) and h = p∘Ṡ, and these ȯ = h v + p v̇ − rowsum(h)·o. Tangents that are known to be zero are left out of
loads and products, for each segment by itself: over a context without tangent both together take four products, where
the forward pass alone takes two.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.attention.mosaic_gpu import plan as plans
from pallas_kernels.attention.mosaic_gpu import tiles
from pallas_kernels.attention.mosaic_gpu.blocks import Blocks
from pallas_kernels.attention.mosaic_gpu.forward_kernel import BLOCK_Q, FLOOR
from pallas_kernels.attention.mosaic_gpu.tiles import COMPUTE_WARPGROUPS, LOG2_E, WARPGROUP_ROWS, Ring


def forward_tangent(q, segments, scale: float, dq, dsegments, blocks: Blocks):
    """o, lse, ȯ and the lse's tangent, in one pass."""
    return _call(q, segments, scale, dq, dsegments, None, blocks)


def tangent(q, segments, scale: float, o, lse, dq, dsegments, blocks: Blocks):
    """ȯ and the lse's tangent, from the saved o and lse."""
    return _call(q, segments, scale, dq, dsegments, (o, lse), blocks)


def _call(q, segments, scale, dq, dsegments, saved, blocks):
    batch, queries, heads, dim = q.shape
    rows = [plans.rows_of(s, queries, BLOCK_Q) for s in segments]
    tables = [plans.plan_of(r, BLOCK_Q, blocks.tile) for r in rows]
    q_blocks = pl.cdiv(queries, BLOCK_Q)
    if saved is not None:
        o, lse = saved
        lse = jnp.where(jnp.isfinite(lse), lse, 0)  # of a row that sees nothing; its scores are all hidden
        saved = o, jnp.pad(lse, ((0, 0), (0, 0), (0, -queries % BLOCK_Q)))
    row = jax.ShapeDtypeStruct((batch, heads, q_blocks * BLOCK_Q), jnp.float32)
    tile = (COMPUTE_WARPGROUPS, WARPGROUP_ROWS, dim)
    ring = tiles.ring_scratch(blocks.stages, (blocks.tile, dim), q.dtype)
    result = plgpu.kernel(
        functools.partial(_kernel, scale=scale, blocks=blocks, groups=heads // segments[0].k.shape[2]),
        out_type=(q, row, q, row) if saved is None else (q, row),
        scratch_types=dict(
            q_smem=tiles.tile_scratch(tile, q.dtype),
            dq_smem=tiles.tile_scratch(tile, q.dtype),
            row_smem=plgpu.SMEM((COMPUTE_WARPGROUPS, 2, WARPGROUP_ROWS), jnp.float32),
            rings=dict(
                k=ring,
                v=ring,
                **({"dk": ring} if any(dk is not None for dk, _ in dsegments) else {}),
                **({"dv": ring} if any(dv is not None for _, dv in dsegments) else {}),
            ),
            q_arrived=plgpu.Barrier(num_arrivals=1 if dq is None else 2, num_barriers=COMPUTE_WARPGROUPS),
            o_arrived=plgpu.Barrier(num_barriers=COMPUTE_WARPGROUPS),
            turn=plgpu.Barrier(num_arrivals=COMPUTE_WARPGROUPS),
        ),
        **tiles.grid_of(heads, q_blocks, batch, blocks.heads_first),
        num_threads=COMPUTE_WARPGROUPS + 1,
        thread_name="wg",
        kernel_name="attention_tangent" if saved else "attention_forward_tangent",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(
        q,
        dq,
        [{"k": s.k, "v": s.v, "dk": dk, "dv": dv} for s, (dk, dv) in zip(segments, dsegments)],
        rows,
        tables,
        saved,
    )
    return tuple(x[..., :queries] if x.ndim == 3 else x for x in result)


def _kernel(
    q_ref,
    dq_ref,
    sources,
    rows,
    tables,
    saved,
    *outputs,
    scale,
    blocks,
    groups,
    q_smem,
    dq_smem,
    row_smem,
    rings,
    q_arrived,
    o_arrived,
    turn,
):
    batch, head = lax.axis_index("batch"), lax.axis_index("head")
    block = lax.axis_size("block") - 1 - lax.axis_index("block")  # late queries see most: start the long programs first
    steps = [plans.Steps(table, batch, block) for table in tables]
    total = sum(s.count for s in steps)
    rings = {name: Ring(blocks.stages, *scratch) for name, scratch in rings.items()}
    sources = [{name: ref for name, ref in refs.items() if ref is not None} for refs in sources]
    # Items that have passed through each ring before a segment starts.
    done, passed = dict.fromkeys(rings, 0), []
    for refs, own_steps in zip(sources, steps):
        passed.append(dict(done))
        for name in refs:
            done[name] += own_steps.count
    wg = lax.axis_index("wg")

    @pl.when(wg == COMPUTE_WARPGROUPS)
    def _feed():
        plgpu.set_max_registers(24, action="decrease")
        for refs, own_steps, before in zip(sources, steps, passed):

            @pl.loop(0, own_steps.count)
            def _step(step, refs=refs, own_steps=own_steps, before=before):
                tile = pl.ds(own_steps.tile(step) * blocks.tile, blocks.tile)
                for name, ref in sorted(refs.items()):
                    rings[name].fill(ref.at[batch, tile, lax.div(head, jnp.int32(groups))], before[name] + step)

    @pl.when(wg < COMPUTE_WARPGROUPS)
    def _compute():
        plgpu.set_max_registers(240, action="increase")
        base = block * BLOCK_Q + wg * WARPGROUP_ROWS
        own_rows = pl.ds(base, WARPGROUP_ROWS)
        q_tile, dq_tile = q_smem.at[wg], dq_smem.at[wg]
        plgpu.copy_gmem_to_smem(q_ref.at[batch, own_rows, head], q_tile, q_arrived.at[wg])
        if dq_ref is not None:
            plgpu.copy_gmem_to_smem(dq_ref.at[batch, own_rows, head], dq_tile, q_arrived.at[wg])
        plgpu.barrier_wait(q_arrived.at[wg])
        if saved is not None:
            lse_ref = saved[1].at[batch, head, own_rows]
            saved_top = tiles.load(lse_ref, tiles.ROW, anywhere=True) * LOG2_E

        def swap():
            plgpu.barrier_arrive(turn)
            plgpu.barrier_wait(turn)

        @pl.when(total > 0)
        def _first_keys():
            rings["k"].wait(0)

        pl.when(wg == 1)(swap)

        def body(step, carry, segment):
            out, moved, top, norm, mean = carry
            names = sources[segment]
            item = {name: passed[segment][name] + step for name in names}
            tile = steps[segment].tile(step)
            moving = dq_ref is not None or "dk" in names

            def scores(s_ref, ds_ref):
                keys = rings["k"][item["k"]].transpose((1, 0))
                plgpu.wgmma(s_ref, q_tile, keys)
                if dq_ref is not None:
                    plgpu.wgmma(ds_ref, dq_tile, keys)
                if "dk" in names:
                    rings["dk"].wait(item["dk"])
                    plgpu.wgmma(ds_ref, q_tile, rings["dk"][item["dk"]].transpose((1, 0)))
                swap()
                return s_ref[...], ds_ref[...]

            shape = WARPGROUP_ROWS, blocks.tile
            s, ds = pl.run_scoped(scores, plgpu.ACC(shape, jnp.float32), plgpu.ACC(shape, jnp.float32))
            rings["k"].release(item["k"])
            if "dk" in names:
                rings["dk"].release(item["dk"])
            s = lax.cond(
                steps[segment].needs_mask(tile),
                lambda s: jnp.where(
                    tiles.seen_by(rows[segment], batch, base, s.shape, tile * blocks.tile), s, -jnp.inf
                ),
                lambda s: s,
                s,
            )
            if saved is None:
                new = jnp.maximum(top, s.max(axis=1) * (scale * LOG2_E))
                fade = jnp.exp2(top - new)
                p = jnp.exp2(s * (scale * LOG2_E) - tiles.by_row(new, shape))
                norm = norm * fade + p.sum(axis=1)
                mean = mean * fade
                out *= tiles.by_row(fade, out.shape)
                moved *= tiles.by_row(fade, moved.shape)
            else:
                new = top
                p = jnp.exp2(s * (scale * LOG2_E) - tiles.by_row(top, shape))
            p16 = p.astype(q_tile.dtype)
            h16 = None
            if moving:
                h = p * ds * scale
                mean += h.sum(axis=1)
                h16 = h.astype(q_tile.dtype)
            out, moved, new, norm, mean, p16, h16 = lax.optimization_barrier((out, moved, new, norm, mean, p16, h16))
            plgpu.barrier_arrive(turn)
            rings["v"].wait(item["v"])
            if "dv" in names:
                rings["dv"].wait(item["dv"])
            plgpu.barrier_wait(turn)

            def values(refs):
                out_ref, moved_ref = refs
                if out_ref is not None:
                    plgpu.wgmma(out_ref, p16, rings["v"][item["v"]])
                if moving:
                    plgpu.wgmma(moved_ref, h16, rings["v"][item["v"]])
                if "dv" in names:
                    plgpu.wgmma(moved_ref, p16, rings["dv"][item["dv"]])

                @pl.when(item["k"] + 1 < total)
                def _next_keys():
                    rings["k"].wait(item["k"] + 1)

            initial = None if out is None else plgpu.ACC.init(out), plgpu.ACC.init(moved)
            out, moved = pl.run_state(values)(initial)
            rings["v"].release(item["v"])
            if "dv" in names:
                rings["dv"].release(item["dv"])
            return out, moved, new, norm, mean

        nothing = tiles.zeros(q_tile.shape)
        carry: Any
        if saved is None:
            carry = nothing, nothing, tiles.row_vector(FLOOR), tiles.row_vector(0.0), tiles.row_vector(0.0)
        else:
            carry = None, nothing, saved_top, None, tiles.row_vector(0.0)
        for segment, own_steps in enumerate(steps):
            carry = lax.fori_loop(0, own_steps.count, functools.partial(body, segment=segment), carry)
        pl.when(wg == 0)(swap)
        out, moved, top, norm, mean = carry
        if saved is None:
            safe = jnp.where(norm == 0, 1.0, norm)
            out *= tiles.by_row(1 / safe, out.shape)
            moved *= tiles.by_row(1 / safe, out.shape)
            mean /= safe
            row_smem.at[wg, 0][...] = jnp.where(norm == 0, -jnp.inf, top / LOG2_E + jnp.log(safe))
        else:
            plgpu.copy_gmem_to_smem(saved[0].at[batch, own_rows, head], q_tile, o_arrived.at[wg])
            plgpu.barrier_wait(o_arrived.at[wg])
            out = tiles.load(q_tile, plgpu.Layout.WGMMA).astype(jnp.float32)
        dq_tile[...] = (moved - tiles.by_row(mean, moved.shape) * out).astype(q_tile.dtype)
        row_smem.at[wg, 1][...] = mean
        if saved is None:
            q_tile[...] = out.astype(q_tile.dtype)
        plgpu.commit_smem()
        *primal, do_ref, dlse_ref = outputs
        if saved is None:
            o_ref, lse_ref = primal
            plgpu.copy_smem_to_gmem(q_tile, o_ref.at[batch, own_rows, head])
            plgpu.copy_smem_to_gmem(row_smem.at[wg, 0], lse_ref.at[batch, head, own_rows])
        plgpu.copy_smem_to_gmem(dq_tile, do_ref.at[batch, own_rows, head])
        plgpu.copy_smem_to_gmem(row_smem.at[wg, 1], dlse_ref.at[batch, head, own_rows])
        plgpu.wait_smem_to_gmem(0)
