"""The transformer's views of context are one function, and that function is the specification's."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import wan_oracle

from crcm_jax.chunks import ChunkPattern

PATTERNS = {
    "c1-1": (ChunkPattern(1, 1), 4),
    "c3-3": (ChunkPattern(3, 3), 6),
    "c1-4": (ChunkPattern(1, 4), 9),
    "window": (ChunkPattern(1, 2, window=2), 7),
    "sink": (ChunkPattern(1, 2, window=2, sink=1), 9),
    "window 1 and sink": (ChunkPattern(1, 1, window=1, sink=2), 5),
}
"""Patterns with a clip length each, long enough for every term of the mask to matter."""

EXACT = 2e-12
"""float64: two orders of summation, two layers; measured below 1e-14."""


@pytest.fixture(params=PATTERNS)
def clip(request):
    """(pattern, frames)."""
    return PATTERNS[request.param]


def inputs(frames, dtype):
    """A target and a context, each with a time of its own for every frame, and text."""
    x, c = (tiny.latents(seed, 2, frames, dtype) for seed in (1, 2))
    t, t_c = (np.random.default_rng(seed).uniform(size=(2, frames)).astype(dtype) for seed in (3, 4))
    return x, t, c, t_c, tiny.condition(dtype=dtype)


def test_masked_and_packed_forward_are_the_specification(clip, x64):
    """Against the second implementation: patches, time, modulation, norms, rotation, masks, head."""
    pattern, frames = clip
    network = tiny.wan(pattern, "float64")
    params = tiny.parameters(network, dtype=np.float64)
    x, t, c, t_c, cond = inputs(frames, np.float64)
    tokens = (tiny.HEIGHT // 2) * (tiny.WIDTH // 2)

    def oracle(x, t, allow, positions):
        return wan_oracle.velocity(params, network.config, x, t, cond.text, allow, positions)

    velocity = tiny.jit(network.velocity)
    masked, packed = velocity(params, x, t, cond), velocity(params, x, t, cond, context=(c, t_c))
    expected = oracle(x, t, wan_oracle.block_causal(pattern, frames, tokens), range(frames))
    assert tiny.relative(masked, expected) < EXACT

    both, times = np.concatenate([c, x], 1), np.concatenate([t_c, t], 1)
    allow = wan_oracle.teacher_forcing(pattern, frames, tokens)
    expected = oracle(both, times, allow, [*range(frames), *range(frames)])[:, frames:]
    assert tiny.relative(packed, expected) < EXACT


def test_bidirectional_forward_is_the_specification(x64):
    """Without chunks every frame sees every frame; one time for the whole clip equals that time in every frame."""
    network = tiny.wan(None, "float64")
    params = tiny.parameters(network, dtype=np.float64)
    x, t, _, _, cond = inputs(3, np.float64)
    everything = np.ones((18, 18), bool)
    expected = wan_oracle.velocity(params, network.config, x, t, cond.text, everything, range(3))
    velocity = tiny.jit(network.velocity)
    assert tiny.relative(velocity(params, x, t, cond), expected) < EXACT
    one = velocity(params, x, t[:, :1], cond)
    assert tiny.relative(velocity(params, x, np.tile(t[:, :1], 3), cond), one) < EXACT


# float32: the project's own bound; measured at most 1.3e-6. float64 where the mask has every term, and a longer chunk.
VIEWS = [*((name, "float32", 1e-5) for name in PATTERNS), ("c1-4", "float64", EXACT), ("sink", "float64", EXACT)]


@pytest.mark.parametrize(("name", "dtype", "bound"), VIEWS)
def test_cached_masked_and_packed_forwards_are_equal(name, dtype, bound):
    """Each chunk against a cache of the chunks before it, with a traced chunk index and with a fixed one."""
    with jax.enable_x64(dtype == "float64"):
        pattern, frames = PATTERNS[name]
        network = tiny.wan(pattern, dtype)
        params = tiny.parameters(network, dtype=np.dtype(dtype))
        x, t, c, t_c, cond = inputs(frames, np.dtype(dtype))

        @tiny.jit
        def whole(x, t, c, t_c):
            return network.velocity(params, c, t_c, cond), network.velocity(params, x, t, cond, context=(c, t_c))

        @tiny.jit
        def step(x, t, c, t_c, cache, i):
            target = network.velocity(params, x, t, cond, cache=cache, chunk=i)
            return target, *network.velocity_and_append(params, c, t_c, cond, cache, chunk=i)

        masked, packed = whole(x, t, c, t_c)
        cache = network.init_cache(2, x.shape[1:4])
        for i, span in enumerate(pattern.spans(frames)):
            before = cache
            target, own, cache = step(x[:, span], t[:, span], c[:, span], t_c[:, span], before, i)
            assert tiny.relative(target, packed[:, span]) < bound
            assert tiny.relative(own, masked[:, span]) < bound
        fixed = network.velocity(params, x[:, span], t[:, span], cond, cache=before, chunk=i)
        assert tiny.relative(fixed, packed[:, span]) < bound


def test_a_cached_forward_ignores_later_chunks():
    """Bit for bit, whatever lies in the cache at its own place and after: the replay of a rollout stands on this."""
    pattern, frames = PATTERNS["c1-1"]
    network = tiny.wan(pattern)
    params = tiny.parameters(network)
    x, t, c, t_c, cond = inputs(frames, np.float32)
    append, velocity = tiny.jit(network.append), tiny.jit(network.velocity)
    caches = [network.init_cache(2, x.shape[1:4])]
    for i, span in enumerate(pattern.spans(frames)):
        caches.append(append(params, c[:, span], t_c[:, span], cond, caches[-1], chunk=i))
    for i, span in enumerate(pattern.spans(frames)):
        short, full = (
            velocity(params, x[:, span], t[:, span], cond, cache=cache, chunk=i) for cache in (caches[i], caches[-1])
        )
        np.testing.assert_array_equal(short, full)
        if i:
            poorer = velocity(params, x[:, span], t[:, span], cond, cache=caches[i - 1], chunk=i)
            assert tiny.relative(poorer, full) > 1e-3, "the last earlier chunk must matter"


def test_velocity_and_append_is_both():
    """One pass gives what the two give."""
    pattern, frames = PATTERNS["c3-3"]
    network = tiny.wan(pattern)
    params = tiny.parameters(network)
    x, t, _, _, cond = inputs(frames, np.float32)
    cache = jax.tree.map(lambda z: tiny.normal(5, *z.shape), network.init_cache(2, x.shape[1:4]))
    args = (params, x[:, 3:], t[:, 3:], cond)
    v, new = tiny.jit(network.velocity_and_append)(*args, cache, chunk=1)
    # The same program but for dead code: XLA may still order sums otherwise.
    assert tiny.relative(v, tiny.jit(network.velocity)(*args, cache=cache, chunk=1)) < 1e-6
    appended = tiny.jit(network.append)(*args, cache, chunk=1)
    for name in ("k", "v"):
        assert tiny.relative(new[name], appended[name]) < 1e-6
        np.testing.assert_array_equal(new[name][:, :, :18], cache[name][:, :, :18])
        assert tiny.relative(new[name][:, :, 18:], cache[name][:, :, 18:]) > 0.1


def test_what_does_not_fit_is_named():
    """Errors before any work."""
    pattern = ChunkPattern(1, 2)
    network = tiny.wan(pattern)
    params = tiny.parameters(network)
    x, t, c, t_c, cond = inputs(4, np.float32)
    with pytest.raises(ValueError, match="4 latent frames do not split"):
        network.velocity(params, x, t, cond)
    with pytest.raises(ValueError, match="4 latent frames do not split"):
        network.velocity(params, x, t, cond, context=(c, t_c))
    with pytest.raises(ValueError, match="teacher forcing pairs equal clips"):
        network.velocity(params, x[:, :3], t[:, :3], cond, context=(c, t_c))
    with pytest.raises(ValueError, match="do not divide into patches"):
        network.velocity(params, x[:, :3, :, :5], t[:, :3], cond)
    free = tiny.wan(None)
    with pytest.raises(ValueError, match="needs a causal network"):
        free.velocity(params, x, t, cond, context=(c, t_c))
    with pytest.raises(ValueError, match="needs a causal network"):
        free.velocity(params, x, t, cond, cache=free.init_cache(2, x.shape[1:4]), chunk=0)


def test_time_is_rounded_only_where_asked(x64):
    """`round_time` sees 1000·t in bfloat16, whose grid above 512 is 4 wide; without it nearby times differ."""
    x, _, _, _, cond = inputs(2, np.float64)
    exact, rounded = tiny.wan(None, "float64"), tiny.wan(None, "float64", round_time=True)
    params = tiny.parameters(exact, dtype=np.float64)

    @functools.partial(tiny.jit, static_argnums=0)
    def at(network, t):
        return network.velocity(params, x, jnp.full((2, 1), t), cond)

    # 750 lies between two bins and goes to the even neighbour, 752 (spec causal_rcm 1.3).
    for t, seen in ((15 / 16, 0.936), (5 / 6, 0.832), (5 / 8, 0.624), (3 / 4, 0.752), (1600 / 1601, 1.0)):
        assert tiny.relative(at(rounded, t), at(exact, seen)) < EXACT
        assert tiny.relative(at(rounded, t), at(exact, t)) > 1e-4
