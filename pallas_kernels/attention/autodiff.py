"""One derivative rule for every tiled backend.

Forward mode is the tangent kernel; reverse mode is its transpose, the backward kernel, tied together by `linear_call`.
Which inputs have tangents is known while tracing (`symbolic_zeros`): only those become linear arguments, and a kernel
is told which terms to leave out.

Residuals of the tangent (queries, keys, values, output, lse) are themselves differentiable. Their derivative, a second
derivative of attention, is taken through the plain implementation a block of rows at a time: right, and slow. Where it
is not used, as for a consistency target under `stop_gradient`, it is dead code. Only a gradient of a gradient is
refused, by `linear_call` itself.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero, linear_call

from pallas_kernels.attention import reference
from pallas_kernels.attention.backend import Segment
from pallas_kernels.attention.mask import Mask, visible_in

OUTPUT_NAME = "attention_output"  # for jax.checkpoint policies: save_only_these_names(OUTPUT_NAME, LSE_NAME)
LSE_NAME = "attention_lse"


@dataclasses.dataclass(frozen=True)
class Call:
    """Backend module, scale, the mask where it is made of integers, and whether o and ȯ come from one kernel."""

    backend: Any
    scale: float
    mask: Mask | None
    one_pass: bool = False

    def segments(self, arrays, rows) -> tuple[Segment, ...]:
        _, own, context = arrays
        if self.mask is not None:
            rows = visible_in(arrays, self.mask)
        pairs = (own,) if context is None else (own, context)
        return tuple(Segment(k, v, of_segment) for (k, v), of_segment in zip(pairs, rows))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def attend(call: Call, arrays, rows):
    """o and lse. arrays: (q, (k, v), (k, v) of the context or None); rows: as `Visible`, unused with a static mask."""
    return call.backend.forward(arrays[0], call.segments(arrays, rows), call.scale)


@functools.partial(attend.defjvp, symbolic_zeros=True)
def _attend_jvp(call, primals, tangents):
    arrays, rows = primals
    present, moving = _split_tangents(tangents[0])
    if call.one_pass and moving:
        out, lse, *moved = _attend_and_tangent(call, present, arrays, rows, moving)
        return (out, lse), tuple(moved)
    out, lse = _named(attend(call, arrays, rows))
    if not moving:
        return (out, lse), (jnp.zeros_like(out), jnp.zeros_like(lse))
    return (out, lse), _tangent(call, present, (arrays, rows, out, lse), moving)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _tangent(call: Call, present: tuple[bool, ...], residuals, moving):
    """Tangents of o and lse, linear in `moving`, the tangents of those leaves of `arrays` that `present` marks."""
    treedef = jax.tree.structure(residuals[0])

    def forward(residuals, moving):
        arrays, rows, out, lse = residuals
        dq, dsegments = _fill(treedef, present, moving)
        return call.backend.tangent(arrays[0], call.segments(arrays, rows), call.scale, out, lse, dq, dsegments)

    def transpose(residuals, cotangents):
        arrays, rows, out, lse = residuals
        wanted = _by_segment(jax.tree.unflatten(treedef, present))
        segments = call.segments(arrays, rows)
        grads = call.backend.backward(arrays[0], segments, call.scale, out, lse, *cotangents, wanted)
        leaves = jax.tree.leaves(grads, is_leaf=lambda x: x is None)
        return tuple(leaf for leaf, want in zip(leaves, present) if want)

    return tuple(linear_call(forward, transpose, residuals, moving))


@functools.partial(_tangent.defjvp, symbolic_zeros=True)
def _tangent_jvp(call, present, primals, tangents):
    residuals, moving = primals
    (d_arrays, *_), d_moving = tangents
    result = _tangent(call, present, residuals, moving)
    return result, _tangent_derivative(call, present, residuals, moving, d_arrays, d_moving)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _attend_and_tangent(call: Call, present: tuple[bool, ...], arrays, rows, moving):
    """o, lse and their tangents from one kernel. Not linear: what differentiates it sees two results, as one pass."""
    dq, dsegments = _fill(jax.tree.structure(arrays), present, moving)
    return call.backend.forward_tangent(arrays[0], call.segments(arrays, rows), call.scale, dq, dsegments)


@functools.partial(_attend_and_tangent.defjvp, symbolic_zeros=True)
def _attend_and_tangent_jvp(call, present, primals, tangents):
    arrays, rows, moving = primals
    d_arrays, _, d_moving = tangents
    out, lse, *moved = _attend_and_tangent(call, present, arrays, rows, moving)
    out, lse = _named((out, lse))
    residuals = arrays, rows, out, lse
    arrays_present, d_leaves = _split_tangents(d_arrays)
    if d_leaves:
        d_primal = _tangent(call, arrays_present, residuals, d_leaves)
    else:
        d_primal = jnp.zeros_like(out), jnp.zeros_like(lse)
    d_moved = _tangent_derivative(call, present, residuals, moving, d_arrays, d_moving)
    return (out, lse, *moved), (*d_primal, *d_moved)


def _tangent_derivative(call, present, residuals, moving, d_arrays, d_moving):
    """Derivative of `_tangent`: linear in `moving`, and along `d_arrays` a second derivative of attention."""
    parts = []
    still, d_leaves = _split_tangents(d_moving)
    if d_leaves:
        marks = iter(still)
        both = tuple(p and next(marks) for p in present)
        parts.append(_tangent(call, both, residuals, d_leaves))
    arrays_present, d_leaves = _split_tangents(d_arrays)
    if d_leaves:
        parts.append(_second(call, present, residuals, moving, arrays_present, d_leaves))
    if not parts:
        return tuple(jnp.zeros_like(x) for x in residuals[2:])
    return jax.tree.map(lambda *xs: sum(xs[1:], xs[0]), *parts)


def _second(call, present, residuals, moving, arrays_present, d_arrays):
    """Derivative along `d_arrays` of the tangent along `moving`, through the plain implementation."""
    arrays, rows, _, _ = residuals
    leaves, treedef = jax.tree.flatten(arrays)

    def plain(leaves):
        arrays = jax.tree.unflatten(treedef, leaves)
        return reference.attend_by_rows(arrays[0], call.segments(arrays, rows), call.scale)

    def along(present, parts, function):
        """x ↦ derivative of `function` at x along `parts`, whose other components stay fixed."""

        def derivative(leaves):
            some = [x for x, p in zip(leaves, present) if p]

            def of_some(some):
                filled = iter(some)
                return function([next(filled) if p else x for x, p in zip(leaves, present)])

            return jax.jvp(of_some, (some,), (list(parts),))[1]

        return derivative

    return along(arrays_present, d_arrays, along(present, moving, plain))(leaves)


def _named(results):
    out, lse = results
    return checkpoint_name(out, OUTPUT_NAME), checkpoint_name(lse, LSE_NAME)


def _split_tangents(tangents):
    """Which leaves have a tangent, and those tangents."""
    leaves = jax.tree.leaves(tangents, is_leaf=lambda x: isinstance(x, SymbolicZero))
    present = tuple(not isinstance(x, SymbolicZero) for x in leaves)
    return present, tuple(x for x, p in zip(leaves, present) if p)


def _fill(treedef, present, values):
    """(dq, ((dk, dv), …)) with None for what `present` does not mark."""
    values = iter(values)
    return _by_segment(jax.tree.unflatten(treedef, [next(values) if p else None for p in present]))


def _by_segment(arrays):
    q, *pairs = arrays
    return q, tuple(pair for pair in pairs if pair is not None)
