"""Moving digits: the splits, the bounce law, the drawing, and the prompts that tell the truth about them."""

import numpy as np
import pytest
from sklearn.datasets import load_digits

from crcm_jax.data import digits
from crcm_jax.data.digits import DigitsSource
from crcm_jax.errors import UserError


def config(**changes):
    c = digits.default_config()
    c.update(changes)
    return c


def centroid(video):
    """Intensity centroid (y, x) of every frame, pixels, of a video in [−1, 1]."""
    mass = (video[..., 0].astype(np.float64) + 1) / 2
    total = mass.sum((1, 2))
    y = (mass.sum(2) * (np.arange(mass.shape[1]) + 0.5)).sum(1) / total
    x = (mass.sum(1) * (np.arange(mass.shape[2]) + 0.5)).sum(1) / total
    return np.stack([y, x], -1)


def test_splits_share_no_image_and_hold_every_class():
    (train, train_labels), (heldout, heldout_labels) = digits.load_images("train"), digits.load_images("heldout")
    assert len(train) + len(heldout) == 1797
    np.testing.assert_allclose(len(heldout) / 1797, 0.2, atol=0.005)
    together = np.concatenate([train, heldout]).reshape(1797, 64) * 16
    everything = load_digits().data
    np.testing.assert_array_equal(np.unique(together, axis=0), np.unique(everything, axis=0))
    assert not {image.tobytes() for image in train} & {image.tobytes() for image in heldout}
    share = np.bincount(heldout_labels, minlength=10) / np.bincount(
        np.concatenate([train_labels, heldout_labels]), minlength=10
    )
    np.testing.assert_allclose(share, 0.2, atol=0.01)
    with pytest.raises(ValueError):
        train[0, 0, 0] = 1  # shared by every clip


def test_a_clip_is_a_function_of_seed_split_and_index():
    first, again = DigitsSource(config(seed=3)), DigitsSource(config(seed=3))
    again[17]  # what was asked before must not matter
    for i in (0, 5, 999_999):
        a, b = first[i], again[i]
        assert a["prompt"] == b["prompt"]
        np.testing.assert_array_equal(a["video"], b["video"])
    for other in (DigitsSource(config(seed=4)), DigitsSource(config(seed=3), "heldout")):
        assert not np.array_equal(first[5]["video"], other[5]["video"])
        assert not np.array_equal(first[5]["velocity"], other[5]["velocity"])
    assert not np.array_equal(first[5]["video"], first[6]["video"])
    with pytest.raises(IndexError):
        first[1_000_000]


def test_reflect_is_a_billiard():
    # Against stepping a ball in small steps and turning it round at the walls.
    low, high, steps = np.array([5.0, 5.0]), np.array([11.0, 9.0]), 1000
    for start, velocity in (([6.0, 7.0], [1.5, -0.9]), ([11.0, 5.0], [-2.7, 3.3])):
        ball, v = np.array(start), np.array(velocity)
        expected = digits.trajectory(np.array(start), np.array(velocity), 9, low, high)
        for frame in range(9):
            np.testing.assert_allclose(expected[frame], ball, atol=1e-9)
            for _ in range(steps):
                ball = ball + v / steps
                over, under = ball > high, ball < low
                ball = np.where(over, 2 * high - ball, np.where(under, 2 * low - ball, ball))
                v = np.where(over | under, -v, v)
    assert digits.reflect(np.array([3.0]), np.array([2.0]), np.array([2.0])) == 2.0  # no room: it stays


def test_motion_is_what_the_prompt_says_and_speed_is_in_range():
    c = config(speed=(1.0, 1.6), straight=2)
    source, bounces = DigitsSource(c), 0
    seen = set()
    for i in range(200):
        clip = source[i]
        ((label, direction),) = digits.parse_prompt(clip["prompt"])
        assert [label] == list(clip["labels"])
        seen.add((label, direction))
        (velocity,), centres = clip["velocity"], clip["centres"][:, 0]
        speed = np.linalg.norm(velocity)
        assert 1.0 <= speed <= 1.6
        np.testing.assert_allclose(velocity / speed, digits.DIRECTIONS[direction], atol=1e-6)
        # two frames straight ahead, then whatever the walls make of it
        np.testing.assert_allclose(np.diff(centres[:3], axis=0), [velocity, velocity], atol=1e-5)
        assert (centres >= 5 - 1e-5).all() and (centres <= 11 + 1e-5).all()
        bounces += bool((np.sign(np.diff(centres, axis=0)) * np.sign(velocity) < -0.5).any())
    assert bounces > 100  # the walls matter in this data
    assert len({label for label, _ in seen}) == 10 and len({d for _, d in seen}) == 8


