"""Small networks and conditions for tests: every parameter random, so that nothing hides behind a zero."""

import functools

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType

from crcm_jax.models.base import Condition
from crcm_jax.models.wan.config import WanConfig
from crcm_jax.models.wan.transformer import WanTransformer
from crcm_jax.parallel.mesh import AXES
from crcm_jax.parallel.placement import ONE_DEVICE, Placement

HEIGHT, WIDTH, CHANNELS = 4, 6, 3
"""Latents of 2×3 patches: unequal sides and a third channel, so that no two axes can be mistaken for each other."""


def abstract_mesh(*lengths: int) -> AbstractMesh:
    """A mesh of devices that need not be there, for programs that are only looked at."""
    return AbstractMesh(lengths, AXES, axis_types=(AxisType.Auto,) * len(AXES))


CUT = Placement(abstract_mesh(2, 1, 2, 1))
"""Samples and tokens cut in two."""

jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
"""At these sizes the time goes into compiling, not into running: leave LLVM's optimisations out."""


def wan(chunks=None, dtype="float32", placement=ONE_DEVICE, **changes) -> WanTransformer:
    """A transformer of two layers and heads of width 16, whose three axes of positions have 8, 4 and 4 channels."""
    sizes = {
        **{"dim": 32, "ffn_dim": 40, "heads": 2, "layers": 2, "freq_dim": 16, "text_dim": 8},
        **{"in_channels": CHANNELS, "out_channels": CHANNELS, "round_time": False, "remat": "none"},
    }
    return WanTransformer(WanConfig(**{**sizes, **changes}, dtype=dtype), chunks, placement)


def parameters(network, seed=0, dtype=np.float32):
    """Random parameters: kernels of unit gain, all others (norm scales, biases, modulation) moved from their start."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        if path[-1].key == "kernel":
            return (rng.normal(size=leaf.shape) / np.sqrt(leaf.shape[-2])).astype(dtype)
        start = 1.0 if path[-1].key == "scale" else 0.0
        return (start + 0.3 * rng.normal(size=leaf.shape)).astype(dtype)

    return jax.tree_util.tree_map_with_path(draw, jax.eval_shape(network.init, jax.random.key(0)))


def normal(seed, *shape, dtype=np.float32):
    """Fixed standard normal numbers."""
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def latents(seed, batch, frames, dtype=np.float32):
    """A clip."""
    return normal(seed, batch, frames, HEIGHT, WIDTH, CHANNELS, dtype=dtype)


def condition(seed=7, batch=2, tokens=5, dtype=np.float32) -> Condition:
    """Text embeddings."""
    return Condition({"text": normal(seed, batch, tokens, 8, dtype=dtype)})


def relative(a, b) -> float:
    """Largest difference over the largest magnitude."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(np.abs(a - b).max() / np.abs(b).max())
