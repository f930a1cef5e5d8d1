"""From a Flax NNX module to functions of a plain tree of arrays: NNX declares and applies, JAX does the rest."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from crcm_jax.shapes import Params


class Declared:
    """A module's structure without its arrays. make: `rngs -> module`; it is called to look at, never to keep."""

    def __init__(self, make: Callable[[nnx.Rngs], nnx.Module]):
        self._make = make

    @functools.cached_property
    def _graph(self) -> nnx.GraphDef:
        return nnx.split(nnx.eval_shape(lambda: self._make(nnx.Rngs(0))))[0]

    def init(self, key: jax.Array) -> Params:
        """Random parameters as a nested dict."""
        return nnx.to_pure_dict(nnx.split(self._make(nnx.Rngs(params=key)))[1])

    def bind(self, params: Params) -> Any:
        """The module with these parameters."""
        return nnx.merge(self._graph, params)
