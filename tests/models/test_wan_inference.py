"""What makes streaming fast changes no result: keys shared out among copies of the queries, and prepared conditions."""

import jax
import numpy as np
import pytest
import tiny

from crcm_jax.chunks import ChunkPattern
from crcm_jax.models.base import Condition
from crcm_jax.models.wan.prompt import prompt
from pallas_kernels.attention import Cached, attention
from pallas_kernels.attention.mosaic_gpu.decode import attend_in_parts, choose_parts

MASKS = {
    "start of a clip": {"stop": 0},
    "everything before": {"stop": 130},
    "window": {"stop": 130, "start": 70},
    "window and sink": {"stop": 140, "start": 70, "sink": 20},
    "full cache": {"stop": 150},
}


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("parts", [2, 5])
def test_parts_are_the_whole(name, parts, traced, x64):
    q, k, v = (tiny.normal(i, 2, 24, 3, 4, dtype=np.float64) for i in range(3))
    context = tuple(tiny.normal(i, 2, 150, 3, 4, dtype=np.float64) for i in (3, 4))

    def both(fields):
        mask = Cached(**fields)
        whole = attention(q, k, v, context=context, mask=mask, implementation="reference")
        return whole, attend_in_parts(q, k, v, context, mask, parts, "reference")

    whole, shared = tiny.jit(both)(MASKS[name]) if traced else tiny.jit(lambda: both(MASKS[name]))()
    assert tiny.relative(shared, whole) < 1e-13  # float64, one more order of summation


def test_parts_fill_the_device():
    assert choose_parts((1, 1560, 12, 128)) == 5  # 780 programs in 6 rounds of 132
    assert choose_parts((1, 1560, 40, 128)) == 1  # 520 programs in 4 rounds already


@pytest.mark.parametrize("image", [False, True])
def test_prepared_condition_is_the_condition(image):
    network = tiny.wan(ChunkPattern(1, 1), image_dim=6 if image else None)
    params, cond = tiny.parameters(network), tiny.condition()
    if image:
        cond = Condition(prompt(cond.prompt["text"], tiny.normal(8, 2, 3, 6)))
    x, t = tiny.latents(1, 2, 1), np.full((1, 1), 0.4, np.float32)
    cache = jax.tree.map(lambda leaf: leaf + 0.5, network.cache(2, (3, tiny.HEIGHT, tiny.WIDTH)))

    @tiny.jit
    def both(params, cond):
        return [
            network.write(params, x, t, network.condition(params, cond, many=many), cache, 2) for many in (False, True)
        ]

    plain, prepared = both(params, cond)
    assert all(tiny.relative(a, b) < 1e-6 for a, b in zip(jax.tree.leaves(prepared), jax.tree.leaves(plain)))
    other, _ = both(params, Condition({**cond.prompt, "text": cond.prompt["text"][::-1]}))[1]
    assert tiny.relative(other, plain[0]) > 1e-3  # the text is seen
