"""Metrics against closed forms: Gaussians of known distance, tracks of known motion, spreads of known size."""

import numpy as np
import pytest

from crcm_jax.data import digits
from crcm_jax.evaluate import metrics

LAW = metrics.MotionLaw(frames=9, height=16, width=16, digit_size=10.0, speed=(1.0, 1.6), straight=2)
OPPOSITE = {name: next(n for n in digits.DIRECTIONS if np.allclose(np.array(digits.DIRECTIONS[n]), -np.array(v)))
            for name, v in digits.DIRECTIONS.items()}  # fmt: skip


def lawful(direction, seed, frames=9):
    """A track that obeys the law, start and speed drawn, seen through a constant glyph offset."""
    rng = np.random.default_rng(seed)
    low, high = digits.travel_box(16, 16, 10.0)
    velocity = rng.uniform(1.0, 1.6) * np.array(digits.DIRECTIONS[direction])
    start = rng.uniform(*digits.start_box(velocity, 2, low, high))
    return digits.trajectory(start, velocity, frames, low, high) + rng.uniform(-1.0, 1.0, 2)


@pytest.fixture(scope="module")
def lawful_tracks():
    names = [name for name in digits.DIRECTIONS for _ in range(10)]
    return np.stack([lawful(name, i) for i, name in enumerate(names)]), names


def test_frechet_of_gaussians_is_the_closed_form():
    # Samples with exactly the wanted mean and covariance, so that only the formula is on trial.
    rng = np.random.default_rng(0)
    white = rng.standard_normal((500, 3))
    white -= white.mean(0)
    white = white @ np.linalg.inv(np.linalg.cholesky(np.cov(white, rowvar=False))).T
    s, r = np.array([1.0, 2.0, 0.5]), np.array([3.0, 0.25, 0.5])
    mean = np.array([1.0, -2.0, 0.5])
    expected = (mean**2).sum() + ((s - r) ** 2).sum()
    np.testing.assert_allclose(metrics.frechet(white * s, white * r + mean), expected, rtol=1e-10)
    turn = np.linalg.qr(rng.standard_normal((3, 3)))[0]  # the distance does not depend on the axes
    np.testing.assert_allclose(metrics.frechet(white * s @ turn, (white * r + mean) @ turn), expected, rtol=1e-10)
    assert abs(metrics.frechet(white * s, white * s)) < 1e-10


def test_frechet_of_covariances_that_do_not_commute():
    # In two dimensions tr (AB)^½ = (tr AB + 2 (det AB)^½)^½.
    rng = np.random.default_rng(1)
    a, b = rng.standard_normal((400, 2)) @ [[1, 0.8], [0, 0.5]], rng.standard_normal((400, 2)) @ [[0.3, -1], [0, 1.4]]
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    product = cov_a @ cov_b
    cross = np.sqrt(np.trace(product) + 2 * np.sqrt(np.linalg.det(product)))
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * cross
    np.testing.assert_allclose(metrics.frechet(a, b), expected, rtol=1e-9)


def test_only_the_distance_over_time_sees_that_nothing_moves():
    rng = np.random.default_rng(0)
    walks = rng.standard_normal((300, 1, 4)) + np.linspace(-1, 1, 9)[:, None] * rng.choice([-2, 2], (300, 1, 4))
    frames = walks[np.arange(300), rng.integers(9, size=300)]  # a frame of each walk, held
    still = np.repeat(frames[:, None], 9, axis=1)
    assert metrics.frechet_frames(still, walks) < 0.2
    assert metrics.frechet_time(still, walks) > 1
    assert metrics.frechet_time(walks[::2], walks[1::2]) < 0.4  # what 150 clips differ from 150 others by


def test_class_accuracy_takes_the_frames_together():
    logits = np.zeros((2, 3, 10))
    logits[0, :, 4] = [3, -1, 1]  # wrong in one frame, right on the whole
    logits[0, 1, 7] = 2
    logits[1, :, 2], logits[1, :, 9] = 1.0, 0.9
    np.testing.assert_array_equal(metrics.class_correct(logits, [[4], [2]]), [True, True])
    np.testing.assert_array_equal(metrics.class_correct(logits, [[7], [9]]), [False, False])
    np.testing.assert_array_equal(metrics.class_correct(logits, [[4, 7], [9, 2]]), [True, True])
    np.testing.assert_array_equal(metrics.class_correct(logits, [[4, 1], [2, 2]]), [False, True])


