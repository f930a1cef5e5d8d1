"""What makes streaming fast changes no result: prepared conditions, and layers that are written out."""

import dataclasses

import jax
import numpy as np
import pytest
import tiny

from crcm_jax.chunks import ChunkPattern
from crcm_jax.models.base import Condition
from crcm_jax.models.bound import Bound, Prompted
from crcm_jax.models.core.stack import listed
from crcm_jax.models.wan.prompt import prompt


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


def test_either_form_reads_a_cache_that_the_other_has_written():
    """Layers scanned or written out, with caches stacked or in lists; the layers differ, and so do keys and values."""
    scanned = tiny.wan(ChunkPattern(1, 1))
    params = tiny.parameters(scanned)
    unrolled = dataclasses.replace(scanned, unrolled=True)
    models = (Bound(scanned, params), Bound(unrolled, {**params, "blocks": listed(params["blocks"])}))
    forms = [model.prompted(tiny.condition()) for model in models]
    first, second = (tiny.latents(seed, 2, 1) for seed in (1, 2))
    t = np.full((1, 1), 0.4, np.float32)
    write, velocity = tiny.jit(Prompted.write), tiny.jit(Prompted.velocity)
    caches = [write(form, first, t, form.cache(2, (2, tiny.HEIGHT, tiny.WIDTH)), 0)[1] for form in forms]
    found = [velocity(form, second, t, cache, 1) for form in forms for cache in caches]
    assert max(tiny.relative(v, found[0]) for v in found[1:]) < 1e-5
    empty = forms[0].cache(2, (2, tiny.HEIGHT, tiny.WIDTH))
    assert tiny.relative(velocity(forms[0], second, t, empty, 1), found[0]) > 1e-3  # power: the cache matters
