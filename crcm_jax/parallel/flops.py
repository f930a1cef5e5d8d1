"""Floating-point operations of a program's matrix products, from its jaxpr, before any partitioning."""

from __future__ import annotations

import math
from typing import Any

from jax.extend import core


def matmul_flops(jaxpr: core.Jaxpr) -> int:
    """2·(multiply–adds) of every matrix product, over all devices; a scan's body counts as often as it runs.

    A `while` whose length depends on data counts once, so tiles of a tiled attention beyond the first are missing: add
    them by arithmetic. Of a conditional the dearest branch counts.
    """
    return sum(_equation(equation) for equation in jaxpr.eqns)


def _equation(equation: core.JaxprEqn) -> int:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contract, _), _ = params["dimension_numbers"]
        left = equation.invars[0].aval.shape
        return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contract)
    inner = [matmul_flops(jaxpr) for value in params.values() for jaxpr in _jaxprs(value)]
    if name == "cond":
        return max(inner, default=0)
    return sum(inner) * (params["length"] if name == "scan" else 1)


def _jaxprs(value: Any) -> list[core.Jaxpr]:
    """The jaxprs that an equation's parameter holds."""
    if isinstance(value, core.ClosedJaxpr):
        return [value.jaxpr]
    if isinstance(value, core.Jaxpr):
        return [value]
    return [jaxpr for item in value for jaxpr in _jaxprs(item)] if isinstance(value, tuple | list) else []
