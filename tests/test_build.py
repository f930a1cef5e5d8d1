"""From a config to an algorithm: every training type runs and trains every parameter."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from crcm_jax import build
from crcm_jax.configs import digits
from crcm_jax.errors import UserError
from crcm_jax.objectives.algorithm import Progress


def config(training, **sections):
    """configs/digits.py, small: three frames of 2×2 latents, one layer."""
    c = digits.get_config(training)
    c.data.update({"frames": 3, "height": 4, "width": 4, "digit_size": 4})
    c.model.update(
        {"dim": 16, "ffn_dim": 16, "heads": 2, "layers": 1, "freq_dim": 8, "text_dim": 8, "patch": (1, 2, 2)}
    )
    c.text.update({"dim": 8, "length": 3})
    c.rollout.update({"steps": (2,), "times": ((5 / 6,),)})
    for name, changes in sections.items():
        c[name].update(changes)
    return c


def players(c):
    """A batch and every tree that any training type reads, all random."""
    trees = {
        role: tiny.parameters(build.network(c, role), seed)
        for seed, role in enumerate(("student", "teacher", "real", "critic"))
    }
    frames, height, width, channels = build.codec(c).latent_shape(c.data.frames, c.data.height, c.data.width)
    batch = {"latents": tiny.normal(5, 2, frames, height, width, channels), "text": tiny.normal(6, 2, 3, c.text.dim)}
    return batch, {**trees, "uncond": tiny.normal(7, 1, 3, c.text.dim)}


def progress(iteration=0, student=0, critic=0):
    return Progress(*(jnp.asarray(n, jnp.int32) for n in (iteration, student, critic)))


WEIGHTS = jnp.array([0.5, 0.5])


def assert_trains(grad_fn, params, others, batch, at):
    (losses, metrics), grads = tiny.jit(grad_fn)(params, others, batch, jax.random.key(0), at, WEIGHTS)
    assert losses.shape == (2,) and bool(jnp.isfinite(losses).all())
    assert all(bool(jnp.isfinite(m).all()) for m in metrics.values())
    assert jax.tree.structure(grads) == jax.tree.structure(params)
    for path, g in jax.tree_util.tree_leaves_with_path(grads):
        assert bool(jnp.isfinite(g).all()) and float(jnp.abs(g).max()) > 0, jax.tree_util.keystr(path)
    return (losses, metrics), grads


@pytest.mark.parametrize("training", [t for t in build.TRAINING_TYPES if t != "tf_scm_sf_dmd"])
def test_every_training_type_trains_every_parameter(training):
    """A gradient reaches every leaf of student and critic. (The joint type sums two: see its phases.)"""
    c = config(training)
    algorithm = build.algorithm(c)
    batch, trees = players(c)
    read = {name: trees[name] for name in (*algorithm.reads, "uncond")}
    at = progress(3, 1, 1)
    # Nothing but what it says it reads, and the other player.
    others = {**read, "critic": trees["critic"]} if algorithm.critic else read
    assert_trains(algorithm.student, trees["student"], others, batch, at)
    if algorithm.critic:
        assert_trains(algorithm.critic, trees["critic"], {**read, "student": trees["student"]}, batch, at)
    assert (algorithm.critic is not None) == ("sf_dmd" in training)
    assert ("teacher" in algorithm.reads) == ("cm" in training)


def test_both_consistency_losses_are_their_sum():
    """`tf_dscm` with the randomness of its parts."""
    batch, trees = players(config("tf_dscm"))
    args = (trees["student"], {n: trees[n] for n in ("teacher", "uncond")}, batch)
    key = jax.random.key(0)

    @tiny.jit
    def all_three(at):
        run = lambda training, key: build.algorithm(config(training)).student(*args, key, at, WEIGHTS)  # noqa: E731
        parts = [run(name, jax.random.fold_in(key, i)) for i, name in enumerate(("tf_dcm", "tf_scm"))]
        return run("tf_dscm", key), parts

    ((losses, _), grads), parts = all_three(progress())
    np.testing.assert_allclose(losses, sum(part[0][0] for part in parts), rtol=1e-5)
    expected = jax.tree.map(jnp.add, parts[0][1], parts[1][1])
    largest = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(expected))
    for g, e in zip(jax.tree.leaves(grads), jax.tree.leaves(expected)):
        np.testing.assert_allclose(g, e, atol=1e-5 * largest)  # the same sums in another program, float32


def test_the_joint_type_has_phases():
    """TF-sCM alone until the warm-up ends, then both; one program for the two."""
    c = config("tf_scm_sf_dmd", objective={"warmup": 4})
    algorithm = build.algorithm(c)
    assert algorithm.student_only_iterations == 4
    batch, trees = players(c)
    others = {n: trees[n] for n in ("teacher", "real", "critic", "uncond")}
    run = tiny.jit(algorithm.student)
    before, after = (
        run(trees["student"], others, batch, jax.random.key(0), progress(i, i, 0), WEIGHTS) for i in (3, 4)
    )
    assert float(before[0][1]["dmd_norm"].max()) == 0 < float(after[0][1]["dmd_norm"].min())
    assert float(before[0][1]["warmup"]) == 0.75 and float(after[0][1]["warmup"]) == 1
    # DMD adds ‖G‖² to each sample's loss.
    extra = np.asarray(after[0][0] - after[0][1]["dmd_norm"] ** 2)
    norm = np.asarray(after[0][1]["tangent_norm"])
    np.testing.assert_allclose(extra, 100 * (norm / (norm + 0.1)) ** 2, rtol=1e-3)


def test_phases_and_counters():
    """One student update, then freq − 1 of the critic; counters as written in spec causal_rcm 4.5."""
    algorithm = build.algorithm(config("sf_dmd", dmd={"student_update_freq": 6}))
    assert algorithm.student_update_freq == 6
    for warm in (0, 4):
        a = dataclasses.replace(algorithm, student_only_iterations=warm)
        student = critic = 0
        for iteration in range(30):
            assert a.counts(iteration) == (student, critic), iteration
            expected = iteration < warm or (iteration - warm) % 6 == 0
            assert a.is_student_phase(iteration) == expected
            # eff and eff_fake of spec causal_rcm 4.5, in the phase that uses them.
            eff = iteration if iteration < warm else warm + (iteration - warm) // 6
            assert (student == eff) if expected else (critic == iteration - eff - 1)
            student, critic = student + expected, critic + (not expected)
    assert all(build.algorithm(config("tf")).is_student_phase(i) for i in range(7))


def test_roles_have_their_sizes():
    """Causal student and teacher, bidirectional scores; `sizes` overrides the model for a role."""
    c = config("sf_dmd")
    c.sizes.teacher.update({"layers": 3})
    assert build.network(c).chunks == build.chunk_pattern(c) and build.network(c, "teacher").chunks is not None
    assert build.network(c, "real").chunks is None and build.network(c, "critic").chunks is None
    assert build.network(config("bidirectional")).chunks is None
    assert build.network(c, "teacher").config.layers == 3 and build.network(c).config.layers == 1


def test_mistakes_are_named():
    """Unknown names and keys, and a pattern that does not divide, before anything is computed."""
    c = config("tf").lock()
    with pytest.raises((AttributeError, KeyError), match="lerning_rate"):
        c.optim.lerning_rate = 1.0
    c.training = "tf_xcm"
    with pytest.raises(UserError, match="'tf_xcm' is not one of bidirectional, tf,"):
        build.algorithm(c)
    with pytest.raises(ValueError, match="no variant 'sft'"):
        digits.get_config("sft")
    for section, build_part in (("codec", build.codec), ("text", build.text_encoder)):
        c = config("tf")
        c[section].name = "nothing"
        with pytest.raises(UserError, match=f"{section}.name 'nothing' is not one of"):
            build_part(c)
    c = config("tf", chunks={"first": 2, "size": 2})
    with pytest.raises(ValueError, match="3 latent frames do not split"):
        build.algorithm(c)
    c = config("tf", objective={"times": {"name": "gauss"}})
    with pytest.raises((ValueError, TypeError)):
        build.algorithm(c)
