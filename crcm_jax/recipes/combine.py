"""Gradients of several losses as one."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from crcm_jax.recipes.base import GradFn


def summed(grad_fns: Sequence[GradFn]) -> GradFn:
    """One GradFn whose losses and gradients are the sums of the given ones', each with randomness of its own.

    ValueError, while tracing, where two of them call a metric alike: one would hide the other.
    """
    if len(grad_fns) == 1:
        return grad_fns[0]

    def grad_fn(nets, batch, key, progress, weights):
        (total, metrics), grads = grad_fns[0](nets, batch, jax.random.fold_in(key, 0), progress, weights)
        for i, other in enumerate(grad_fns[1:], 1):
            (losses, more), g = other(nets, batch, jax.random.fold_in(key, i), progress, weights)
            if both := sorted(metrics.keys() & more.keys()):
                raise ValueError(f"two losses that are added up both call a metric {both[0]!r}: rename one")
            total, metrics, grads = total + losses, {**metrics, **more}, jax.tree.map(jnp.add, grads, g)
        return (total, metrics), grads

    return grad_fn


def after(iteration: int, always: GradFn, later: GradFn) -> GradFn:
    """`always`, plus `later` from `iteration` on (the joint type, spec causal_rcm 4.5); one program for both phases."""
    both = summed([always, later])
    if not iteration:
        return both

    def phased(nets, batch, key, progress, weights):
        args = (nets, batch, key, progress, weights)

        def alone():
            (losses, metrics), grads = always(nets, batch, jax.random.fold_in(key, 0), progress, weights)
            absent = jax.eval_shape(both, *args)[0][1]
            zeros = {name: jnp.zeros(m.shape, m.dtype) for name, m in absent.items()}
            return (losses, {**zeros, **metrics}), grads

        return jax.lax.cond(progress.iteration < iteration, alone, lambda: both(*args))

    return phased