def test_track_is_the_centre_of_the_light():
    videos = np.full((1, 2, 8, 10, 1), -1.0)
    videos[0, 0, 2, 3] = 1
    videos[0, 0, 5, 3] = 0.0  # half as bright, but the floor takes 0.1 of each
    np.testing.assert_allclose(metrics.track(videos)[0, 0], [(2.5 * 0.9 + 5.5 * 0.4) / 1.3, 3.5])
    np.testing.assert_allclose(metrics.track(videos)[0, 1], [4, 5])  # black
    assert np.abs(metrics.track(videos + 0.15) - metrics.track(videos)).max() < 0.2  # a grey veil is not a digit


def test_lawful_motion_is_recognised(lawful_tracks):
    tracks, names = lawful_tracks
    motion = metrics.motion(tracks, names, LAW)
    assert motion.error.max() < 0.1  # the grid's resolution
    assert motion.direction.all() and motion.bounce.all()


def test_fit_is_the_best_there_is(lawful_tracks):
    # No random start, speed and offset beats the search by more than the grid's resolution.
    rng = np.random.default_rng(5)
    tracks = lawful_tracks[0][:8] + rng.normal(0, 0.8, (8, 9, 2))
    fitted, _ = LAW.fit(tracks, "up and left")
    squared = ((fitted - tracks) ** 2).sum((1, 2))
    tried = np.stack([lawful("up and left", seed) for seed in range(3000)])
    best = ((tried[None] - tracks[:, None]) ** 2).sum((2, 3)).min(1)
    assert (squared < best + 0.05).all()


def test_wrong_motion_is_seen(lawful_tracks):
    tracks, names = lawful_tracks
    turned = metrics.motion(tracks, [OPPOSITE[name] for name in names], LAW)
    assert not turned.direction.any() and turned.error.min() > 0.5
    still = metrics.motion(np.repeat(tracks[:, :1], 9, axis=1), names, LAW)
    assert still.direction.mean() < 0.3 and still.bounce.mean() < 0.1 and still.error.min() > 0.5
    rng = np.random.default_rng(0)
    lost = metrics.motion(8 + rng.normal(0, 0.2, tracks.shape), names, LAW)
    assert lost.direction.mean() < 0.3 and lost.bounce.mean() < 0.1 and lost.error.mean() > 1


def test_a_digit_that_stops_at_the_wall_does_not_bounce():
    low, high = digits.travel_box(16, 16, 10.0)
    stopped = np.clip(np.array([8.0, 9.0]) + np.arange(9)[:, None] * np.array([0, -1.3]), low, high)
    motion = metrics.motion(stopped[None], ["left"], LAW)
    assert not motion.bounce[0] and motion.error[0] > 0.5
    bounced = digits.trajectory(np.array([8.0, 9.0]), np.array([0, -1.3]), 9, low, high)
    assert metrics.motion(bounced[None], ["left"], LAW).bounce[0]


def test_motion_error_is_in_pixels():
    # Far too fast on a long straight way: the error is the mean of what no lawful speed can make up for.
    law = metrics.MotionLaw(5, 16, 200, 10.0, speed=(1.0, 1.0), straight=0, glyph_offset=0.0)
    track = np.stack([np.full(5, 8.0), 100 + 3.0 * np.arange(5)], -1)
    # Lawful: slope 1, any start. Least squares leaves 2·(frame − 2): |−4, −2, 0, 2, 4|, mean 2.4.
    np.testing.assert_allclose(metrics.motion(track[None], ["right"], law).error, 2.4, atol=0.05)


def test_diversity_is_a_ratio_of_spreads():
    rng = np.random.default_rng(0)
    groups = ["a"] * 50 + ["b"] * 50
    centres = np.array([[0.0] * 6] * 50 + [[9.0] * 6] * 50)[:, None]  # prompts differ more than clips of one prompt
    real = centres + rng.standard_normal((100, 1, 6))
    assert abs(metrics.diversity(real, groups, real, groups) - 1) < 1e-12
    half = metrics.diversity(centres + 0.5 * rng.standard_normal((100, 1, 6)), groups, real, groups)
    np.testing.assert_allclose(half, 0.5, rtol=0.05)
    assert metrics.diversity(centres, groups, real, groups) == 0
    with pytest.raises(ValueError, match="two clips of one prompt"):
        metrics.diversity(real[:2], ["a", "b"], real, groups)
