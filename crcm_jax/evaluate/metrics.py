"""What a set of generated moving digits is worth: pure functions from arrays to numbers.

Videos are `[clip, frame, height, width, 1]` in [−1, 1]; distances are in pixels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from crcm_jax.data.digits import DIRECTIONS, start_box, trajectory, travel_box


def class_correct(logits: np.ndarray, labels: Sequence[Sequence[int]]) -> np.ndarray:
    """Whether each clip shows the digits it should, bool `[clip]`.

    `logits` `[clip, frame, class]` are averaged over frames; of a clip with n labels the n largest must be them.
    """
    ranked = np.argsort(-logits.mean(1), axis=-1)
    return np.array([set(order[: len(set(wanted))]) == set(wanted) for order, wanted in zip(ranked, labels)])


def track(videos: np.ndarray, floor: float = 0.1) -> np.ndarray:
    """Where the brightness is: its centroid (y, x) in every frame, float64 `[clip, frame, 2]`, pixels.

    Brightness below `floor` (of 1) is background and does not count; a black frame's centroid is the canvas's centre.
    """
    light = np.clip((videos[..., 0].astype(np.float64) + 1) / 2 - floor, 0, 1)
    height, width = light.shape[-2:]
    total = light.sum((-1, -2))
    y = light.sum(-1) @ (np.arange(height) + 0.5 - height / 2)
    x = light.sum(-2) @ (np.arange(width) + 0.5 - width / 2)
    return np.stack([y, x], -1) / np.maximum(total, 1e-9)[..., None] + np.array([height, width]) / 2


@dataclasses.dataclass(frozen=True)
class MotionLaw:
    """How digits move in a data set: what a prompt does not say and a clip may choose is the start and the speed."""

    frames: int
    height: int
    width: int
    digit_size: float
    speed: tuple[float, float]
    """Slowest and fastest, pixels per frame."""
    straight: float
    """Frames before the first bounce, where there is room."""
    glyph_offset: float = 0.16
    """How far a glyph's centroid may lie from its box's centre on an axis, in sides of the box: the data's farthest."""

    def fit(self, tracks: np.ndarray, direction: str, resolution: float = 0.1) -> tuple[np.ndarray, np.ndarray]:
        """The lawful motion in `direction` that is nearest to each track `[clip, frame, 2]`.

        Least squares over start, speed and the glyph's offset; the first two on a grid of `resolution` pixels (per
        clip for the speed), the offset in closed form. Returns (its track `[clip, frame, 2]`, mean distance in pixels
        `[clip]`).
        """
        low, high = travel_box(self.height, self.width, self.digit_size)
        travelled = (self.speed[1] - self.speed[0]) * max(self.frames - 1, 1)
        speeds = np.linspace(*self.speed, 1 + int(np.ceil(travelled / resolution / 4)))
        # Both axes are independent once the speed is known, which is what makes a full search cheap.
        axes = [
            self._fit_axis(tracks[..., a], speeds * DIRECTIONS[direction][a], low[a], high[a], resolution)
            for a in (0, 1)
        ]
        best = np.argmin(axes[0][0] + axes[1][0], axis=1)  # [clip], which speed
        each = np.arange(len(tracks))
        fitted = np.stack([tracks_of_axis[each, best] for _, tracks_of_axis in axes], -1)
        return fitted, np.linalg.norm(fitted - tracks, axis=-1).mean(1)

    def _fit_axis(self, positions, velocities, low, high, resolution):
        """(squared error `[clip, speed]`, fit `[clip, speed, frame]`) of one axis's best start and offset."""
        errors, fits, limit = [], [], self.glyph_offset * self.digit_size
        for velocity in velocities:
            first, last = start_box(np.array(velocity), self.straight, low, high)
            starts = np.linspace(first, last, 1 + int(np.ceil((last - first) / resolution)))
            candidates = trajectory(starts, np.array(velocity), self.frames, low, high).T  # [start, frame]
            residual = positions[:, None] - candidates  # [clip, start, frame]
            offset = np.clip(residual.mean(-1), -limit, limit)
            error = ((residual - offset[..., None]) ** 2).sum(-1)
            best = error.argmin(1)
            each = np.arange(len(positions))
            errors.append(error[each, best])
            fits.append(candidates[best] + offset[each, best, None])
        return np.stack(errors, 1), np.stack(fits, 1)


