"""Networks with their prompts: two branches in one pass are two passes."""

import jax.numpy as jnp
import pytest
import tiny

from crcm_jax.chunks import ChunkPattern
from crcm_jax.models.base import Condition
from crcm_jax.models.bound import Bound, combine

FRAMES = 3


def condition(seed, batch, tokens=5):
    return Condition({"text": jnp.asarray(tiny.normal(seed, batch, tokens, 8))})


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("tokens", [5, 4], ids=["one pass", "two passes"])
@pytest.mark.parametrize("times", ["shared", "own"])
def test_guided_passes_on_a_cache_are_those_of_both_branches(batch, tokens, times):
    """Of one clip as of several, with times of its own or for all, and with given frames in the first chunk."""
    network = tiny.wan(ChunkPattern(1, 1))
    model = Bound(network, tiny.parameters(network))
    cond, uncond = condition(1, batch), condition(2, 1, tokens)
    alone = Condition({"text": jnp.repeat(uncond.prompt["text"], batch, 0)})
    first, second = (jnp.asarray(tiny.latents(seed, batch, 1)) for seed in (3, 4))
    given = jnp.ones((batch, 1), bool)
    t = jnp.asarray([[0.7]] if times == "shared" else [[0.7], [0.4]][:batch])

    @tiny.jit
    def run(prompted):
        cache = prompted.cache(batch, (FRAMES, tiny.HEIGHT, tiny.WIDTH))
        begun, cache = prompted.on({}, given).write(first, jnp.zeros((1, 1)), cache, 0)
        prompted = prompted.on({})
        written, cache = prompted.write(second, t, cache, 1)
        return begun, written, prompted.velocity(second, t, cache, 1)

    found = run(model.prompted(cond, uncond, 3.0))
    branches = zip(run(model.prompted(cond)), run(model.prompted(alone)))
    for guided, (v_cond, v_uncond) in zip(found, branches):
        assert guided.shape == first.shape
        assert tiny.relative(guided, combine(v_cond, v_uncond, 3.0)) < 1e-5
        assert tiny.relative(guided, v_cond) > 1e-2  # power: the branches differ
