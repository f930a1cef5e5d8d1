"""The public function: checks its inputs while tracing, picks a backend, and calls it."""

from __future__ import annotations

import functools
import importlib

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.attention import autodiff, reference
from pallas_kernels.attention.backend import Segment
from pallas_kernels.attention.mask import Cached, Full, Mask, Visible, is_static, visible_in

IMPLEMENTATIONS = ("mosaic_gpu", "mosaic_tpu", "chunked", "reference")

_SMALL = 1 << 20  # scores per head up to which all of them at once are faster than tiles in XLA
_SMALL_TOTAL = 1 << 26  # and over all heads and batch entries: 256 MiB in float32


def attention(
    q: Float[Array, "batch query head dim"],
    k: Float[Array, "batch key kv_head dim"],
    v: Float[Array, "batch key kv_head dim"],
    *,
    context: tuple[Float[Array, "batch early kv_head dim"], Float[Array, "batch early kv_head dim"]] | None = None,
    mask: Mask = Full(),  # noqa: B008 - frozen
    scale: float | None = None,
    implementation: str | None = None,
    return_lse: bool = False,
    one_pass: bool = False,
):
    """softmax(scale · q kᵀ) v over the keys of one segment, or of two together.

    q: `[B, N, H, D]`. k, v: `[B, M, Hkv, D]`, H a multiple of Hkv (query head h uses key head h // (H / Hkv)).
    context: a second segment (k, v), `[B, C, Hkv, D]`; the softmax runs over both. Keeping it apart from k and v lets
      its zero tangents, or its absent gradients, cost nothing.
    mask: a description from `pallas_kernels.attention.mask`; which keys of each segment a query sees. Its
      values may differ by batch entry.
    scale: a Python number, 1/√D where None.
    implementation: one of `IMPLEMENTATIONS`, or None for the best that serves these inputs on the default device. Few
      queries under a `Cached` mask leave a Hopper GPU half idle: there their keys are shared out among copies of them.
    one_pass: a promise that the first derivative taken of this call is a `jax.jvp`, never its transpose; a backend may
      then compute value and tangent in one kernel. A gradient of a function that holds the `jvp` is fine; a gradient of
      this call itself becomes an error.

    Returns o `[B, N, H, D]` in q's dtype, and with `return_lse` also the log-sum-exp of the scores, `[B, H, N]` in
    float32 (float64 for float64 inputs). A query that sees no key has o = 0 and lse = −inf.

    Supports value, jvp, vjp, linearize, and any order of their composition, under jit, scan, checkpoint and shard_map
    (with `check_vma=False`); except for `reference`, derivatives do not vmap: fold what would be mapped into B.

    Raises:
      ValueError: while tracing, where shapes, dtypes, mask or implementation do not fit; names argument and fix.
    """
    _check_arrays(q, k, v, context)
    if not isinstance(mask, Mask):
        kinds = "Full, BlockCausal, TeacherForcing, Captioned, Cached or Intervals"
        raise ValueError(f"mask: {type(mask).__name__} is no mask: use {kinds}")
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    arrays = q, (k, v), None if context is None else tuple(context)
    visible = visible_in(arrays, mask)
    name = _choose(implementation, q, _segments(arrays, visible), scale)
    call = functools.partial(_attend, name, scale, one_pass)
    parts = _load("mosaic_gpu.decode").choose_parts(q.shape) if name == "mosaic_gpu" and isinstance(mask, Cached) else 1
    if parts > 1:
        out, lse = _load("mosaic_gpu.decode").attend_in_parts(call, arrays, mask, parts)
    else:
        out, lse = call(arrays, mask, visible)
    return (out, lse) if return_lse else out


def _attend(name, scale, one_pass, arrays, mask, visible):
    """o and lse by one backend. arrays: as in `autodiff.attend`."""
    if name == "reference":
        return reference.attend(arrays[0], _segments(arrays, visible), scale)
    static = is_static(mask)
    one_pass = one_pass and hasattr(_load(name), "forward_tangent")
    call = autodiff.Call(_load(name), scale, mask if static else None, one_pass)
    return autodiff.attend(call, arrays, Visible(None) if static else visible)


def _segments(arrays, visible):
    _, own, context = arrays
    pairs = (own,) if context is None else (own, context)
    return tuple(Segment(k, v, of_segment) for (k, v), of_segment in zip(pairs, visible))


def _choose(name, q, segments, scale) -> str:
    if name is not None:
        if name not in IMPLEMENTATIONS:
            raise ValueError(f"implementation: {name!r} is unknown: use one of {', '.join(IMPLEMENTATIONS)}, or None")
        if name != "reference" and (reason := _load(name).unsupported(q, segments, scale)):
            raise ValueError(f"implementation: {name} cannot serve this call: {reason}; or pass implementation=None")
        return name
    fast = {"gpu": "mosaic_gpu", "tpu": "mosaic_tpu"}.get(jax.default_backend())
    if fast and _load(fast).unsupported(q, segments, scale) is None:
        return fast
    scores = q.shape[1] * sum(s.k.shape[1] for s in segments)
    small = scores <= _SMALL and scores * q.shape[0] * q.shape[2] <= _SMALL_TOTAL
    return "reference" if small else "chunked"


def _load(name):
    """The backend's module, imported when first used: device code pulls in parts of Pallas that need not be there."""
    return importlib.import_module(f"pallas_kernels.attention.{name}")


def _check_arrays(q, k, v, context):
    named = {"q": q, "k": k, "v": v}
    if context is not None:
        if len(context) != 2:
            raise ValueError("context: pass a pair (k, v)")
        named |= {"context[0]": context[0], "context[1]": context[1]}
    for name, x in named.items():
        if x.ndim != 4:
            raise ValueError(f"{name}: has shape {x.shape}: use [batch, tokens, heads, head dim]")
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"{name}: has dtype {x.dtype}: use a floating-point type")
        if x.dtype != q.dtype:
            raise ValueError(f"{name}: has dtype {x.dtype} and q has {q.dtype}: cast one to the other")
        if x.shape[0] != q.shape[0]:
            raise ValueError(f"{name}: has batch {x.shape[0]} and q has {q.shape[0]}: repeat or split one")
        if x.shape[3] != q.shape[3]:
            raise ValueError(f"{name}: has head dim {x.shape[3]} and q has {q.shape[3]}: they must be equal")
        if x.shape[1] == 0:
            raise ValueError(f"{name}: has no tokens" + (": pass context=None" if name[0] == "c" else ""))
        if x.shape[2] != k.shape[2] and name != "q":
            raise ValueError(f"{name}: has {x.shape[2]} heads and k has {k.shape[2]}: they must be equal")
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"k: has {k.shape[2]} heads, which do not divide q's {q.shape[2]}: use a divisor")
    for name, a, b in (("v", k, v), *((("context[1]", *context),) if context is not None else ())):
        if a.shape[1] != b.shape[1]:
            raise ValueError(f"{name}: has {b.shape[1]} tokens and its keys have {a.shape[1]}: they must be equal")
