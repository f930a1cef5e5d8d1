"""Keys of a cached call shared out among copies of the queries: the same result, and when it is done."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.attention import Cached, api, attention, mosaic_gpu
from pallas_kernels.attention.mosaic_gpu.decode import attend_in_parts, choose_parts

MASKS = {
    "start of a clip": {"stop": 0},
    "everything before": {"stop": 130},
    "window": {"stop": 130, "start": 70},
    "window and sink": {"stop": 140, "start": 70, "sink": 20},
    "full cache": {"stop": 150},
    "captions": {"stop": (150, 31), "start": 31, "sink": (7, 29)},
    "all by entry": {"stop": (0, 130), "start": (0, 90), "sink": (0, 20)},
}


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


@pytest.mark.parametrize("parts, traced", [(2, False), (5, True)])
@pytest.mark.parametrize("name", MASKS)
def test_parts_are_the_whole(name, parts, traced):
    """Value, log-sum-exp, tangent and gradient, with two query heads a key head."""

    def both(arrays, moving, fields):
        mask = Cached(**fields)
        call = functools.partial(api._attend, "reference", 0.5, False)

        def whole(arrays):
            q, (k, v), context = arrays
            return attention(
                q, k, v, context=context, mask=mask, scale=0.5, implementation="reference", return_lse=True
            )

        def shared(arrays):
            return attend_in_parts(call, arrays, mask, parts)

        results = [jax.jvp(f, (arrays,), (moving,)) for f in (whole, shared)]
        return [(r, jax.vjp(f, arrays)[1](results[0][1])) for r, f in zip(results, (whole, shared))]

    with jax.enable_x64(True):
        arrays, moving = (
            (normal(i, 2, 24, 6, 4), tuple(normal(i + j, 2, 27, 3, 4) for j in (1, 2)),
             tuple(normal(i + j, 2, 150, 3, 4) for j in (3, 4)))
            for i in (0, 5)
        )  # fmt: skip
        fields = MASKS[name]
        run = jax.jit(both) if traced else jax.jit(lambda *arrays: both(*arrays, fields))
        fields_there = (jax.tree.map(jnp.int32, fields),) if traced else ()
        whole, shared = run(arrays, moving, *fields_there)
    for a, b in zip(jax.tree.leaves(shared), jax.tree.leaves(whole), strict=True):
        assert np.linalg.norm(a - b) <= 1e-13 * np.linalg.norm(b)  # float64, one more order of summation


def test_parts_fill_the_device():
    assert choose_parts((1, 1560, 12, 128)) == 5  # 780 programs in 6 rounds of 132
    assert choose_parts((1, 1560, 40, 128)) == 1  # 520 programs in 4 rounds already
    assert choose_parts((1, 1560, 12, 128), multiprocessors=78) == 1  # 156 programs in 2 rounds already


@pytest.mark.parametrize("implementation, parts", [("mosaic_gpu", 5), ("chunked", 1)])
def test_a_cached_call_is_cut_where_the_hopper_kernel_serves(monkeypatch, implementation, parts):
    monkeypatch.setattr(mosaic_gpu, "_no_hopper", lambda: None)
    x, cache = (jax.ShapeDtypeStruct((1, n, 12, 128), jnp.bfloat16) for n in (1560, 3120))

    def call(x, cache, mask):
        return attention(x, x, x, context=(cache, cache), mask=mask, implementation=implementation)

    program = str(jax.make_jaxpr(lambda x, cache: call(x, cache, Cached(1560)))(x, cache))
    assert (re.search(rf"bf16\[1,{parts * 1664},12,128\]", program) is not None) == (parts > 1)
