"""From something that makes clips to the numbers that say how good they are."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np

from crcm_jax.data import digits
from crcm_jax.errors import UserError
from crcm_jax.evaluate import metrics
from crcm_jax.evaluate.classifier import Classifier, train
from crcm_jax.evaluate.video import NOT_FINITE
from crcm_jax.saving.files import write_text

Producer = Callable[[Sequence[str], Sequence[int]], np.ndarray]
"""`(prompts, seeds)` → videos `[clip, frame, height, width, 1]` in [−1, 1]; one seed, one noise."""

_REAL_PER_PROMPT = 8  # real clips of each prompt that generated ones are compared with
_REAL_SEED = 10_000_019  # far from the seeds of anything that is compared with them


def heldout_prompts(config: Any, count: int) -> list[str]:
    """The prompts of the first `count` held-out clips, whatever the model; `config` is a whole configuration."""
    source = digits.DigitsSource(config.data, "heldout")
    return [source[i]["prompt"] for i in range(count)]


def real_clips(config: Any, split: str = "heldout") -> Producer:
    """A producer of real clips: what a perfect model would score, and the ground truth of a report."""
    source = digits.DigitsSource(config.data, split)
    return lambda prompts, seeds: np.stack([source.clip_of(p, s)["video"] for p, s in zip(prompts, seeds)])


def motion_law(data: Any) -> metrics.MotionLaw:
    """The law that the clips of a `config.data` obey."""
    data = ml_collections.ConfigDict({**digits.default_config(), **data})
    return metrics.MotionLaw(data.frames, data.height, data.width, data.digit_size, tuple(data.speed), data.straight)


@dataclasses.dataclass(frozen=True)
class Judge:
    """What every model of one data set is held against: prompts, a classifier and real clips (see `judge`)."""

    prompts: tuple[str, ...]
    """One a clip; each held-out prompt as often as there are seeds."""
    seeds: tuple[int, ...]
    classifier: Classifier
    law: metrics.MotionLaw
    real_prompts: tuple[str, ...]
    real_features: np.ndarray
    """Of real held-out clips of the same prompts, float32 `[clip, frame, channel]`."""


def judge(config: Any, *, clips: int = 200, seeds: int = 2) -> Judge:
    """Prepares to judge `clips` clips: `clips / seeds` held-out prompts with `seeds` noises each.

    Trains the classifier, seconds on two cores. UserError for another data set than the digits or impossible counts.
    """
    if clips < 2 or seeds < 1 or clips % seeds:
        raise UserError(f"{clips} clips cannot be shared among {seeds} seeds a prompt: use a multiple of {seeds}")
    classifier = train(config.data)
    prompts = [prompt for prompt in heldout_prompts(config, clips // seeds) for _ in range(seeds)]
    real_prompts = [prompt for prompt in prompts[::seeds] for _ in range(_REAL_PER_PROMPT)]
    real = real_clips(config)(real_prompts, range(_REAL_SEED, _REAL_SEED + len(real_prompts)))
    features = classifier(real)[1]
    return Judge(
        tuple(prompts), tuple(range(clips)), classifier, motion_law(config.data), tuple(real_prompts), features
    )


def evaluate(
    produce: Producer, judge: Judge, *, batch: int = 50, progress: Callable[[int, int], None] | None = None
) -> dict[str, Any]:
    """Scores of a producer: a dictionary that JSON can hold.

    class_accuracy: share of clips whose digits the classifier recognises (mean over frames).
    motion_error: mean distance from the nearest motion that the prompt allows, pixels; direction_accuracy and
        bounce_accuracy: shares of clips (`metrics.motion`). None with several digits a clip: tracks merge.
    frechet, frechet_time: squared Fréchet distances of frames' features, and of features with their change over two
        frames; the latter None for clips of fewer than three.
    diversity: spread of one prompt's clips over real clips' spread; None if no prompt occurs twice.
    frames_per_second: pixel frames made per second, in batches of `batch`, compilation excluded.
    broken_clips: clips with values that are not finite; they are judged as if those were black.

    `progress(done, all)` is called after each batch. UserError if the producer makes other clips than the data's, or
    none that is finite: then there is nothing to judge.
    """
    videos, frames_per_second = _produce(produce, judge, min(batch, len(judge.prompts)), progress)
    broken = ~np.isfinite(videos).all((1, 2, 3, 4))
    if broken.all():
        raise UserError(broken_clips(len(videos), len(videos)))
    videos = np.nan_to_num(videos, nan=-1.0, posinf=-1.0, neginf=-1.0)
    named = [digits.parse_prompt(prompt) for prompt in judge.prompts]
    logits, features = judge.classifier(videos)
    correct = metrics.class_correct(logits, [[label for label, _ in clip] for clip in named])
    scores: dict[str, Any] = dict(clips=len(videos), class_accuracy=_share(correct))
    scores |= dict(motion_error=None, direction_accuracy=None, bounce_accuracy=None)
    if all(len(clip) == 1 for clip in named):
        motion = metrics.motion(metrics.track(videos), [clip[0][1] for clip in named], judge.law)
        scores |= dict(
            motion_error=float(motion.error.mean()),
            direction_accuracy=_share(motion.direction),
            bounce_accuracy=_share(motion.bounce),
        )
    diversity = None
    if len(set(judge.prompts)) < len(judge.prompts):
        diversity = metrics.diversity(features, judge.prompts, judge.real_features, judge.real_prompts)
    return scores | dict(
        frechet=metrics.frechet_frames(features, judge.real_features),
        frechet_time=metrics.frechet_time(features, judge.real_features) if judge.law.frames > 2 else None,
        diversity=diversity,
        frames_per_second=frames_per_second,
        batch=batch,
        broken_clips=int(broken.sum()),
    )


def broken_clips(broken: int, clips: int) -> str:
    """The sentence for clips that are not finite."""
    return f"{broken} of {clips} clips hold values that {NOT_FINITE}"


def write_json(path: str | Path, content: Any) -> None:
    """Write JSON whole or not at all: a reader never sees half a file, and a failure leaves the old one."""
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def _produce(produce: Producer, judge: Judge, batch: int, progress) -> tuple[np.ndarray, float]:
    """(all videos, frames per second). Every batch has one size, so a compiled producer compiles once."""
    count, expected = len(judge.prompts), (batch, judge.law.frames, judge.law.height, judge.law.width, 1)

    def make(start: int) -> np.ndarray:
        which = np.arange(start, start + batch) % count
        videos = np.asarray(produce([judge.prompts[i] for i in which], [judge.seeds[i] for i in which]), np.float32)
        if videos.shape != expected:
            raise UserError(f"the model makes clips of shape {videos.shape}, the data's are {expected}")
        return videos

    starts = range(0, count, batch)
    videos, seconds, timed = [], 0.0, 0
    for start in starts:
        began = time.perf_counter()
        videos.append(make(start))
        if start:  # the first batch also compiles
            seconds, timed = seconds + time.perf_counter() - began, timed + 1
        if progress:
            progress(min(start + batch, count), count)
    if not timed:
        began = time.perf_counter()
        make(0)
        seconds, timed = time.perf_counter() - began, 1
    return np.concatenate(videos)[:count], timed * batch * judge.law.frames / max(seconds, 1e-9)


def _share(flags: np.ndarray) -> float:
    return float(np.mean(flags))
