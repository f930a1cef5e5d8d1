"""Floating-point operations of a program's matrix products, from its jaxpr, before the compiler cuts it up."""

from __future__ import annotations

import math
from typing import Any

from jax.extend import core


def matmul_flops(jaxpr: core.Jaxpr, counted: int = 1) -> int:
    """2·(multiply–adds) of every matrix product, over all devices; a scan's body counts as often as it runs.

    A Pallas kernel counts as the tiles it visits, masked pairs in them included, by its own estimate; with a traced
    mask that is all tiles there are. What a `shard_map` does counts on each of its devices. Of a conditional the
    dearest branch counts.

    counted: how often a loop up to a traced number runs. Other loops whose length depends on data count once.
    """
    return sum(_equation(equation, counted) for equation in jaxpr.eqns)


def _equation(equation: core.JaxprEqn, counted: int) -> int:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contract, _), _ = params["dimension_numbers"]
        left: Any = equation.invars[0].aval  # both are arrays
        out: Any = equation.outvars[0].aval
        return 2 * math.prod(out.shape) * math.prod(left.shape[axis] for axis in contract)
    if name == "pallas_call" and params["cost_estimate"] is not None:
        return params["cost_estimate"].flops
    inner = [matmul_flops(jaxpr, counted) for value in params.values() for jaxpr in _jaxprs(value)]
    if name == "cond":
        return max(inner, default=0)
    return sum(inner) * _times(name, params, counted)


def _times(name: str, params: dict[str, Any], counted: int) -> int:
    if name == "scan":
        return params["length"]
    if name == "shard_map":
        # JAX 0.10 calls the parameter newly_manual_axes.
        axes = next(value for key, value in params.items() if key.endswith("manual_axes"))
        return math.prod(params["mesh"].shape[axis] for axis in axes)
    if name == "while" and [e.primitive.name for e in params["cond_jaxpr"].jaxpr.eqns] == ["lt"]:
        return counted
    return 1


def _jaxprs(value: Any) -> list[core.Jaxpr]:
    """The jaxprs that an equation's parameter holds."""
    if isinstance(value, core.ClosedJaxpr):
        return [value.jaxpr]
    if isinstance(value, core.Jaxpr):
        return [value]
    return [jaxpr for item in value for jaxpr in _jaxprs(item)] if isinstance(value, tuple | list) else []