def test_words_mean_what_a_viewer_sees():
    # In rows and columns of the picture, without the table that the source itself uses.
    seen = dict(up=(0, -1), down=(0, 1), left=(1, -1), right=(1, 1))
    source = DigitsSource(config())
    for i in range(60):
        clip = source[i]
        moved = np.diff(centroid(clip["video"][:3]), axis=0).mean(0)
        words = [word for word in clip["prompt"].split() if word in seen]
        for word in words:
            axis, sign = seen[word]
            assert moved[axis] * sign > 0.5
        if len(words) == 1:
            assert abs(moved[1 - seen[words[0]][0]]) < 0.15


def test_what_is_drawn_moves_as_the_centres_do():
    source = DigitsSource(config(height=32, width=32, digit_size=10.0, speed=(0.7, 1.3)))
    for i in range(20):
        clip = source[i]
        moved = centroid(clip["video"])
        offset = moved - clip["centres"][:, 0]
        # A glyph's centroid is off its box's centre by one vector in all frames, up to the kernel's lost tails.
        np.testing.assert_allclose(offset, offset.mean(0, keepdims=True).repeat(9, 0), atol=0.12)


def test_drawing_at_the_scans_own_size_and_place_is_the_scan():
    images, _ = digits.load_images("train")
    video = digits.render(images[:1], np.array([[[6.0, 5.0]]]), 12, 12, 8.0)
    np.testing.assert_allclose((video[0, 2:10, 1:9, 0] + 1) / 2, images[0], atol=1e-6)
    assert video.shape == (1, 12, 12, 1) and video.dtype == np.float32
    outside = video.copy()
    outside[0, 2:10, 1:9] = -1
    assert (outside == -1).all()


def test_a_shrunken_digit_keeps_its_brightness_wherever_it_is():
    images, _ = digits.load_images("train")
    places = np.array([[[8 + d, 8 - d]] for d in np.linspace(0, 1, 7)])
    light = ((digits.render(images[3:4], places, 16, 16, 4.0) + 1) / 2).sum((1, 2, 3))
    # Clipping the kernel's negative lobes adds a few per cent; a kernel of the unshrunk width flickers by 11 %.
    np.testing.assert_allclose(light, images[3].sum() / 4, rtol=0.08)
    assert np.ptp(light) < 0.03 * light.mean()


def test_two_digits_and_their_prompt():
    source = DigitsSource(config(digits=2, height=24, width=24))
    for i in range(30):
        clip = source[i]
        named = digits.parse_prompt(clip["prompt"])
        assert [label for label, _ in named] == list(clip["labels"])
        for (_, direction), velocity in zip(named, clip["velocity"]):
            np.testing.assert_allclose(velocity / np.linalg.norm(velocity), digits.DIRECTIONS[direction], atol=1e-6)
    assert clip["centres"].shape == (9, 2, 2)


def test_clips_of_a_prompt_fit_it_and_differ():
    source = DigitsSource(config(), "heldout")
    clips = [source.clip_of("a three moves up and left", seed) for seed in range(20)]
    assert {clip["prompt"] for clip in clips} == {"a three moves up and left"}
    assert len({clip["video"].tobytes() for clip in clips}) == 20
    np.testing.assert_array_equal(clips[3]["video"], source.clip_of("a three moves up and left", 3)["video"])
    for clip in clips:
        assert (clip["velocity"] < 0).all() and list(clip["labels"]) == [3]


def test_prompts_round_trip_and_others_are_refused():
    assert digits.prompt_of([3, 8], ["up and left", "right"]) == "a three moves up and left and an eight moves right"
    for label in range(10):
        for direction in digits.DIRECTIONS:
            for more in ([], [(8, "down and right")]):
                named = [(label, direction), *more]
                assert digits.parse_prompt(digits.prompt_of(*zip(*named))) == named
    for bad in ("", "a cat moves up", "a three moves", "a three moves up quickly", "a eight moves up"):
        with pytest.raises(UserError, match="not a prompt"):
            digits.parse_prompt(bad)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(digit_size=20.0), "does not fit a canvas of 16×16"),
        (dict(speed=(2.0, 1.0)), "data.speed"),
        (dict(frames=0), "data.frames is 0"),
        (dict(digits=0), "data.digits is 0"),
    ],
)
def test_mistakes_are_named(changes, message):
    with pytest.raises(UserError, match=message):
        DigitsSource(config(**changes))


def test_unknown_split_is_named():
    with pytest.raises(UserError, match='no split "test"'):
        DigitsSource(config(), "test")
