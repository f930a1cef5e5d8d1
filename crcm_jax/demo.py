"""The whole recipe on moving digits, at a size for two CPU cores: three stages, their scores and a report."""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from crcm_jax import pipeline
from crcm_jax.configs.digits import get_config
from crcm_jax.errors import Interrupted, need
from crcm_jax.evaluate import producer, report
from crcm_jax.evaluate.run import Judge, evaluate, heldout_prompts, judge, real_clips, write_json
from crcm_jax.evaluate.video import write_video

TEACHER = Path(__file__).with_name("assets") / "digits_teacher.safetensors"
"""The bidirectional teacher that ships with the package; its metadata holds the command and the configuration."""

STAGES: dict[str, dict[str, Any]] = {
    "tf": {"train.steps": 200},
    "tf_scm": {"train.steps": 200},
    "sf_dmd": {"train.steps": 240},
}
"""The demo's own settings of each stage; everything else is `configs/digits.py`."""

STARTS: dict[str, dict[str, str]] = {
    "bidirectional": {},
    "tf": {"student": "bidirectional"},
    "tf_scm": {"student": "tf", "teacher": "tf"},
    "sf_dmd": {"student": "tf_scm", "real": "bidirectional"},
}
"""The stage whose weights each role of a stage begins with."""

SCRATCH = {"train.steps": 3000, "data.batch_size": 64}
"""Settings of the bidirectional stage where the shipped teacher is not used."""

PATTERNS = ("c1-1", "c3-3")
"""Frame by frame, and chunks of three: each pattern goes through all stages."""

SCHEDULES = {4: (15 / 16, 5 / 6, 5 / 8), 2: (5 / 6,), 1: ()}
CLIPS, BATCH, SHOWN = 200, 50, 8


class Clock:
    """Seconds spent on the demo so far, kept in a file: a killed demo goes on where it was."""

    def __init__(self, file: Path):
        self._file = file
        self._before = _seconds(file)
        self._began = time.perf_counter()

    def seconds(self) -> float:
        """Seconds so far."""
        return self._before + time.perf_counter() - self._began

    def say(self, message: str) -> None:
        """A line of progress with the time, which is also put on record."""
        write_json(self._file, {"seconds": self.seconds()})
        print(f"\n[{self.seconds():4.0f} s] {message}", file=sys.stderr, flush=True)


def _seconds(file: Path) -> float:
    """Those on record; none where there is no record, or none that can be read."""
    try:
        return float(json.loads(file.read_text(encoding="utf-8"))["seconds"])
    except (OSError, ValueError, LookupError, TypeError):
        return 0.0


def name_of(training: str, pattern: str = PATTERNS[0]) -> str:
    """The folder of a stage: its training type, and the chunk pattern where that is not frame by frame."""
    return training if pattern == PATTERNS[0] else f"{training}_{pattern}"


def stage_config(training: str, folder: Path, changes: dict[str, Any], pattern: str = PATTERNS[0]) -> ConfigDict:
    """The configuration of one stage of the demo in `folder`."""
    config = get_config(f"{training},{pattern}")
    config.update_from_flattened_dict({"train.save_every": 100, "train.sample_every": 0, **changes})
    teacher = folder / "bidirectional"
    teacher = str(teacher if teacher.exists() else TEACHER)
    for role, stage in STARTS[training].items():
        config.init[role] = teacher if stage == "bidirectional" else str(folder / name_of(stage, pattern))
    return config


