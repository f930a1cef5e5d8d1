"""The streaming sampler against a second, slow one: whole clips under the causal mask, Python loops, no cache."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from crcm_jax.chunks import ChunkPattern
from crcm_jax.models.wan.transformer import WanTransformer, unstacked
from crcm_jax.sampling import Few, Noise, Ode, draw_noise, generate, stream
from crcm_jax.sampling.schedule import MID_TIMES, StepPlan

PATTERN, FRAMES = ChunkPattern(1, 2), 5
SHAPE = (2, FRAMES, tiny.HEIGHT, tiny.WIDTH, tiny.CHANNELS)
NETWORK = tiny.wan(PATTERN, layers=1)
PARAMS = tiny.parameters(NETWORK)
COND, UNCOND = tiny.condition(), tiny.condition(8)
CLOSE = 1e-5
"""float32 through a dozen forwards of a network of gain about one; measured 4e-7."""


@functools.cache
def masked():
    """Velocity of a whole clip under the causal mask, times per frame; compiled once for all tests."""
    return tiny.jit(lambda x, t, cond: NETWORK.velocity(PARAMS, x, t, cond))


def slow(noise: Noise, solver, guidance=1.0, image=None):
    """The loops of spec causal_rcm 6.2, 6.3, 6.5. Later frames are nonsense: the mask must hide them."""
    seen, seen_t = np.full(SHAPE, 50.0, np.float32), np.zeros((2, FRAMES), np.float32)
    plan, chunks, begin = solver.plan, [], 0
    spans = [slice(0, 1), slice(1, 3), slice(3, 5)]

    def velocity(x, t, span):
        clip, times = seen.copy(), seen_t.copy()
        clip[:, span], times[:, span] = x, t
        v = masked()(clip, times, COND)[:, span]
        if guidance > 1:
            empty = masked()(clip, times, UNCOND)[:, span]
            v = empty + guidance * (v - empty)
        return np.asarray(v)

    if image is not None:
        begin = 1
        t = solver.times(0)[-2] if plan.noisy_context and plan.context_start == 0 else 0.0
        seen[:, :1], seen_t[:, :1] = (1 - t) * image + t * np.asarray(noise.image), t
        chunks.append(image)
    for b in range(begin, 3):
        span = spans[b]
        initial = np.asarray(noise.initial)[:, span.start - begin : span.stop - begin]
        if isinstance(solver, Few):
            m = plan.steps[min(b - begin, len(plan.steps) - 1)]
            mid = plan.times[min(b - begin, len(plan.times) - 1)]
            times = [1600 / 1601, *mid[: m - 1], 0.0]
        else:
            times = solver.times(b)
        x = initial * times[0]
        for i, (t, t_next) in enumerate(zip(times, times[1:])):
            before, v = x, velocity(x, t, span)
            if isinstance(solver, Few):
                x = (1 - t_next) * (x - t * v) + t_next * np.asarray(noise.steps)[i][:, span]
            else:
                x = x - (t - t_next) * v
        chunks.append(x)
        noisy = plan.noisy_context and b >= plan.context_start
        seen[:, span], seen_t[:, span] = (before, times[-2]) if noisy else (x, 0.0)
    return np.concatenate(chunks, 1)


TWO_STEP = {"steps": (3, 2), "times": (MID_TIMES, (5 / 8,))}
CASES = {
    "few steps": (Few(), {}),
    "a schedule per chunk": (Few(StepPlan(**TWO_STEP)), {}),
    "noisy context": (Few(StepPlan(**TWO_STEP, noisy_context=True, context_start=1)), {}),
    "one step after the first chunk": (Few(StepPlan((2, 1), ((5 / 6,), ()), noisy_context=True)), {}),
    "Euler": (Ode(steps=3), {}),
    "Euler with guidance": (Ode(steps=3), {"guidance": 3.0}),
    "guidance and noisy context": (Ode(steps=3, plan=StepPlan(noisy_context=True)), {"guidance": 2.0}),
    "image": (Few(StepPlan(**TWO_STEP)), {"image": True}),
    "image, noisy context from chunk 0": (Few(StepPlan(**TWO_STEP, noisy_context=True)), {"image": True}),
    "image, noisy context from chunk 1": (
        Few(StepPlan(**TWO_STEP, noisy_context=True, context_start=1)),
        {"image": True},
    ),
}


def options(case):
    solver, extra = CASES[case]
    image = tiny.latents(11, 2, 1) if extra.get("image") else None
    noise = draw_noise(jax.random.key(3), SHAPE, 4, image is not None)
    return solver, extra.get("guidance", 1.0), image, noise


def fast(solver, guidance, image, noise):
    return generate(
        NETWORK, PARAMS, COND, None, shape=SHAPE, chunks=PATTERN, solver=solver, uncond=UNCOND, guidance=guidance,
        image=image, noise=noise,
    )  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_streaming_is_the_specification(case):
    """Cache, schedules, re-noising, guidance, context and image, all at once."""
    solver, guidance, image, noise = options(case)
    assert tiny.relative(fast(solver, guidance, image, noise), slow(noise, solver, guidance, image)) < CLOSE


@pytest.mark.parametrize("plan", [StepPlan((2,), ((0.6,),)), StepPlan((2,), ((0.6,),), True, 1)])
def test_layers_apart_stream_the_same(plan):
    """Weights and caches as one tree a layer, written out in the program; the layers differ, so that order matters."""
    clips = []
    together = tiny.wan(PATTERN)
    apart, stacked = WanTransformer(together.config, PATTERN, apart=True), tiny.parameters(together)
    for network, params in ((together, stacked), (apart, unstacked(stacked))):
        assert jax.tree.structure(params) == jax.tree.structure(jax.eval_shape(network.init, jax.random.key(0)))
        case = {"shape": SHAPE, "chunks": PATTERN, "solver": Few(plan), "uncond": UNCOND, "guidance": 3.0}
        clips.append(generate(network, params, COND, jax.random.key(0), **case))
    assert tiny.relative(*clips) < CLOSE


def test_the_cases_differ():
    """Power: noisy context, its start, and guidance each change the clip by far more than the tolerance."""
    results = {}
    for case in ("a schedule per chunk", "noisy context", "Euler", "Euler with guidance", "image"):
        results[case] = np.asarray(fast(*options(case)))[:, 1:]
    for case in ("image, noisy context from chunk 0", "image, noisy context from chunk 1"):
        results[case] = np.asarray(fast(*options(case)))[:, 1:]
    names = list(results)
    for i, a in enumerate(names):
        for b in names[:i]:
            assert tiny.relative(results[a], results[b]) > 100 * CLOSE, (a, b)


def test_chunks_arrive_one_by_one():
    """A generator: the first chunk needs nothing of the second, and shapes follow the pattern."""
    calls = []

    class Counting(type(NETWORK)):
        def append(self, *args, **kwargs):
            calls.append(kwargs["chunk"])
            return super().append(*args, **kwargs)

        __hash__ = object.__hash__

    solver = Few(StepPlan((1,), ((),)))
    chunks = stream(
        Counting(NETWORK.config, PATTERN), PARAMS, COND, jax.random.key(0), shape=SHAPE, chunks=PATTERN, solver=solver
    )
    assert not calls, "nothing happens before the first chunk is asked for"
    first = next(chunks)
    # Tracing counts: one program for the first chunk's length; the second length has not been compiled yet.
    assert first.shape[1] == 1 and len(calls) == 1
    rest = list(chunks)
    assert [c.shape[1] for c in rest] == [2, 2] and len(calls) == 2
    same = generate(NETWORK, PARAMS, COND, jax.random.key(0), shape=SHAPE, chunks=PATTERN, solver=solver)
    assert tiny.relative(jnp.concatenate([first, *rest], 1), same) < 1e-6


def test_a_key_fixes_the_clip():
    """More steps do not change earlier draws; a given noise and its key are the same; another key is another clip."""
    four, six = (draw_noise(jax.random.key(2), SHAPE, n) for n in (4, 6))
    np.testing.assert_array_equal(four.initial, six.initial)
    np.testing.assert_array_equal(four.steps, six.steps[:4])
    assert len(np.unique(np.concatenate([np.asarray(four.initial)[None], np.asarray(six.steps)]).ravel())) > 0.99 * (
        7 * np.prod(SHAPE)
    )
    case = {"shape": SHAPE, "chunks": PATTERN, "solver": Few(StepPlan(**TWO_STEP))}
    a = generate(NETWORK, PARAMS, COND, jax.random.key(2), **case)
    b = generate(NETWORK, PARAMS, COND, None, noise=draw_noise(jax.random.key(2), SHAPE, 4), **case)
    np.testing.assert_array_equal(a, b)
    c = generate(NETWORK, PARAMS, COND, jax.random.key(4), **case)
    assert tiny.relative(c, a) > 0.1
    assert draw_noise(jax.random.key(2), SHAPE, 1, image=True).initial.shape[1] == FRAMES - 1


def test_impossible_clips_are_refused():
    """By the first chunk at the latest, in one sentence."""

    def first(chunks=PATTERN, shape=SHAPE, **extra):
        return next(stream(NETWORK, PARAMS, COND, jax.random.key(0), shape=shape, chunks=chunks, solver=Few(), **extra))

    with pytest.raises(ValueError, match="4 latent frames do not split"):
        first(shape=(2, 4, *SHAPE[2:]))
    with pytest.raises(ValueError, match="image-to-video needs a first chunk of one frame, not 3"):
        first(chunks=ChunkPattern(3, 2), image=tiny.latents(1, 2, 1))
    with pytest.raises(ValueError, match="never increase"):
        Few(StepPlan((1, 2)))
    with pytest.raises(ValueError, match="4 steps need 3 intermediate times"):
        Few(StepPlan((4,), ((0.5,),)))
