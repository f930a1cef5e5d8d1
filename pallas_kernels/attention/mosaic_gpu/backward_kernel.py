"""Backward kernels for Hopper, after FlashAttention-2: one walks over keys for dq, one over queries for dk and dv.

Both rebuild p = exp(S − lse) and dS = p∘(do vᵀ − Δ), with Δ = rowsum(do∘o) − dlse. Every sum is made by one warpgroup
in a fixed order: the same inputs give the same bits. The price is that S and do vᵀ are computed twice.
"""

from __future__ import annotations

import functools

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.attention.mosaic_gpu import plan as plans
from pallas_kernels.attention.mosaic_gpu import tiles
from pallas_kernels.attention.mosaic_gpu.blocks import Blocks
from pallas_kernels.attention.mosaic_gpu.tiles import COMPUTE_WARPGROUPS, LOG2_E, WARPGROUP_ROWS, Ring

BLOCK = WARPGROUP_ROWS * COMPUTE_WARPGROUPS  # queries of a dq program, keys of a dk, dv program


def backward(q, segments, scale: float, o, lse, do, dlse, wanted, dq_blocks: Blocks, dkv_blocks: Blocks):
    """dq and ((dk, dv), …); a segment is skipped where neither of its gradients is wanted, and so is dq."""
    want_q, want_segments = wanted
    pad = ((0, 0), (0, 0), (0, -q.shape[1] % BLOCK))
    delta = jnp.einsum("bnhd,bnhd->bhn", do, o, preferred_element_type=jnp.float32) - dlse
    lse = jnp.where(jnp.isfinite(lse), lse, 0)  # of a row that sees nothing; its scores are all hidden
    vectors = jnp.pad(lse * LOG2_E, pad), jnp.pad(delta, pad)
    dq = _dq(q, segments, scale, do, vectors, dq_blocks) if want_q else None
    return dq, tuple(
        _dkv(q, s, scale, do, vectors, dkv_blocks) if any(want) else (None, None)
        for s, want in zip(segments, want_segments)
    )