def run(folder: Path, from_scratch: bool = False) -> Path:
    """Train, judge and report in `folder`; returns the report's path.

    An interrupted demo goes on where it was, a finished one starts anew.
    """
    from crcm_jax.train.assemble import train

    need("matplotlib", extra="demo")  # the report's, which comes last
    folder = Path(folder)
    if (folder / "metrics.json").exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    clock = Clock(folder / "clock.json")
    stages = [(training, pattern, changes) for pattern in PATTERNS for training, changes in STAGES.items()]
    if from_scratch:
        stages.insert(0, ("bidirectional", PATTERNS[0], SCRATCH))
    for number, (training, pattern, changes) in enumerate(stages, 1):
        clock.say(f"training {number} of {len(stages)}: {name_of(training, pattern)}")
        config = stage_config(training, folder, changes, pattern)
        workdir = folder / name_of(training, pattern)
        if int(train(config, workdir).iteration) < config.train.steps:
            raise Interrupted("the demo was stopped: the same command goes on from here")

    clock.say("training the judge: a classifier of real digits")
    config = stage_config("tf", folder, STAGES["tf"])
    referee = judge(config, clips=CLIPS)
    prompts = heldout_prompts(config, SHOWN)
    shown = {"real example": real_clips(config)(prompts, range(SHOWN))}
    scores: dict[str, Any] = {}
    judged = models(folder)
    for name, (title, make) in judged.items():
        clock.say(f"judging {title}")
        scores[name] = score(make, referee)
        # In a batch of the judge's size, so that nothing is compiled again.
        shown[title] = make((prompts * BATCH)[:BATCH], range(BATCH))[:SHOWN]
    for title, videos in shown.items():
        write_video(
            folder / "clips" / f"{title.replace(' ', '_').replace(',', '')}.gif", np.concatenate(videos, 1), scale=4
        )
    path = report.write_report(
        folder / "report.html",
        title="Causal-rCM on moving digits",
        summary="A bidirectional video diffusion model becomes a streaming one in three stages: a causal teacher (tf), "
        "a few-step student (tf_scm), and that student trained on its own rollouts (sf_dmd). Frame by frame, and once "
        "more in chunks of three frames (c3-3).",
        prompts=prompts,
        clips=shown,
        scores={title: scores[name] for name, (title, _) in judged.items()},
        losses={name: folder / name / "metrics.jsonl" for name in (name_of(*stage[:2]) for stage in stages)},
        commands=["make demo FROM_SCRATCH=1" if from_scratch else "make demo"],
        facts={"seed": config.seed, "clips judged": CLIPS, "seconds": round(clock.seconds())},
    )
    write_json(folder / "metrics.json", {"wall_seconds": round(clock.seconds(), 1), **scores})
    return path


def models(folder: Path) -> dict[str, tuple[str, producer.Producer]]:
    """Key in metrics.json → (title, producer) of everything that is judged."""

    def few(training: str, steps: int, pattern: str = PATTERNS[0]):
        model = pipeline.load(folder / name_of(training, pattern))
        return producer.producer(model, producer.few_step_solver(model.config, (steps,), SCHEDULES[steps]))

    teacher = producer.producer(pipeline.load(folder / "tf"))
    return {
        "teacher": (f"causal teacher, {get_config('tf').sample.ode_steps} steps", teacher),
        "tf_cm_4step": ("TF-CM student, 4 steps", few("tf_scm", 4)),
        "student_4step": ("SF-DMD student, 4 steps", few("sf_dmd", 4)),
        "student_2step": ("SF-DMD student, 2 steps", few("sf_dmd", 2)),
        "student_1step": ("SF-DMD student, 1 step", few("sf_dmd", 1)),
        "student_4step_c3-3": ("SF-DMD student, chunks of 3, 4 steps", few("sf_dmd", 4, "c3-3")),
        "student_2step_c3-3": ("SF-DMD student, chunks of 3, 2 steps", few("sf_dmd", 2, "c3-3")),
    }


def score(make: producer.Producer, referee: Judge) -> dict[str, Any]:
    """The scores of a model, with a progress bar."""
    from tqdm import tqdm

    with tqdm(total=CLIPS, unit="clip", desc="judging") as bar:
        return evaluate(make, referee, batch=BATCH, progress=lambda done, _: bar.update(done - bar.n))
