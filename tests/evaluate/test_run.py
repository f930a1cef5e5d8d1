"""The whole evaluation: real clips score near-perfectly, each way of being wrong shows in its own number."""

import json

import numpy as np
import pytest
from ml_collections import ConfigDict

from crcm_jax.data import digits
from crcm_jax.errors import UserError
from crcm_jax.evaluate import classifier, run


@pytest.fixture(scope="module")
def real(config):
    return run.real_clips(config)


@pytest.fixture(scope="module")
def scores(judge, real):
    """The scores of real clips, and of real clips that something has been done to."""
    noise = np.random.default_rng(0)
    ways = dict(
        real=real,
        still=lambda prompts, seeds: np.repeat(real(prompts, seeds)[:, :1], 9, axis=1),
        backwards=lambda prompts, seeds: real([turned(p) for p in prompts], seeds),
        relabelled=lambda prompts, seeds: real([relabelled(p) for p in prompts], seeds),
        noise=lambda prompts, seeds: noise.uniform(-1, 1, (len(prompts), 9, 16, 16, 1)),
        black=lambda prompts, seeds: np.full((len(prompts), 9, 16, 16, 1), -1.0),
        one_clip=lambda prompts, seeds: real(prompts, [0] * len(seeds)),
    )
    return {name: run.evaluate(produce, judge, batch=40) for name, produce in ways.items()}


def turned(prompt):
    swap = dict(up="down", down="up", left="right", right="left")
    return " ".join(swap.get(word, word) for word in prompt.split())


def relabelled(prompt):
    ((label, direction),) = digits.parse_prompt(prompt)
    return digits.prompt_of([(label + 1) % 10], [direction])


def test_classifier_knows_heldout_digits_anywhere(judge, config):
    source = digits.DigitsSource(config.data, "heldout")
    clips = [source[i] for i in range(400)]
    logits, _ = judge.classifier(np.stack([clip["video"] for clip in clips]))
    labels = np.array([clip["labels"] for clip in clips])
    assert (logits.mean(1).argmax(-1) == labels[:, 0]).mean() >= 0.97  # of clips
    assert (logits.argmax(-1) == labels).mean() >= 0.97  # of frames


def test_training_the_classifier_is_deterministic(config):
    a, b = (classifier.train(config.data, steps=3, batch=16) for _ in range(2))
    frames = np.random.default_rng(0).uniform(-1, 1, (2, 3, 16, 16, 1))
    for x, y in zip(a(frames), b(frames)):
        np.testing.assert_array_equal(x, y)


def test_real_clips_score_near_perfectly(scores):
    real = scores["real"]
    assert real["class_accuracy"] >= 0.97 and real["direction_accuracy"] >= 0.97 and real["bounce_accuracy"] >= 0.97
    assert real["motion_error"] < 0.1 and abs(real["diversity"] - 1) < 0.15
    assert real["frechet"] < 1 and real["frechet_time"] < 1.5  # what 120 clips differ from others by
    assert real["broken_clips"] == 0 and real["frames_per_second"] > 0 and real["clips"] == 120


def test_a_still_video_fails_in_motion_only(scores):
    still = scores["still"]
    assert still["class_accuracy"] >= 0.95 and still["bounce_accuracy"] < 0.1 and still["direction_accuracy"] < 0.3
    assert still["motion_error"] > 1 and still["frechet_time"] > 10 * scores["real"]["frechet_time"]


def test_the_wrong_way_fails_in_direction_only(scores):
    backwards = scores["backwards"]
    assert backwards["direction_accuracy"] < 0.05 and backwards["motion_error"] > 1
    assert backwards["class_accuracy"] >= 0.95 and backwards["frechet"] < 1


def test_the_wrong_digit_fails_in_class_only(scores):
    wrong = scores["relabelled"]
    assert wrong["class_accuracy"] < 0.05 and wrong["motion_error"] < 0.1 and wrong["direction_accuracy"] >= 0.97


