"""The transformer's views of context are one function, and that function is the specification's."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import wan_oracle

from crcm_jax.cache.base import Seen
from crcm_jax.cache.policies.full import Full
from crcm_jax.chunks import ChunkPattern
from crcm_jax.models.base import Condition, TeacherForcing
from crcm_jax.models.bound import Bound, Prompted
from crcm_jax.models.core import rope

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
        return wan_oracle.velocity(params, network.config, x, t, cond.prompt["text"], allow, positions)

    velocity = tiny.jit(Bound(network, params).velocity)
    masked, packed = velocity(x, t, cond), velocity(x, t, cond, TeacherForcing(c, t_c))
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
    expected = wan_oracle.velocity(params, network.config, x, t, cond.prompt["text"], everything, range(3))
    velocity = tiny.jit(Bound(network, params).velocity)
    assert tiny.relative(velocity(x, t, cond), expected) < EXACT
    one = velocity(x, t[:, :1], cond)
    assert tiny.relative(velocity(x, np.tile(t[:, :1], 3), cond), one) < EXACT


# float32: the project's own bound; measured at most 1.3e-6. float64 where the mask has every term, and a longer chunk.
VIEWS = [*((name, "float32", 1e-5) for name in PATTERNS), ("c1-4", "float64", EXACT), ("sink", "float64", EXACT)]


@pytest.mark.parametrize(("name", "dtype", "bound"), VIEWS)
def test_cached_masked_and_packed_forwards_are_equal(name, dtype, bound):
    """Each chunk against a cache of the chunks before it, with a traced chunk index and with a fixed one."""
    with jax.enable_x64(dtype == "float64"):
        pattern, frames = PATTERNS[name]
        network = tiny.wan(pattern, dtype)
        model = Bound(network, tiny.parameters(network, dtype=np.dtype(dtype)))
        x, t, c, t_c, cond = inputs(frames, np.dtype(dtype))

        @tiny.jit
        def whole(x, t, c, t_c):
            return model.velocity(c, t_c, cond), model.velocity(x, t, cond, TeacherForcing(c, t_c))

        @tiny.jit
        def step(x, t, c, t_c, cache, i):
            prompted = model.prompted(cond)
            return prompted.velocity(x, t, cache, i), *prompted.write(c, t_c, cache, i)

        masked, packed = whole(x, t, c, t_c)
        cache = (network.cache(2, x.shape[1:4]),)
        for i, span in enumerate(pattern.spans(frames)):
            before = cache
            target, own, cache = step(x[:, span], t[:, span], c[:, span], t_c[:, span], before, i)
            assert tiny.relative(target, packed[:, span]) < bound
            assert tiny.relative(own, masked[:, span]) < bound
        fixed = model.prompted(cond).velocity(x[:, span], t[:, span], before, i)
        assert tiny.relative(fixed, packed[:, span]) < bound


def test_a_cached_forward_ignores_later_chunks():
    """Bit for bit, whatever lies in the cache at its own place and after: the replay of a rollout stands on this."""
    pattern, frames = PATTERNS["c1-1"]
    network = tiny.wan(pattern)
    prompted = Bound(network, tiny.parameters(network)).prompted(tiny.condition())
    x, t, c, t_c, _ = inputs(frames, np.float32)
    write, velocity = tiny.jit(Prompted.write), tiny.jit(Prompted.velocity)
    caches = [prompted.cache(2, x.shape[1:4])]
    for i, span in enumerate(pattern.spans(frames)):
        caches.append(write(prompted, c[:, span], t_c[:, span], caches[-1], i)[1])
    for i, span in enumerate(pattern.spans(frames)):
        short, full = (velocity(prompted, x[:, span], t[:, span], cache, i) for cache in (caches[i], caches[-1]))
        np.testing.assert_array_equal(short, full)
        if i:
            poorer = velocity(prompted, x[:, span], t[:, span], caches[i - 1], i)
            assert tiny.relative(poorer, full) > 1e-3, "the last earlier chunk must matter"


def test_a_write_leaves_other_chunks_alone():
    """It gives the velocity that a pass without it gives, and changes the cache at its own place alone."""
    pattern, frames = PATTERNS["c3-3"]
    network = tiny.wan(pattern)
    prompted = Bound(network, tiny.parameters(network)).prompted(tiny.condition())
    x, t, *_ = inputs(frames, np.float32)
    (cache,) = jax.tree.map(lambda z: tiny.normal(5, *z.shape), prompted.cache(2, x.shape[1:4]))
    v, (new,) = tiny.jit(Prompted.write)(prompted, x[:, 3:], t[:, 3:], (cache,), 1)
    # The same program but for dead code: XLA may still order sums otherwise.
    assert tiny.relative(v, tiny.jit(Prompted.velocity)(prompted, x[:, 3:], t[:, 3:], (cache,), 1)) < 1e-6
    for was, now in ((cache.k, new.k), (cache.v, new.v)):
        np.testing.assert_array_equal(now[:, :, :18], was[:, :, :18])
        assert tiny.relative(now[:, :, 18:], was[:, :, 18:]) > 0.1


def test_nothing_lies_beyond_the_end():
    """A chunk beyond the cache is refused where its number is known, and NaN where it is traced."""
    pattern, frames = PATTERNS["c1-1"]
    network = tiny.wan(pattern)
    prompted = Bound(network, tiny.parameters(network)).prompted(tiny.condition())
    x, t, *_ = inputs(1, np.float32)
    cache = prompted.cache(2, (frames, *x.shape[2:4]))
    for call in (prompted.velocity, prompted.write):
        with pytest.raises(ValueError, match="chunk 4 lies beyond a cache of 4 frames, which holds 4 chunks"):
            call(x, t, cache, frames)
    v, (new,) = tiny.jit(Prompted.write)(prompted, x, t, cache, frames)
    assert np.isnan(v).all() and np.isnan(new.k).any()
    assert np.isfinite(tiny.jit(Prompted.velocity)(prompted, x, t, cache, frames - 1)).all()


def test_features_are_what_leaves_each_layer(x64):
    """Of the last layer, what the head sees; of all layers, in the order that they are asked for."""
    network = tiny.wan(None, "float64", layers=3)
    params = tiny.parameters(network, dtype=np.float64)
    x, t, _, _, cond = inputs(2, np.float64)
    prepared = network.condition(params, cond)
    last, first = tiny.jit(lambda params: network.features(params, x, t, prepared, [2, 0]))(params)
    assert last.shape == first.shape == (2, 2, 6, 32)
    for layer, found in ((0, first), (2, last)):
        (alone,) = tiny.jit(lambda params: network.features(params, x, t, prepared, [layer]))(params)  # noqa: B023
        assert tiny.relative(found, alone) < EXACT
    query = params["blocks"]["self_attn"]["q"]
    attention = {**params["blocks"]["self_attn"], "q": jax.tree.map(lambda w: jnp.asarray(w).at[2].add(1.0), query)}
    other = {**params, "blocks": {**params["blocks"], "self_attn": attention}}
    moved, same = tiny.jit(lambda params: network.features(params, x, t, prepared, [2, 0]))(other)
    assert tiny.relative(same, first) < EXACT and tiny.relative(moved, last) > 1e-6
    with pytest.raises(ValueError, match="there is no layer 3: this network's are 0 to 2"):
        network.features(params, x, t, prepared, [3])


def test_rope_widths_are_the_published_split():
    assert rope.axis_widths(128) == (44, 42, 42) and rope.axis_widths(16) == (8, 4, 4)


@pytest.mark.parametrize("start", [0, 5, 1023, 70_000])
def test_an_endless_stream_rotates_as_a_long_clip(start):
    """Angles of any frame, to float32's rounding of the products, by addition of two tabled ones."""
    endless = jax.jit(lambda n: rope.table(n, 2, None, 2, 3, 16, np.float32))(start)
    for found, wave in zip(endless, (np.cos, np.sin)):
        angle = (start + np.arange(2))[:, None] * rope.BASE ** (-2.0 * np.arange(4) / 8)
        np.testing.assert_allclose(found.reshape(2, 2, 3, 8)[:, 0, 0, :4], wave(angle), atol=3e-7)


