"""Forward kernel for Hopper: two warpgroups of 64 queries each take turns on the tensor core, a third one feeds them.

A program owns 128 queries of one head. It walks through the key tiles that its rows may see, of one segment after the
other; keys and values arrive through rings of shared-memory buffers. Only tiles that some row sees in part are masked.
While one warpgroup exponentiates, the other multiplies: they hand the tensor core over at a barrier.
"""

from __future__ import annotations

import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.attention.mosaic_gpu import plan as plans
from pallas_kernels.attention.mosaic_gpu import tiles
from pallas_kernels.attention.mosaic_gpu.blocks import Blocks
from pallas_kernels.attention.mosaic_gpu.tiles import COMPUTE_WARPGROUPS, LOG2_E, WARPGROUP_ROWS, Ring

BLOCK_Q = WARPGROUP_ROWS * COMPUTE_WARPGROUPS
FLOOR = -1e30  # below every score, and finite: a row whose keys are all hidden so far subtracts it without NaN


def forward(q, segments, scale: float, blocks: Blocks):
    """o `[B, N, H, D]` and lse `[B, H, N]`."""
    batch, queries, heads, dim = q.shape
    rows = [plans.rows_of(s, queries, BLOCK_Q) for s in segments]
    tables = [plans.plan_of(r, BLOCK_Q, blocks.tile) for r in rows]
    q_blocks = pl.cdiv(queries, BLOCK_Q)
    o, lse = plgpu.kernel(
        functools.partial(_kernel, scale=scale, blocks=blocks, groups=heads // segments[0].k.shape[2]),
        out_type=(
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((batch, heads, q_blocks * BLOCK_Q), jnp.float32),
        ),
        scratch_types=dict(
            q_smem=tiles.tile_scratch((COMPUTE_WARPGROUPS, WARPGROUP_ROWS, dim), q.dtype),
            lse_smem=plgpu.SMEM((COMPUTE_WARPGROUPS, WARPGROUP_ROWS), jnp.float32),
            k_ring=tiles.ring_scratch(blocks.stages, (blocks.tile, dim), q.dtype),
            v_ring=tiles.ring_scratch(blocks.stages, (blocks.tile, dim), q.dtype),
            q_arrived=plgpu.Barrier(num_barriers=COMPUTE_WARPGROUPS),
            turn=plgpu.Barrier(num_arrivals=COMPUTE_WARPGROUPS),
        ),
        **tiles.grid_of(heads, q_blocks, batch, blocks.heads_first),
        num_threads=COMPUTE_WARPGROUPS + 1,
        thread_name="wg",
        kernel_name="attention_forward",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(q, [(s.k, s.v) for s in segments], rows, tables)
    return o, lse[..., :queries]


def _kernel(
    q_ref,
    keys,
    rows,
    tables,
    o_ref,
    lse_ref,
    *,
    scale,
    blocks,
    groups,
    q_smem,
    lse_smem,
    k_ring,
    v_ring,
    q_arrived,
    turn,
):
    batch, head = lax.axis_index("batch"), lax.axis_index("head")
    block = lax.axis_size("block") - 1 - lax.axis_index("block")  # late queries see most: start the long programs first
    steps = [plans.Steps(table, batch, block) for table in tables]
    total = sum(s.count for s in steps)
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
        base = block * BLOCK_Q + wg * WARPGROUP_ROWS
        own_rows = pl.ds(base, WARPGROUP_ROWS)
        q_tile, lse_tile = q_smem.at[wg], lse_smem.at[wg]
        plgpu.copy_gmem_to_smem(q_ref.at[batch, own_rows, head], q_tile, q_arrived.at[wg])
        plgpu.barrier_wait(q_arrived.at[wg])

        def swap():
            plgpu.barrier_arrive(turn)
            plgpu.barrier_wait(turn)

        @pl.when(total > 0)
        def _first_keys():
            k_ring.wait(0)

        pl.when(wg == 1)(swap)

        def body(step, carry, segment, done):
            acc, top, norm = carry
            item = done + step
            tile = steps[segment].tile(step)

            def scores(acc_ref):
                plgpu.wgmma(acc_ref, q_tile, k_ring[item].transpose((1, 0)))
                swap()
                return acc_ref[...]

            s = pl.run_scoped(scores, plgpu.ACC((WARPGROUP_ROWS, blocks.tile), jnp.float32))
            k_ring.release(item)
            s = lax.cond(
                steps[segment].needs_mask(tile),
                lambda s: jnp.where(
                    tiles.seen_by(rows[segment], batch, base, s.shape, tile * blocks.tile), s, -jnp.inf
                ),
                lambda s: s,
                s,
            )
            new = jnp.maximum(top, s.max(axis=1) * (scale * LOG2_E))
            fade = jnp.exp2(top - new)
            p = jnp.exp2(s * (scale * LOG2_E) - tiles.by_row(new, s.shape))
            acc *= tiles.by_row(fade, acc.shape)
            norm = norm * fade + p.sum(axis=1)
            p16 = p.astype(q_tile.dtype)
            acc, norm, new, p16 = lax.optimization_barrier((acc, norm, new, p16))
            plgpu.barrier_arrive(turn)
            v_ring.wait(item)
            plgpu.barrier_wait(turn)

            def values(acc_ref):
                plgpu.wgmma(acc_ref, p16, v_ring[item])

                @pl.when(item + 1 < total)
                def _next_keys():
                    k_ring.wait(item + 1)

            acc = pl.run_state(values)(plgpu.ACC.init(acc))
            v_ring.release(item)
            return acc, new, norm

        carry = tiles.zeros(q_tile.shape), tiles.row_vector(FLOOR), tiles.row_vector(0.0)
        done = 0
        for segment, own_steps in enumerate(steps):
            carry = lax.fori_loop(0, own_steps.count, functools.partial(body, segment=segment, done=done), carry)
            done += own_steps.count
        pl.when(wg == 0)(swap)
        acc, top, norm = carry
        safe = jnp.where(norm == 0, 1.0, norm)
        q_tile[...] = (acc * tiles.by_row(1 / safe, acc.shape)).astype(q_tile.dtype)
        lse_tile[...] = jnp.where(norm == 0, -jnp.inf, top / LOG2_E + jnp.log(safe))
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q_tile, o_ref.at[batch, own_rows, head])
        plgpu.copy_smem_to_gmem(lse_tile, lse_ref.at[batch, head, own_rows])
        plgpu.wait_smem_to_gmem(0)