def _dq(q, segments, scale, do, vectors, blocks: Blocks):
    batch, queries, heads, dim = q.shape
    rows = [plans.rows_of(s, queries, BLOCK) for s in segments]
    tables = [plans.plan_of(r, BLOCK, blocks.tile) for r in rows]
    tile = tiles.tile_scratch((COMPUTE_WARPGROUPS, WARPGROUP_ROWS, dim), q.dtype)
    ring = tiles.ring_scratch(blocks.stages, (blocks.tile, dim), q.dtype)
    return plgpu.kernel(
        functools.partial(_dq_kernel, scale=scale, blocks=blocks, groups=heads // segments[0].k.shape[2]),
        out_type=q,
        scratch_types=dict(
            q_smem=tile,
            do_smem=tile,
            k_ring=ring,
            v_ring=ring,
            arrived=plgpu.Barrier(num_arrivals=2, num_barriers=COMPUTE_WARPGROUPS),
        ),
        **tiles.grid_of(heads, pl.cdiv(queries, BLOCK), batch, blocks.heads_first),
        num_threads=COMPUTE_WARPGROUPS + 1,
        thread_name="wg",
        kernel_name="attention_dq",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(q, do, *vectors, [(s.k, s.v) for s in segments], rows, tables)


def _dq_kernel(
    q_ref,
    do_ref,
    lse_ref,
    delta_ref,
    keys,
    rows,
    tables,
    dq_ref,
    *,
    scale,
    blocks,
    groups,
    q_smem,
    do_smem,
    k_ring,
    v_ring,
    arrived,
):
    batch, head = lax.axis_index("batch"), lax.axis_index("head")
    block = lax.axis_size("block") - 1 - lax.axis_index("block")  # late queries see most: start the long programs first
    steps = [plans.Steps(table, batch, block) for table in tables]
    k_ring, v_ring = Ring(blocks.stages, *k_ring), Ring(blocks.stages, *v_ring)
    wg = lax.axis_index("wg")

    @pl.when(wg == COMPUTE_WARPGROUPS)
    def _feed():
        plgpu.set_max_registers(24, action="decrease")
        done = 0
        for (k_ref, v_ref), own_steps in zip(keys, steps):

            @pl.loop(0, own_steps.count)
            def _step(step, k_ref=k_ref, v_ref=v_ref, own_steps=own_steps, done=done):
                tile = pl.ds(own_steps.tile(step) * blocks.tile, blocks.tile)
                for ref, ring in ((k_ref, k_ring), (v_ref, v_ring)):
                    ring.fill(ref.at[batch, tile, lax.div(head, jnp.int32(groups))], done + step)

            done += own_steps.count

    @pl.when(wg < COMPUTE_WARPGROUPS)
    def _compute():
        plgpu.set_max_registers(240, action="increase")
        base = block * BLOCK + wg * WARPGROUP_ROWS
        own_rows = pl.ds(base, WARPGROUP_ROWS)
        q_tile, do_tile = q_smem.at[wg], do_smem.at[wg]
        plgpu.copy_gmem_to_smem(q_ref.at[batch, own_rows, head], q_tile, arrived.at[wg])
        plgpu.copy_gmem_to_smem(do_ref.at[batch, own_rows, head], do_tile, arrived.at[wg])
        lse = tiles.load(lse_ref.at[batch, head, own_rows], tiles.ROW, anywhere=True)
        delta = tiles.load(delta_ref.at[batch, head, own_rows], tiles.ROW, anywhere=True)
        plgpu.barrier_wait(arrived.at[wg])

        def body(step, carry, segment, done):
            dq, lse, delta = carry
            item = done + step
            tile = steps[segment].tile(step)
            shape = WARPGROUP_ROWS, blocks.tile

            def products(s_ref, dp_ref):
                k_ring.wait(item)
                plgpu.wgmma(s_ref, q_tile, k_ring[item].transpose((1, 0)))
                v_ring.wait(item)
                plgpu.wgmma(dp_ref, do_tile, v_ring[item].transpose((1, 0)))
                return plgpu.wgmma_accumulator_load(s_ref, wait_n=1), dp_ref[...]

            s, dp = pl.run_scoped(products, plgpu.ACC(shape, jnp.float32), plgpu.ACC(shape, jnp.float32))
            v_ring.release(item)
            s = lax.cond(
                steps[segment].needs_mask(tile),
                lambda s: jnp.where(tiles.seen_by(rows[segment], batch, base, shape, tile * blocks.tile), s, -jnp.inf),
                lambda s: s,
                s,
            )
            p = jnp.exp2(s * (scale * LOG2_E) - tiles.by_row(lse, shape))
            ds = (p * (dp - tiles.by_row(delta, shape))).astype(q_tile.dtype)

            def add(dq_ref):
                plgpu.wgmma(dq_ref, ds, k_ring[item])

            dq = pl.run_state(add)(plgpu.ACC.init(dq))
            k_ring.release(item)
            return dq, lse, delta

        carry = tiles.zeros(q_tile.shape), lse, delta
        done = 0
        for segment, own_steps in enumerate(steps):
            carry = lax.fori_loop(0, own_steps.count, functools.partial(body, segment=segment, done=done), carry)
            done += own_steps.count
        q_tile[...] = (carry[0] * scale).astype(q_tile.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q_tile, dq_ref.at[batch, own_rows, head])
        plgpu.wait_smem_to_gmem(0)


def _dkv(q, segment, scale, do, vectors, blocks: Blocks):
    batch, queries, heads, dim = q.shape
    keys, kv_heads = segment.k.shape[1:3]
    rows = plans.rows_of(segment, queries, BLOCK)
    table = plans.transposed_plan_of(rows, blocks.tile, BLOCK, keys)
    tile = tiles.tile_scratch((COMPUTE_WARPGROUPS, WARPGROUP_ROWS, dim), q.dtype)
    ring = tiles.ring_scratch(blocks.stages, (blocks.tile, dim), q.dtype)
    vector_ring = tiles.ring_scratch(blocks.stages, (blocks.tile,), jnp.float32, tiled=False)
    return plgpu.kernel(
        functools.partial(_dkv_kernel, scale=scale, blocks=blocks, groups=heads // kv_heads),
        out_type=(segment.k, segment.v),
        scratch_types=dict(
            k_smem=tile,
            v_smem=tile,
            rings=(ring, ring, vector_ring, vector_ring),
            arrived=plgpu.Barrier(num_arrivals=2, num_barriers=COMPUTE_WARPGROUPS),
        ),
        **tiles.grid_of(kv_heads, pl.cdiv(keys, BLOCK), batch, blocks.heads_first),
        num_threads=COMPUTE_WARPGROUPS + 1,
        thread_name="wg",
        kernel_name="attention_dkv",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(q, do, *vectors, segment.k, segment.v, rows, table)


def _dkv_kernel(
    q_ref,
    do_ref,
    lse_ref,
    delta_ref,
    k_ref,
    v_ref,
    rows,
    table,
    dk_ref,
    dv_ref,
    *,
    scale,
    blocks,
    groups,
    k_smem,
    v_smem,
    rings,
    arrived,
):
    batch, kv_head, block = lax.axis_index("batch"), lax.axis_index("head"), lax.axis_index("block")
    steps = plans.Steps(table, batch, block)
    rings = [Ring(blocks.stages, *scratch) for scratch in rings]
    q_ring, do_ring, lse_ring, delta_ring = rings
    wg = lax.axis_index("wg")

    @pl.when(wg == COMPUTE_WARPGROUPS)
    def _feed():
        plgpu.set_max_registers(24, action="decrease")

        @pl.loop(0, groups)
        def _head(group):
            @pl.loop(0, steps.count)
            def _step(step):
                head, item = kv_head * groups + group, group * steps.count + step
                tile = pl.ds(steps.tile(step) * blocks.tile, blocks.tile)
                for ref, ring in ((q_ref, q_ring), (do_ref, do_ring)):
                    ring.fill(ref.at[batch, tile, head], item)
                for ref, ring in ((lse_ref, lse_ring), (delta_ref, delta_ring)):
                    ring.fill(ref.at[batch, head, tile], item)

    @pl.when(wg < COMPUTE_WARPGROUPS)
    def _compute():
        plgpu.set_max_registers(240, action="increase")
        base = block * BLOCK + wg * WARPGROUP_ROWS
        own_keys = pl.ds(base, WARPGROUP_ROWS)
        k_tile, v_tile = k_smem.at[wg], v_smem.at[wg]
        plgpu.copy_gmem_to_smem(k_ref.at[batch, own_keys, kv_head], k_tile, arrived.at[wg])
        plgpu.copy_gmem_to_smem(v_ref.at[batch, own_keys, kv_head], v_tile, arrived.at[wg])
        plgpu.barrier_wait(arrived.at[wg])
        shape = WARPGROUP_ROWS, blocks.tile

        def body(step, carry, group):
            dk, dv = carry
            item = group * steps.count + step
            tile = steps.tile(step)

            def products(s_ref, dp_ref):
                q_ring.wait(item)
                plgpu.wgmma(s_ref, k_tile, q_ring[item].transpose((1, 0)))
                do_ring.wait(item)
                plgpu.wgmma(dp_ref, v_tile, do_ring[item].transpose((1, 0)))
                return plgpu.wgmma_accumulator_load(s_ref, wait_n=1), dp_ref[...]

            s, dp = pl.run_scoped(products, plgpu.ACC(shape, jnp.float32), plgpu.ACC(shape, jnp.float32))
            s = lax.cond(
                steps.needs_mask(tile),
                lambda s: jnp.where(tiles.seen_from(rows, batch, base, shape, tile * blocks.tile), s, -jnp.inf),
                lambda s: s,
                s,
            )
            lse_ring.wait(item)
            delta_ring.wait(item)
            lse = tiles.load(lse_ring[item], tiles.COLUMN)
            delta = tiles.load(delta_ring[item], tiles.COLUMN)
            lse_ring.release(item)
            delta_ring.release(item)
            p = jnp.exp2(s * (scale * LOG2_E) - tiles.by_column(lse, shape))
            ds = (p * (dp - tiles.by_column(delta, shape))).astype(k_tile.dtype)
            p = p.astype(k_tile.dtype)

            def add(refs):
                dk_ref, dv_ref = refs
                plgpu.wgmma(dv_ref, p, do_ring[item])
                plgpu.wgmma(dk_ref, ds, q_ring[item])

            dk, dv = pl.run_state(add)((plgpu.ACC.init(dk), plgpu.ACC.init(dv)))
            q_ring.release(item)
            do_ring.release(item)
            return dk, dv

        def head(group, carry):
            return lax.fori_loop(0, steps.count, functools.partial(body, group=group), carry)

        dk, dv = lax.fori_loop(0, groups, head, (tiles.zeros(k_tile.shape), tiles.zeros(v_tile.shape)))
        k_tile[...] = (dk * scale).astype(k_tile.dtype)
        v_tile[...] = dv.astype(v_tile.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(k_tile, dk_ref.at[batch, own_keys, kv_head])
        plgpu.copy_smem_to_gmem(v_tile, dv_ref.at[batch, own_keys, kv_head])
        plgpu.wait_smem_to_gmem(0)
