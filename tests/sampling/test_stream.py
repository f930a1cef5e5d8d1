"""The streaming sampler against a second, slow one: whole clips under the causal mask, Python loops, no cache."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from crcm_jax.chunks import ChunkPattern
from crcm_jax.models.bound import Bound
from crcm_jax.models.core.stack import listed
from crcm_jax.models.wan.transformer import WanTransformer
from crcm_jax.sampling import ContextRule, Few, Noise, Ode, Schedule, Session, draw_noise, fork, generate, stream
from crcm_jax.sampling.schedule import MID_TIMES

PATTERN, FRAMES = ChunkPattern(1, 2), 5
SHAPE = (2, FRAMES, tiny.HEIGHT, tiny.WIDTH, tiny.CHANNELS)
NETWORK = tiny.wan(PATTERN, layers=1)
MODEL = Bound(NETWORK, tiny.parameters(NETWORK))
COND, UNCOND = tiny.condition(), tiny.condition(8)
CLOSE = 1e-5
"""float32 through a dozen forwards of a network of gain about one; measured 4e-7."""


@functools.cache
def masked():
    """Velocity of a whole clip under the causal mask, times per frame; compiled once for all tests."""
    return tiny.jit(MODEL.velocity)


def slow(noise: Noise, solver, guidance=1.0, image=None):
    """The loops of spec causal_rcm 6.2, 6.3, 6.5. Later frames are nonsense: the mask must hide them."""
    seen, seen_t = np.full(SHAPE, 50.0, np.float32), np.zeros((2, FRAMES), np.float32)
    rule, chunks, begin = solver.context, [], 0
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
        t = solver.times(0)[-2] if rule.noisy and rule.start == 0 else 0.0
        seen[:, :1], seen_t[:, :1] = (1 - t) * image + t * np.asarray(noise.image), t
        chunks.append(image)
    for b in range(begin, 3):
        span = spans[b]
        initial = np.asarray(noise.initial)[:, span.start - begin : span.stop - begin]
        if isinstance(solver, Few):
            steps, mids = solver.schedule.steps, solver.schedule.mid
            m, mid = steps[min(b - begin, len(steps) - 1)], mids[min(b - begin, len(mids) - 1)]
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
        noisy = rule.noisy and b >= rule.start
        seen[:, span], seen_t[:, span] = (before, times[-2]) if noisy else (x, 0.0)
    return np.concatenate(chunks, 1)


TWO_STEP = Schedule((3, 2), (MID_TIMES, (5 / 8,)))
NOISY, LATER = ContextRule(noisy=True), ContextRule(noisy=True, start=1)
CASES = {
    "few steps": (Few(), {}),
    "a schedule per chunk": (Few(TWO_STEP), {}),
    "noisy context": (Few(TWO_STEP, LATER), {}),
    "one step after the first chunk": (Few(Schedule((2, 1), ((5 / 6,), ())), NOISY), {}),
    "Euler": (Ode(steps=3), {}),
    "Euler with guidance": (Ode(steps=3), {"guidance": 3.0}),
    "guidance and noisy context": (Ode(steps=3, context=NOISY), {"guidance": 2.0}),
    "image": (Few(TWO_STEP), {"image": True}),
    "image, noisy context from chunk 0": (Few(TWO_STEP, NOISY), {"image": True}),
    "image, noisy context from chunk 1": (
        Few(TWO_STEP, LATER),
        {"image": True},
    ),
}


def options(case):
    solver, extra = CASES[case]
    image = tiny.latents(11, 2, 1) if extra.get("image") else None
    noise = draw_noise(jax.random.key(3), SHAPE, 4, int(image is not None))
    return solver, extra.get("guidance", 1.0), image, noise


def fast(solver, guidance, image, noise):
    return generate(MODEL, COND, shape=SHAPE, solver=solver, uncond=UNCOND, guidance=guidance, first=image, noise=noise)


@pytest.mark.parametrize("case", CASES)
def test_streaming_is_the_specification(case):
    """Cache, schedules, re-noising, guidance, context and image, all at once."""
    solver, guidance, image, noise = options(case)
    assert tiny.relative(fast(solver, guidance, image, noise), slow(noise, solver, guidance, image)) < CLOSE


@pytest.mark.parametrize("context", [ContextRule(), LATER])
def test_unrolled_layers_stream_the_same(context):
    """Weights and caches as one tree a layer, written out in the program; the layers differ, so that order matters."""
    scanned = tiny.wan(PATTERN)
    unrolled, params = WanTransformer(scanned.config, PATTERN, unrolled=True), tiny.parameters(scanned)
    case = {"shape": SHAPE, "solver": Few(Schedule((2,), ((0.6,),)), context), "uncond": UNCOND, "guidance": 3.0}
    clips = []
    for network, own in ((scanned, params), (unrolled, {**params, "blocks": listed(params["blocks"])})):
        assert jax.tree.structure(own) == jax.tree.structure(jax.eval_shape(network.init, jax.random.key(0)))
        clips.append(generate(Bound(network, own), COND, jax.random.key(0), **case))
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


def test_chunks_arrive_one_by_one(monkeypatch):
    """A generator: the first chunk needs nothing of the second, and shapes follow the pattern."""
    calls, write = [], type(NETWORK).write

    def counting(self, *arguments):
        calls.append(arguments[-1])
        return write(self, *arguments)

    monkeypatch.setattr(type(NETWORK), "write", counting)
    case = {"shape": SHAPE, "solver": Few(Schedule((1,), ((),)), ContextRule(noisy=True, start=7))}
    chunks = stream(MODEL, COND, jax.random.key(0), **case)
    assert not calls, "nothing happens before the first chunk is asked for"
    first = next(chunks)
    # Tracing counts: one program for the first chunk's length; the second length has not been compiled yet.
    assert first.shape[1] == 1 and len(calls) == 1
    rest = list(chunks)
    assert [c.shape[1] for c in rest] == [2, 2] and len(calls) == 2
    same = generate(MODEL, COND, jax.random.key(0), **case)
    assert tiny.relative(jnp.concatenate([first, *rest], 1), same) < 1e-6


def test_a_key_fixes_the_clip():
    """More steps do not change earlier draws; a key gives the same clip again; another key is another clip."""
    four, six = (draw_noise(jax.random.key(2), SHAPE, n) for n in (4, 6))
    np.testing.assert_array_equal(four.initial, six.initial)
    np.testing.assert_array_equal(four.steps, six.steps[:4])
    assert len(np.unique(np.concatenate([np.asarray(four.initial)[None], np.asarray(six.steps)]).ravel())) > 0.99 * (
        7 * np.prod(SHAPE)
    )
    case = {"shape": SHAPE, "solver": Few(TWO_STEP)}
    a, b, c = (generate(MODEL, COND, jax.random.key(seed), **case) for seed in (2, 2, 4))
    np.testing.assert_array_equal(a, b)
    assert tiny.relative(c, a) > 0.1
    assert draw_noise(jax.random.key(2), SHAPE, 1, given=1).initial.shape[1] == FRAMES - 1


def test_a_session_draws_each_chunk_from_its_number():
    """A longer stream begins as a shorter one does, and a fork goes on as its original."""
    longer = (2, FRAMES + 2, *SHAPE[2:])
    solver = Few(TWO_STEP)
    short, long = (generate(MODEL, COND, jax.random.key(1), shape=s, solver=solver) for s in (SHAPE, longer))
    assert tiny.relative(long[:, :FRAMES], short) < CLOSE
    session = Session(NETWORK, solver, 2, SHAPE[2:], FRAMES)
    state = session.start(MODEL.params, COND, jax.random.key(1))
    first, state = session.step(MODEL.params, state)
    other = fork(state)
    ways = []
    for way in (state, other):
        second, way = session.step(MODEL.params, way)
        third, way = session.step(MODEL.params, way)
        ways.append(jnp.concatenate([first, second, third], 1))
    np.testing.assert_array_equal(*ways)
    assert tiny.relative(ways[0], short) < CLOSE


def test_a_session_hears_another_prompt_and_cuts():
    """What follows a switch differs, what came before does not; a cut forgets, and draws on."""
    session = Session(NETWORK, Few(TWO_STEP), 2, SHAPE[2:], FRAMES)
    stay = session.start(MODEL.params, COND, jax.random.key(1))
    first, stay = session.step(MODEL.params, stay)
    switched, cut = session.switch(MODEL.params, fork(stay), UNCOND), session.cut(MODEL.params, stay)
    assert cut.chunk == 0 and cut.count == 1
    same, _ = session.step(MODEL.params, stay)
    other, _ = session.step(MODEL.params, switched)
    assert tiny.relative(other, same) > 1e-3
    scene, cut = session.step(MODEL.params, cut)
    assert scene.shape == first.shape and tiny.relative(scene, first) > 0.1, "another draw"
    for _ in range(2):
        _, cut = session.step(MODEL.params, cut)
    with pytest.raises(ValueError, match="the session is at its end: its cache holds 3 chunks"):
        session.step(MODEL.params, cut)
    cut = session.cut(MODEL.params, session.start(MODEL.params, COND, jax.random.key(1), first=first))
    assert (cut.chunk, cut.given, cut.count) == (0, 0, 1), "what was given to one scene is not given to the next"


def test_a_guided_session_hears_another_negative_prompt():
    """Branches are switched together: to the same prompts nothing changes, to another negative one the clip does."""
    session = Session(NETWORK, Ode(steps=1), 2, SHAPE[2:], FRAMES, guidance=3.0)
    state = session.start(MODEL.params, COND, jax.random.key(1), uncond=UNCOND)
    prompts = {"same": (COND, UNCOND), "negative": (COND, tiny.condition(9))}
    found = {"stay": session.step(MODEL.params, fork(state))[0]}
    for name, pair in prompts.items():
        found[name], _ = session.step(MODEL.params, session.switch(MODEL.params, fork(state), *pair))
    np.testing.assert_array_equal(found["same"], found["stay"])
    assert tiny.relative(found["negative"], found["stay"]) > 1e-3
    with pytest.raises(ValueError, match="another negative prompt than the session began with"):
        session.switch(MODEL.params, state, COND)


def test_prompts_of_two_lengths_are_two_passes():
    """A negative prompt of another length gives what the formula says, with a cache a branch."""
    longer = tiny.condition(8, tokens=9)
    case = {"shape": SHAPE, "solver": Ode(steps=2), "guidance": 2.5, "noise": draw_noise(jax.random.key(3), SHAPE, 0)}
    found = generate(MODEL, COND, uncond=longer, **case)
    assert tiny.relative(found, generate(MODEL, COND, uncond=UNCOND, **case)) > 1e-2
    same_twice = longer.replace(prompt={"text": np.concatenate([UNCOND.prompt["text"]] * 2, 1)})
    # Every key twice leaves a softmax as it is.
    assert (
        tiny.relative(generate(MODEL, COND, uncond=same_twice, **case), generate(MODEL, COND, uncond=UNCOND, **case))
        < CLOSE
    )


def test_frames_follow_their_chunk():
    """Extra channels a frame: a stream is its masked forward, and a clip without them is refused."""
    network = tiny.wan(PATTERN, in_channels=tiny.CHANNELS + 2)
    model = Bound(network, tiny.parameters(network))
    extra = tiny.normal(4, 2, FRAMES, tiny.HEIGHT, tiny.WIDTH, 2)
    cond = COND.replace(frames={"latents": extra})
    noise = draw_noise(jax.random.key(3), SHAPE, 1)
    case = {"shape": SHAPE, "solver": Few(Schedule((1,), ((),)), ContextRule(noisy=True)), "noise": noise}
    found = generate(model, cond, **case)
    # One step and noisy context: every chunk sees the noise of those before it, as a masked forward at that time does.
    t = 1600 / 1601
    x = noise.initial * np.float32(t)
    v = tiny.jit(model.velocity)(x, np.full((1, FRAMES), t, np.float32), cond)
    assert tiny.relative(found, x - np.float32(t) * v) < CLOSE
    # A clip that is given its own first chunk goes on as it did, each chunk with its own frames.
    one = {"shape": SHAPE, "solver": Few(Schedule((1,), ((),)))}
    alone = generate(model, cond, **one, noise=noise)
    rest = noise._replace(initial=noise.initial[:, 1:])
    assert tiny.relative(generate(model, cond, **one, noise=rest, first=alone[:, :1]), alone) < CLOSE
    shuffled = COND.replace(frames={"latents": extra[:, ::-1]})
    assert tiny.relative(generate(model, shuffled, **case), found) > 1e-2
    with pytest.raises(ValueError, match=r"wants 2 extra channels a frame: give Condition\.frames\['latents'\]"):
        generate(model, COND, **case)


def test_impossible_clips_are_refused():
    """By the first chunk at the latest, in one sentence."""

    def first(model=MODEL, shape=SHAPE, **extra):
        return next(stream(model, COND, jax.random.key(0), shape=shape, solver=Few(), **extra))

    with pytest.raises(ValueError, match="4 latent frames do not split"):
        first(shape=(2, 4, *SHAPE[2:]))
    with pytest.raises(ValueError, match="2 given frames are no whole chunks"):
        first(first=tiny.latents(1, 2, 2))
    with pytest.raises(ValueError, match="a bidirectional network cannot stream"):
        first(Bound(tiny.wan(None, layers=1), MODEL.params))
    with pytest.raises(ValueError, match="another model's"):
        next(stream(MODEL, COND.replace(prompt={"tokens": 1}), jax.random.key(0), shape=SHAPE, solver=Few()))
    with pytest.raises(ValueError, match="never increase"):
        Few(Schedule((1, 2)))
    with pytest.raises(ValueError, match="4 steps need 3 intermediate times"):
        Few(Schedule((4,), ((0.5,),)))
