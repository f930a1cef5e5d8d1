"""Attention cut over eight CPU devices is attention on one: masks that differ by sample, and few key/value heads."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest
import tiny

from crcm_jax.parallel.mesh import AXES
from crcm_jax.parallel.placement import Placement, indivisible

WORKER = """
import functools
import jax, jax.numpy as jnp, numpy as np
from crcm_jax.parallel import mesh as meshes
from crcm_jax.parallel.placement import ONE_DEVICE, Placement
from pallas_kernels.attention import BlockCausal, Cached, Captioned, Intervals, TeacherForcing, attention

BATCH, QUERIES, CONTEXT = 4, 24, 33
rng = np.random.default_rng(0)
q, dq = (jnp.asarray(rng.normal(size=(BATCH, QUERIES, 8, 16)), jnp.float32) for _ in range(2))
k, v = (jnp.asarray(rng.normal(size=(BATCH, QUERIES, 4, 16)), jnp.float32) for _ in range(2))
context = tuple(jnp.asarray(rng.normal(size=(BATCH, CONTEXT, 4, 16)), jnp.float32) for _ in range(2))
lengths, row, entry = (9, 0, 4, 7), np.arange(QUERIES, dtype=np.int32), np.arange(BATCH, dtype=np.int32)[:, None]
MASKS = {
    "static captions": Captioned(TeacherForcing(8, 8), lengths, 9),
    "traced captions": Captioned(TeacherForcing(8, 8), jnp.int32(lengths), 9),
    "cached": Cached(jnp.int32([33, 20, 12, 9]), 9, lengths),
    "shared": Cached(jnp.int32(30), 9, 3),
    "intervals": Intervals(own=((entry * 2, row + 1),), context=((0, 3 * entry), (jnp.int32(row), row + 5 + entry))),
}
DATA, ENTRIES, HEADS, WHOLE = (2, 1, 1, 1), (2, 2, 1, 1), (2, 1, 2, 2), (1, 8, 1, 1)  # one sample a device; none cut
MESHES = {"traced captions": (HEADS, WHOLE), "intervals": (DATA, ENTRIES), "cached": (ENTRIES,)}
call = functools.partial(attention, implementation="chunked")
jax.config.update("jax_disable_most_optimizations", True)

def results(placement, mask, tangent):
    def run(q, k, v, mask):
        def f(q, k, v):
            return placement.attend(call, q, k, v, context=context, mask=mask)
        return f(q, k, v), jax.jvp(f, (q, k, v), (dq, k, v))[1] if tangent else (), jax.vjp(f, q, k, v)[1](dq)
    return jax.jit(lambda q, k, v: run(q, k, v, mask))(q, k, v)

for name, mask in MASKS.items():
    expected = results(ONE_DEVICE, mask, name == "traced captions")
    for shape in MESHES.get(name, (DATA,)):
        n = int(np.prod(shape))
        found = results(Placement(meshes.over(shape, jax.devices()[:n])), mask, name == "traced captions")
        worst = max(float(jnp.abs(a - b).max() / jnp.abs(b).max())
                    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True))
        assert worst < 1e-5, (name, shape, worst)
    if name == "traced captions":  # an exchanged caption shows
        other = call(q, k, v, context=context, mask=Captioned(TeacherForcing(8, 8), (0, 9, 4, 7), 9))
        assert float(jnp.abs(other - expected[0]).max()) > 1e-2
try:
    Placement(meshes.over((2, 1, 1, 1), jax.devices()[:2])).attend(call, q, k, v, context=context, mask=Cached((1, 2)))
except ValueError as error:
    assert "values for 2 batch entries and q has 4" in str(error)
else:
    raise AssertionError("a mask for another batch passed")
print("equal on", len(jax.devices()), "devices")
"""


def test_masks_of_each_sample_are_cut_with_the_samples():
    flags = {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"}
    environment = {**os.environ, **flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(Path(__file__).parents[2])}
    run = subprocess.run([sys.executable, "-c", WORKER], env=environment, capture_output=True, text=True)
    assert "equal on 8 devices" in run.stdout, run.stderr[-3000:]


def mesh(**lengths):
    return tiny.abstract_mesh(*(lengths.get(axis, 1) for axis in AXES))


def test_key_and_value_heads_have_to_divide_as_well():
    says = r"mesh\.tensor × mesh\.context = 16 does not divide the 8 key/value heads"
    placement = Placement(mesh(tensor=8, context=2))
    placement.check(32)
    assert indivisible(mesh(tensor=8).shape, 32, 8) is None
    with pytest.raises(ValueError, match=says):
        placement.check(32, 8)
    with pytest.raises(ValueError, match=says):
        placement.cache(jax.ShapeDtypeStruct((2, 40, 8, 16), "float32"))
    q, k = (jax.ShapeDtypeStruct((2, 40, heads, 16), "float32") for heads in (32, 8))
    with pytest.raises(ValueError, match=says):
        placement.attend(None, q, k, k, mask=None)