@dataclasses.dataclass(frozen=True)
class Motion:
    """Per clip: `error` in pixels; `direction`: is the prompt's the best of the eight; `bounce`: see `motion`."""

    error: np.ndarray
    direction: np.ndarray
    bounce: np.ndarray


def motion(tracks: np.ndarray, directions: Sequence[str], law: MotionLaw) -> Motion:
    """Do digits go where their prompts say, and turn round at the walls?

    error: mean distance between the track and the nearest lawful motion in the prompt's direction, float `[clip]`.
    direction: no other direction's lawful motion is nearer, bool `[clip]`.
    bounce: on each axis the digit comes back by what the nearest lawful motion says, to 0.75 pixel, bool `[clip]`.
    """
    names = tuple(DIRECTIONS)
    wanted = np.array([names.index(direction) for direction in directions])
    fits = [law.fit(tracks, name) for name in names]
    errors = np.stack([error for _, error in fits], 1)
    fitted = np.stack([fit for fit, _ in fits], 1)[np.arange(len(tracks)), wanted]
    signs = np.sign([DIRECTIONS[direction] for direction in directions])[:, None]
    returned = [((p * signs).max(1) - (p * signs)[:, -1]) for p in (tracks, fitted)]
    return Motion(
        error=errors[np.arange(len(tracks)), wanted],
        direction=errors.argmin(1) == wanted,
        bounce=(np.abs(returned[0] - returned[1]) < 0.75).all(-1),
    )


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """Squared Fréchet distance between the Gaussians that fit samples `a` `[n, channel]` and `b` `[m, channel]`.

    |μ_a − μ_b|² + tr(Σ_a + Σ_b − 2 (Σ_a^½ Σ_b Σ_a^½)^½) (Dowson and Landau 1982; "FID" in Heusel et al. 2017).
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    cov_a, cov_b = (np.atleast_2d(np.cov(x, rowvar=False)) for x in (a, b))
    root = _sqrt(cov_a)
    cross = np.sqrt(np.clip(np.linalg.eigvalsh(root @ cov_b @ root), 0, None)).sum()
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * cross)


def frechet_frames(a: np.ndarray, b: np.ndarray) -> float:
    """Fréchet distance of single frames' features `[clip, frame, channel]`: does every picture look right?"""
    return frechet(a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1]))


def frechet_time(a: np.ndarray, b: np.ndarray, stride: int = 2) -> float:
    """Fréchet distance of (features, their change over `stride` frames): does it change as it should?

    `[clip, frame, channel]` with more than `stride` frames. A still video, whose change is zero, is far from a moving
    one even if each of its pictures is perfect.
    """
    pairs = [np.concatenate([x[:, :-stride], x[:, stride:] - x[:, :-stride]], -1) for x in (a, b)]
    return frechet_frames(*pairs)


def diversity(features: np.ndarray, groups: Sequence[str], real: np.ndarray, real_groups: Sequence[str]) -> float:
    """How different the clips of one prompt are, over how different real ones are: 1 is lifelike, 0 always one clip.

    `features` `[clip, frame, channel]`; `groups` are the clips' prompts. Mean pairwise distance within prompts, mean
    over prompts. ValueError if no prompt has two clips.
    """
    return _spread(features, groups) / _spread(real, real_groups)


def _spread(features: np.ndarray, groups: Sequence[str]) -> float:
    flat, groups = features.reshape(len(features), -1).astype(np.float64), np.asarray(groups)
    means = []
    for group in sorted(set(groups)):
        members = flat[groups == group]
        if len(members) > 1:
            upper = np.triu_indices(len(members), 1)
            means.append(np.linalg.norm(members[upper[0]] - members[upper[1]], axis=-1).mean())
    if not means:
        raise ValueError("diversity needs at least two clips of one prompt")
    return float(np.mean(means))


def _sqrt(matrix: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
