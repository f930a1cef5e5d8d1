"""A checkpoint, through the command line, to the JSON of its scores; and the noise that models share."""

import functools
import json

import jax
import numpy as np
import pytest

from configs.digits import get_config
from crcm_jax import recipes
from crcm_jax.__main__ import dispatch
from crcm_jax.errors import UsageError, UserError
from crcm_jax.evaluate import producer, run
from crcm_jax.sampling import Ode
from crcm_jax.saving.weights import save_params
from crcm_jax.train.identity import as_json


def tiny(variant="sf_dmd"):
    c = get_config(variant)
    c.model.update(dict(dim=16, ffn_dim=16, heads=2, layers=1))
    return c


def random_params(config):
    """Weights without zeros: a fresh network's head is zero, and its clips would depend on nothing but their noise."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(recipes.student(config).init, jax.random.key(0))
    return jax.tree.map(lambda x: jax.numpy.asarray(rng.normal(0, 0.2, x.shape), x.dtype), shapes)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    config = tiny()
    path = tmp_path_factory.mktemp("runs") / "student.safetensors"
    meta = dict(training=config.training, model=as_json(config.model), config=as_json(config), iteration=7)
    save_params(path, random_params(config), meta)
    return path


def test_seed_is_all_of_a_clips_noise():
    a = producer.clip_noise([3, 5, 9], (4, 2, 2, 1), 3)
    b = producer.clip_noise([5], (4, 2, 2, 1), 1)
    assert a.initial.shape == (3, 4, 2, 2, 1) and a.steps.shape == (3, 3, 4, 2, 2, 1)
    np.testing.assert_array_equal(a.initial[1], b.initial[0])  # whoever it is made with, and for however many steps
    np.testing.assert_array_equal(a.steps[0, 1], b.steps[0, 0])
    for x, y in ((a.initial[0], a.initial[1]), (a.initial, a.steps[0]), (a.steps[0], a.steps[1])):
        assert np.abs(x - y).max() > 0.1


def test_clips_depend_on_prompt_seed_steps_and_nothing_else(checkpoint):
    config, params, _ = producer.load(checkpoint)
    produce = producer.producer(config, params, producer.few_step_solver(config, (2,)))
    prompts = ["a three moves up", "a three moves up", "a seven moves left"]
    clips = produce(prompts, [0, 1, 0])
    assert clips.shape == (3, 9, 16, 16, 1) and np.abs(clips).max() <= 1
    np.testing.assert_allclose(produce(prompts[::-1], [0, 1, 0]), clips[::-1], atol=1e-5)
    other = producer.producer(config, params, producer.few_step_solver(config, (1,)))(prompts, [0, 1, 0])
    for a, b in ((clips[0], clips[1]), (clips[0], clips[2]), (clips, other)):
        assert np.abs(a - b).max() > 1e-3


def test_guidance_and_the_empty_prompt_reach_the_sampler(checkpoint, monkeypatch):
    config, params, _ = producer.load(checkpoint)
    given = {}

    def generate(model, cond, **options):
        given.update(options, model=model)
        return jax.numpy.full(options["shape"], 9.0)

    monkeypatch.setattr(producer, "generate", generate)
    clips = producer.producer(config, params, Ode(2), guidance=4.0)(["a one moves up"], [0])
    assert given["guidance"] == 4.0 and given["solver"] == Ode(2)
    assert given["model"].network.chunks.size == 1 and given["model"].params is params
    text = given["uncond"].prompt["text"]
    assert text.shape == (1, 12, 32) and not text.any()
    assert (clips == 1).all()  # and what comes out of range is clipped


def test_schedules_come_from_the_command_or_the_run():
    config = tiny()
    assert producer.few_step_solver(config, (3,)).schedule.times(0) == (1.0, 15 / 16, 5 / 6)
    assert producer.few_step_solver(config, (2, 1), (0.5,)).schedule.times(0) == (1.0, 0.5)
    for steps, mid, message in (
        ((2, 4), None, "never increase"),
        ((3,), (0.5,), "intermediate"),
        ((0,), None, "least 1"),
    ):
        with pytest.raises(UserError, match=message):
            producer.few_step_solver(config, steps, mid)


def test_command_writes_the_scores(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "train", functools.partial(run.train, steps=5))  # the judge's training is tested elsewhere
    out = tmp_path / "deep" / "metrics.json"
    words = [f"--checkpoint={checkpoint}", "--steps=2", "--clips=20", "--batch=3", f"--out={out}"]
    assert dispatch(["evaluate", *words]) == 0
    scores = json.loads(out.read_text())
    assert scores["training"] == "sf_dmd" and scores["iteration"] == 7 and scores["steps"] == [2]
    assert {"class_accuracy", "motion_error", "frechet", "diversity", "frames_per_second"} <= scores.keys()
    assert scores["class_accuracy"] < 0.4  # the network is noise
    assert "class_accuracy" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "--checkpoint"),
        (["--checkpoint=x"], "--steps --ode is required"),
        (["--checkpoint=x", "--steps=2", "--ode=3"], "not allowed with"),
        (["--checkpoint=x", "--steps=two"], "not a list of numbers"),
        (["--checkpoint=x", "--ode=3", "--mid=0.5"], "--mid belongs to --steps"),
        (["--checkpoint=x", "--steps=2", "--clips=0"], "--clips=0"),
        (["--checkpoint=x", "--steps=2", "--clip=8"], "unrecognized"),
    ],
)
def test_wrong_command_lines_are_answered_at_once(arguments, message):
    with pytest.raises(UsageError, match=message):
        dispatch(["evaluate", *arguments])


def test_wrong_checkpoints_are_named(checkpoint, tmp_path):
    with pytest.raises(UserError, match="no checkpoint at"):
        dispatch(["evaluate", f"--checkpoint={tmp_path}/none", "--steps=2"])
    with pytest.raises(UserError, match="never increase"):
        dispatch(["evaluate", f"--checkpoint={checkpoint}", "--steps=2,4"])
    config = tiny("bidirectional")
    save_params(tmp_path / "b.safetensors", random_params(config), dict(config=as_json(config)))
    with pytest.raises(UserError, match="bidirectional and cannot stream"):
        producer.load(tmp_path / "b.safetensors")
    config = tiny()
    params = random_params(config)
    config.model.ffn_dim = 24  # says one thing and holds another
    save_params(tmp_path / "c.safetensors", params, dict(training="sf_dmd", config=as_json(config)))
    with pytest.raises(UserError, match="another architecture"):
        producer.load(tmp_path / "c.safetensors")
    save_params(tmp_path / "d.safetensors", params, {})
    with pytest.raises(UserError, match="does not say how it was configured"):
        producer.load(tmp_path / "d.safetensors")


def test_help_has_an_example(capsys):
    with pytest.raises(SystemExit) as stop:
        dispatch(["evaluate", "--help"])
    assert stop.value.code == 0 and "crcm evaluate --checkpoint=" in capsys.readouterr().out
