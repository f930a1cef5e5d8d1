"""Moving digits: real handwriting sent across a small canvas, and the sentence that says how it moves.

The images are scikit-learn's `load_digits` (1,797 scans of 8×8 pixels, part of that package: nothing is downloaded).
A clip is a pure function of (seed, split, index). Positions are in pixels, (y, x) with y pointing down; a digit's
position is the centre of its square box.
"""

from __future__ import annotations

import functools
import operator
import re
from collections.abc import Sequence
from typing import Any

import ml_collections
import numpy as np

from crcm_jax.errors import UserError, need

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

_DIAGONAL = 0.5**0.5
DIRECTIONS: dict[str, tuple[float, float]] = {
    "up": (-1.0, 0.0),
    "up and right": (-_DIAGONAL, _DIAGONAL),
    "right": (0.0, 1.0),
    "down and right": (_DIAGONAL, _DIAGONAL),
    "down": (1.0, 0.0),
    "down and left": (_DIAGONAL, -_DIAGONAL),
    "left": (0.0, -1.0),
    "up and left": (-_DIAGONAL, -_DIAGONAL),
}
"""What a prompt calls a direction → its unit vector (y, x)."""

SPLITS = ("train", "heldout")

_HELDOUT_FRACTION = 0.2
_SPLIT_SEED = 20250711  # The split is part of the data set, so it does not follow a run's seed.
_SOURCE_PIXELS = 8


def default_config() -> ml_collections.ConfigDict:
    """Every key of `config.data` that this source and the pipeline read."""
    return ml_collections.ConfigDict(
        dict(
            name="digits",
            batch_size=32,
            seed=0,
            examples=1_000_000,  # clips before indices repeat, per split
            frames=9,
            height=16,  # pixels
            width=16,
            digit_size=10.0,  # side of a digit's box, pixels; need not be an integer
            digits=1,  # digits per clip
            speed=(1.0, 1.6),  # pixels per frame, uniform in this range
            straight=2,  # frames of travel before the first bounce, where the canvas has room for them
            threads=1,  # 0 renders in the caller's thread
            prefetch=4,  # batches
            workers=0,  # processes instead of threads, if positive
        )
    )


@functools.cache
def load_images(split: str) -> tuple[np.ndarray, np.ndarray]:
    """The split's images, float32 `[image, 8, 8]` in [0, 1], and labels, int32 `[image]`; read-only.

    One image in five of every class is held out, always the same ones. UserError for an unknown split.
    """
    _check_split(split)
    images, labels = need("sklearn.datasets", extra="demo").load_digits(return_X_y=True)
    rng = np.random.default_rng(_SPLIT_SEED)
    heldout = np.zeros(len(labels), bool)
    for digit in range(10):
        of_class = rng.permutation(np.flatnonzero(labels == digit))
        heldout[of_class[: round(len(of_class) * _HELDOUT_FRACTION)]] = True
    chosen = heldout if split == "heldout" else ~heldout
    images = (images[chosen].reshape(-1, _SOURCE_PIXELS, _SOURCE_PIXELS) / 16).astype(np.float32)
    labels = labels[chosen].astype(np.int32)
    images.flags.writeable = labels.flags.writeable = False
    return images, labels


