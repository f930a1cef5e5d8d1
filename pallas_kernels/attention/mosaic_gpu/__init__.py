"""Attention kernels for Hopper GPUs, written in Pallas for Mosaic GPU: see `backend` for what each function returns.

bfloat16 and float16, head dims 64 and 128, any lengths, grouped heads.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.attention.backend import Segment
from pallas_kernels.attention.mosaic_gpu import backward_kernel, forward_kernel, plan, tangent_kernel
from pallas_kernels.attention.mosaic_gpu.blocks import blocks_for
from pallas_kernels.attention.rows import everything

DIMS = (64, 128)
_MINIMUM = 256  # a copy may ask for as many tokens as the longest tile has
_MULTIPLE = 8  # and moves eight rows at a time; only the last tile's tail may lie beyond the end


def unsupported(q, segments, scale):
    """Why these inputs cannot be served, or None."""
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"q has dtype {q.dtype}: cast to bfloat16 or float16"
    if q.shape[-1] not in DIMS:
        return f"head dim {q.shape[-1]} is none of {DIMS}: pad the heads"
    if scale <= 0:
        return f"scale {scale} is not positive: negate q instead"
    return _no_hopper()


@functools.cache
def _no_hopper():
    device = jax.devices()[0]
    if device.platform != "gpu" or not str(getattr(device, "compute_capability", "")).startswith("9."):
        return f"it needs a Hopper GPU, and the default device is {device.device_kind}"
    return None


def forward(q, segments, scale):
    (q,), segments, n = _padded((q,), segments)
    return _cut(n, forward_kernel.forward(q, segments, scale, blocks_for("forward", q.shape[3])))


def tangent(q, segments, scale, o, lse, dq, dsegments):
    (q, dq, o), segments, n = _padded((q, dq, o), segments)
    lse, dsegments, blocks = _padded_row(lse), _padded_tangents(dsegments), blocks_for("tangent", q.shape[3])
    return _cut(n, tangent_kernel.tangent(q, segments, scale, o, lse, dq, dsegments, blocks))


def forward_tangent(q, segments, scale, dq, dsegments):
    (q, dq), segments, n = _padded((q, dq), segments)
    dsegments, blocks = _padded_tangents(dsegments), blocks_for("forward_tangent", q.shape[3])
    return _cut(n, tangent_kernel.forward_tangent(q, segments, scale, dq, dsegments, blocks))


def backward(q, segments, scale, o, lse, do, dlse, wanted):
    lengths = [s.k.shape[1] for s in segments]
    (q, o, do), segments, n = _padded((q, o, do), segments)
    lse, dlse, blocks = (
        _padded_row(lse),
        _padded_row(dlse),
        [blocks_for(kernel, q.shape[3]) for kernel in ("dq", "dkv")],
    )
    dq, grads = backward_kernel.backward(q, segments, scale, o, lse, do, dlse, wanted, *blocks)
    grads = tuple(tuple(None if x is None else x[:, :m] for x in pair) for pair, m in zip(grads, lengths))
    return None if dq is None else dq[:, :n], grads


def _padded(queries, segments):
    """Everything in whole copies; added keys lie outside every interval, added queries see what the last one sees."""
    n = queries[0].shape[1]
    return tuple(_padded_tokens(x) for x in queries), tuple(_padded_segment(s, n) for s in segments), n


def _padded_segment(segment, queries):
    keys, rows = segment.k.shape[1], segment.rows
    if rows is None and _missing(keys):
        rows = everything(queries, keys)
    if rows is not None and _missing(queries):
        rows = plan.padded(rows, _missing(queries))
    return Segment(_padded_tokens(segment.k), _padded_tokens(segment.v), rows)


def _missing(tokens):
    return max(_MINIMUM, -(-tokens // _MULTIPLE) * _MULTIPLE) - tokens


def _padded_tokens(x):
    return (
        x if x is None or not _missing(x.shape[1]) else jnp.pad(x, ((0, 0), (0, _missing(x.shape[1])), (0, 0), (0, 0)))
    )


def _padded_row(x):
    return jnp.pad(x, ((0, 0), (0, 0), (0, _missing(x.shape[2])))) if _missing(x.shape[2]) else x


def _padded_tangents(dsegments):
    return tuple(tuple(_padded_tokens(x) for x in pair) for pair in dsegments)


def _cut(n, results):
    """Results without the added queries."""
    return tuple((x[:, :n] if x.ndim == 4 else x[..., :n]) for x in results)