def test_even_a_stream_without_end_has_one():
    """Beyond the room of its tables frames have no place, instead of another's."""
    room = rope._STEP**2
    cosine, _ = jax.jit(lambda n: rope.table(n, 2, None, 2, 3, 16, np.float32))(room - 1)
    assert np.isfinite(cosine[0]).all() and np.isnan(cosine[1, :, :4]).all()


class Forgetful(Full):
    """A policy that keeps a stream's place and nothing else."""

    def limit(self, chunks, slots):
        return None

    def see(self, chunks, chunk, slots):
        return Seen(start=0, stop=0, sink=0, now=chunks.start(chunk))


def test_where_a_policy_forgets_a_stream_has_no_end():
    """A chunk that sees itself alone is the same wherever it stands, far beyond the cache too: rotation is relative."""
    network = tiny.wan(ChunkPattern(1, 1))
    prompted = Bound(network, tiny.parameters(network)).prompted(tiny.condition())
    x, t, *_ = inputs(1, np.float32)
    cache = prompted.cache(2, (2, *x.shape[2:4]), Forgetful())
    near, far = (tiny.jit(Prompted.velocity)(prompted, x, t, cache, chunk) for chunk in (0, 5000))
    assert tiny.relative(far, near) < 1e-5


def test_what_does_not_fit_is_named():
    """Errors before any work."""
    pattern = ChunkPattern(1, 2)
    network = tiny.wan(pattern)
    model = Bound(network, tiny.parameters(network))
    x, t, c, t_c, cond = inputs(4, np.float32)
    with pytest.raises(ValueError, match="4 latent frames do not split"):
        model.velocity(x, t, cond)
    with pytest.raises(ValueError, match="4 latent frames do not split"):
        model.velocity(x, t, cond, TeacherForcing(c, t_c))
    with pytest.raises(ValueError, match="teacher forcing pairs equal clips"):
        model.velocity(x[:, :3], t[:, :3], cond, TeacherForcing(c, t_c))
    with pytest.raises(ValueError, match="do not divide into patches"):
        model.velocity(x[:, :3, :, :5], t[:, :3], cond)
    with pytest.raises(ValueError, match=r"Wan network's prompt is \{text\}, not \['tokens'\]: it is another model's"):
        model.velocity(x[:, :3], t[:, :3], Condition({"tokens": np.zeros((2, 3), int)}))
    with pytest.raises(ValueError, match=r"text has shape \[2, 5, 9\]: this network wants \[batch, token, 8\]"):
        model.velocity(x[:, :3], t[:, :3], Condition({"text": tiny.normal(1, 2, 5, 9)}))
    with pytest.raises(ValueError, match=r"no use for Condition\.frames\['actions'\]"):
        model.velocity(x[:, :3], t[:, :3], cond.replace(frames={"actions": tiny.normal(1, 2, 3, 4)}))
    free = Bound(tiny.wan(None), model.params)
    with pytest.raises(ValueError, match="teacher forcing needs a causal network"):
        free.velocity(x, t, cond, TeacherForcing(c, t_c))
    with pytest.raises(ValueError, match="a cache needs a causal network"):
        free.network.cache(2, x.shape[1:4])


def test_time_is_rounded_only_where_asked(x64):
    """`round_time` sees 1000·t in bfloat16, whose grid above 512 is 4 wide; without it nearby times differ."""
    x, _, _, _, cond = inputs(2, np.float64)
    exact, rounded = tiny.wan(None, "float64"), tiny.wan(None, "float64", round_time=True)
    params = tiny.parameters(exact, dtype=np.float64)

    @functools.partial(tiny.jit, static_argnums=0)
    def at(network, t):
        return Bound(network, params).velocity(x, jnp.full((2, 1), t), cond)

    # 750 lies between two bins and goes to the even neighbour, 752 (spec causal_rcm 1.3).
    for t, seen in ((15 / 16, 0.936), (5 / 6, 0.832), (5 / 8, 0.624), (3 / 4, 0.752), (1600 / 1601, 1.0)):
        assert tiny.relative(at(rounded, t), at(exact, seen)) < EXACT
        assert tiny.relative(at(rounded, t), at(exact, t)) > 1e-4