def reflect(position: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """The bounce law: an unbounded straight line folded into [low, high], a mirror at each wall. Broadcasts."""
    room = high - low
    period = np.where(room > 0, 2 * room, 1)
    phase = np.mod(position - low, period)
    return low + np.where(room > 0, np.minimum(phase, 2 * room - phase), 0)


def travel_box(height: int, width: int, digit_size: float) -> tuple[np.ndarray, np.ndarray]:
    """Lowest and highest centre (y, x) at which a digit's box is wholly on the canvas, pixels."""
    half = digit_size / 2
    return np.array([half, half]), np.array([height - half, width - half])


def trajectory(start: np.ndarray, velocity: np.ndarray, frames: int, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Centres `[frame, …, 2]` of a digit that leaves `start` `[…, 2]` with `velocity` `[…, 2]`, pixels per frame."""
    steps = np.arange(frames).reshape((frames,) + (1,) * np.ndim(start))
    return reflect(start + steps * velocity, low, high)


def render(images: np.ndarray, centres: np.ndarray, height: int, width: int, digit_size: float) -> np.ndarray:
    """Images `[digit, 8, 8]` (or `[frame, digit, 8, 8]`) in [0, 1] drawn at sub-pixel `centres` `[frame, digit, 2]`.

    Cubic interpolation, so that a digit keeps its shape while it moves by fractions of a pixel; where digits overlap
    the brighter one wins. Returns float32 `[frame, height, width, 1]` in [−1, 1], −1 the empty canvas.
    """
    weights = _interpolation(centres, max(height, width), digit_size)  # of both axes at once: half the calls
    rows, columns = weights[..., 0, :height, :], weights[..., 1, :width, :]
    drawn = rows @ images @ np.swapaxes(columns, -1, -2)
    brightest = drawn[:, 0] if drawn.shape[1] == 1 else drawn.max(axis=1)
    return (np.minimum(np.maximum(brightest, 0), 1) * 2 - 1)[..., None]


def start_box(
    velocity: np.ndarray, straight: float, low: np.ndarray, high: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Lowest and highest centres `[…, 2]` from which `straight` frames at `velocity` meet no wall, where there is room.

    Without this "moves up" could show a digit that only ever comes down.
    """
    ahead = velocity * straight
    return np.minimum(low + np.maximum(-ahead, 0), high), np.maximum(high - np.maximum(ahead, 0), low)


def prompt_of(labels: Sequence[int], directions: Sequence[str]) -> str:
    """The sentence, e.g. "a three moves up and left" or "a three moves up and an eight moves left"."""
    return " and ".join(
        f"{'an' if WORDS[label] == 'eight' else 'a'} {WORDS[label]} moves {direction}"
        for label, direction in zip(labels, directions)
    )


def parse_prompt(prompt: str) -> list[tuple[int, str]]:
    """(label, direction) of every digit that a prompt names; the inverse of `prompt_of`. UserError if it is not one."""
    phrases = re.findall(r"an? (\w+) moves ((?:up|down)(?: and (?:left|right))?|left|right)", prompt)
    result = [(WORDS.index(word), direction) for word, direction in phrases if word in WORDS]
    if not result or prompt_of(*zip(*result)) != prompt.strip():
        raise UserError(
            f'"{prompt}" is not a prompt of the digits data: write "a <zero … nine> moves <{" | ".join(DIRECTIONS)}>", '
            'joined by "and" where there are several digits'
        )
    return result


class DigitsSource:
    """Random access to `len(source)` clips; `source[i]` is a dictionary.

    video: float32 `[frame, height, width, 1]` in [−1, 1]; prompt: str; labels: int32 `[digit]`;
    centres: float32 `[frame, digit, 2]`, pixels; velocity: float32 `[digit, 2]`, initial, pixels per frame.

    The first frame's digits are wholly inside the canvas, as all others are.
    """

    def __init__(self, config: Any, split: str = "train"):
        """`config` is `config.data`; keys it lacks are `default_config`'s. UserError if it cannot be drawn."""
        _check_split(split)
        config = ml_collections.ConfigDict({**default_config(), **config})
        self._frames, self._height, self._width = config.frames, config.height, config.width
        self._size, self._digits, self._seed = float(config.digit_size), config.digits, config.seed
        self._slowest, self._fastest = config.speed
        self._count, self._split, self._straight = config.examples, split, config.straight
        if not 0 < self._size <= min(self._height, self._width):
            raise UserError(
                f"a digit of {self._size:g} pixels does not fit a canvas of {self._height}×{self._width}: "
                "change data.digit_size, data.height or data.width"
            )
        if not 0 <= self._slowest <= self._fastest:
            raise UserError(f"data.speed is (slowest, fastest) in pixels per frame, not {tuple(config.speed)}")
        for name, least in (("frames", 1), ("digits", 1), ("examples", 1), ("straight", 0)):
            if config[name] < least:
                raise UserError(f"data.{name} is {config[name]}, it must be at least {least}")
        self._low, self._high = travel_box(self._height, self._width, self._size)

    def __len__(self) -> int:
        return self._count

    def __repr__(self) -> str:
        # grain compares this text when it restores an iterator over a random-access source.
        return f"DigitsSource(split={self._split!r}, seed={self._seed}, examples={self._count})"

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = operator.index(index)
        if not 0 <= index < self._count:
            raise IndexError(f"clip {index} of {self._count}")
        rng = np.random.default_rng((self._seed, SPLITS.index(self._split), index))
        which = rng.integers(len(load_images(self._split)[0]), size=self._digits)
        directions = [_DIRECTION_NAMES[i] for i in rng.integers(len(DIRECTIONS), size=self._digits)]
        return self._clip(rng, which, directions)

    def clip_of(self, prompt: str, seed: int) -> dict[str, Any]:
        """A clip that fits `prompt`, by `seed`: image, start and speed are drawn. UserError for a foreign prompt."""
        rng = np.random.default_rng((self._seed, SPLITS.index(self._split), len(SPLITS), seed))
        named = parse_prompt(prompt)
        labels = load_images(self._split)[1]
        which = np.array([rng.choice(np.flatnonzero(labels == label)) for label, _ in named])
        return self._clip(rng, which, [direction for _, direction in named])

    def _clip(self, rng: np.random.Generator, which: np.ndarray, directions: Sequence[str]) -> dict[str, Any]:
        images, labels = load_images(self._split)
        speed = rng.uniform(self._slowest, self._fastest, size=(len(which), 1))
        velocity = speed * np.array([DIRECTIONS[name] for name in directions])
        start = rng.uniform(*start_box(velocity, self._straight, self._low, self._high))
        centres = trajectory(start, velocity, self._frames, self._low, self._high).astype(np.float32)
        return dict(
            video=render(images[which], centres, self._height, self._width, self._size),
            prompt=prompt_of(labels[which], directions),
            labels=labels[which],
            centres=centres,
            velocity=velocity.astype(np.float32),
        )


_DIRECTION_NAMES = tuple(DIRECTIONS)


def _check_split(split: str) -> None:
    if split not in SPLITS:
        raise UserError(f'the digits data has no split "{split}": use one of {", ".join(SPLITS)}')


def _interpolation(centre: np.ndarray, length: int, digit_size: float) -> np.ndarray:
    """Weights `[…, length, 8]` that resample a digit's 8 rows (or columns) to a canvas line, for a centre."""
    pixels = np.arange(length, dtype=np.float32) + 0.5
    source = (pixels - centre[..., None]) * (_SOURCE_PIXELS / digit_size) + (_SOURCE_PIXELS - 1) / 2
    distance = np.abs(source[..., None] - np.arange(_SOURCE_PIXELS, dtype=np.float32))
    # A digit drawn smaller than its scan needs a wider kernel, or it would shimmer as it moves.
    shrink = max(1.0, _SOURCE_PIXELS / digit_size)
    return _catmull_rom(distance.astype(np.float32) / np.float32(shrink)) / np.float32(shrink)


def _catmull_rom(x: np.ndarray) -> np.ndarray:
    """The cubic convolution kernel with a = −1/2 (Keys 1981) at distances x ≥ 0."""
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((2.5 - 0.5 * x) * x - 4) * x + 2
    return np.where(x < 1, near, np.where(x < 2, far, 0))
