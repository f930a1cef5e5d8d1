"""Attention kernels for TPUs, written in Pallas for Mosaic: see `backend` for what each function returns.

bfloat16 and float32, head dims that are multiples of 16 up to 256, any lengths, grouped heads. Where there is no TPU,
`compile_for` traces for one, and `interpreted` runs the kernels in Pallas's interpreter.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.attention.mosaic_tpu import plan as plans
from pallas_kernels.attention.mosaic_tpu.blocks import KERNELS, blocks_for
from pallas_kernels.attention.mosaic_tpu.target import CHIPS, INTERPRETER, Chip, compile_for, interpreted, target

__all__ = ["CHIPS", "INTERPRETER", "Chip", "compile_for", "interpreted", "target"]


def unsupported(q, segments, scale):
    """Why these inputs cannot be served, or None."""
    if q.dtype not in (jnp.bfloat16, jnp.float32):
        return f"TPU matrix units do not multiply {q.dtype}: cast to bfloat16 or float32"
    dim = q.shape[-1]
    if dim % 16 or dim > 256:
        return f"head dim {dim} is no multiple of 16 up to 256: pad the heads"
    if scale <= 0:
        return f"scale {scale} is not positive: negate q instead"
    chip = target()
    if chip is None:
        names = ", ".join(c.name for c in CHIPS)
        return f"it needs a TPU ({names}), and the default device is {jax.devices()[0].device_kind}"
    for kernel in KERNELS:
        blocks = blocks_for(kernel, chip, q, segments)
        keys = [s.k.shape[1] for s in segments]
        lists = q.shape[0] if any(s.rows is not None and s.rows.ndim == 3 for s in segments) else 1
        if lists * plans.longest(q.shape[1], keys, blocks.q, blocks.k) > plans.MAX_STEPS:
            what, which = (f"{lists} batch entries of ", "the batch or ") if lists > 1 else ("", "")
            return (
                f"{what}{q.shape[1]} queries by {sum(keys)} keys are more than {plans.MAX_STEPS} tiles: "
                f"split {which}the queries"
            )
    return None


def forward(q, segments, scale):
    """See `backend`."""
    from pallas_kernels.attention.mosaic_tpu import forward_kernel

    return forward_kernel.forward(q, segments, scale, *_built("forward", q, segments))


def forward_tangent(q, segments, scale, dq, dsegments):
    """See `backend`."""
    from pallas_kernels.attention.mosaic_tpu import forward_kernel

    chip, blocks = _built("forward_tangent", q, segments)
    return forward_kernel.forward(q, segments, scale, chip, blocks, dq, dsegments)


def tangent(q, segments, scale, o, lse, dq, dsegments):
    """See `backend`."""
    from pallas_kernels.attention.mosaic_tpu import tangent_kernel

    return tangent_kernel.tangent(q, segments, scale, o, lse, dq, dsegments, *_built("tangent", q, segments))


def backward(q, segments, scale, o, lse, do, dlse, wanted):
    """See `backend`."""
    from pallas_kernels.attention.mosaic_tpu import backward_kernel as kernels

    delta = kernels.delta(o, do, dlse)
    want_q, want_segments = wanted
    dq = None
    if want_q:
        dq = kernels.backward_q(q, segments, scale, lse, delta, do, *_built("backward_q", q, segments))
    grads = []
    for segment, want in zip(segments, want_segments):
        built = _built("backward_kv", q, (segment,))
        grads.append(
            kernels.backward_kv(q, segment, scale, lse, delta, do, want, *built) if any(want) else (None, None)
        )
    return dq, tuple(grads)


def _built(kernel, q, segments):
    """The chip that a kernel is traced for, and its tile sizes there."""
    chip = target()
    return chip, blocks_for(kernel, chip, q, segments)