@pytest.mark.parametrize("way", ["noise", "black"])
def test_rubbish_fails_everywhere(scores, way):
    rubbish = scores[way]
    assert rubbish["class_accuracy"] < 0.35 and rubbish["direction_accuracy"] < 0.35
    assert rubbish["bounce_accuracy"] < 0.1 and rubbish["frechet"] > 10
    assert rubbish["broken_clips"] == 0
    json.dumps(rubbish, allow_nan=False)


def test_clips_that_are_not_finite_are_told(judge, real):
    """A few are judged as black ones and counted; where all are, there is nothing to judge."""

    def some(prompts, seeds):
        clips = np.array(real(prompts, seeds))
        clips[np.asarray(seeds) < 3, 4] = np.nan
        return clips

    scores = run.evaluate(some, judge, batch=40)
    assert scores["broken_clips"] == sum(seed < 3 for seed in judge.seeds) > 0
    json.dumps(scores, allow_nan=False)
    with pytest.raises(UserError, match="120 of 120 clips hold values that are not finite"):
        run.evaluate(lambda prompts, seeds: np.full((len(prompts), 9, 16, 16, 1), np.nan), judge, batch=40)


def test_one_clip_for_all_noises_has_no_diversity(scores):
    assert scores["one_clip"]["diversity"] < 0.05


def test_every_clip_is_asked_for_once_with_its_own_seed_in_equal_batches(judge, real):
    asked = []

    def produce(prompts, seeds):
        asked.append(list(zip(prompts, seeds)))
        return real(prompts, seeds)

    told = []
    run.evaluate(produce, judge, batch=50, progress=lambda done, every: told.append((done, every)))
    assert [len(batch) for batch in asked] == [50, 50, 50]  # one size: one compilation
    flat = [pair for batch in asked for pair in batch]
    assert flat[:120] == list(zip(judge.prompts, judge.seeds)) and len({seed for _, seed in flat[:120]}) == 120
    assert told == [(50, 120), (100, 120), (120, 120)]
    assert judge.prompts[0] == judge.prompts[1]  # two noises of one prompt


def test_prompts_are_the_heldout_splits(config, judge):
    source = digits.DigitsSource(config.data, "heldout")
    assert list(judge.prompts[::2]) == [source[i]["prompt"] for i in range(60)] == run.heldout_prompts(config, 60)


def test_several_digits_in_two_frames_are_judged_as_far_as_they_can_be():
    data = digits.default_config()
    data.update(dict(digits=2, height=24, width=24, frames=2))
    c = ConfigDict(dict(data=data))
    tiny = classifier.train(data, steps=2, batch=8)
    prompts = tuple(run.heldout_prompts(c, 6))
    features = tiny(run.real_clips(c)(prompts, range(6)))[1]
    judge = run.Judge(prompts, tuple(range(6)), tiny, run.motion_law(data), prompts, features)
    scores = run.evaluate(run.real_clips(c), judge, batch=3)
    assert scores["motion_error"] is None and scores["frechet_time"] is None and scores["clips"] == 6
    json.dumps(scores, allow_nan=False)


def test_mistakes_are_named(config, judge):
    with pytest.raises(UserError, match="multiple of 3"):
        run.judge(config, clips=200, seeds=3)
    with pytest.raises(UserError, match=r"clips of shape \(40, 8, 16, 16, 1\)"):
        run.evaluate(lambda prompts, seeds: np.zeros((len(prompts), 8, 16, 16, 1)), judge, batch=40)
    with pytest.raises(UserError, match=r'data\.name is "tfds"'):
        classifier.train(ConfigDict(dict(name="tfds")))


def test_json_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "folder" / "metrics.json"
    run.write_json(path, dict(a=1))
    with pytest.raises(ValueError):
        run.write_json(path, dict(a=float("nan")))
    assert json.loads(path.read_text()) == dict(a=1)
    assert [p.name for p in path.parent.iterdir()] == ["metrics.json"]
