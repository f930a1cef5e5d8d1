"""The demo end to end, at a size where only the plumbing is on trial."""

import functools
import json

import jax
import pytest

from crcm_jax import demo, recipes
from crcm_jax.errors import UserError
from crcm_jax.evaluate import run
from crcm_jax.parallel import processes
from crcm_jax.saving import weights

TINY = {
    "model.layers": 1,
    "model.dim": 24,
    "model.heads": 1,
    "model.ffn_dim": 24,
    "data.batch_size": 2,
    "train.steps": 2,
    "train.log_every": 1,
}


@pytest.fixture
def small(monkeypatch, tmp_path):
    """Two steps a stage, with one layer and few clips, from a teacher that was never trained; a judge of few steps."""
    monkeypatch.setattr(demo, "STAGES", {name: TINY for name in demo.STAGES})
    monkeypatch.setattr(demo, "SCRATCH", TINY)
    for name, count in {"CLIPS": 4, "BATCH": 4, "SHOWN": 2}.items():
        monkeypatch.setattr(demo, name, count)
    monkeypatch.setattr(run, "train", functools.partial(run.train, steps=5))
    config = demo.stage_config("bidirectional", tmp_path, TINY)
    teacher = tmp_path / "teacher.safetensors"
    weights.save_params(teacher, recipes.student(config).init(jax.random.key(0)), {"training": "bidirectional"})
    monkeypatch.setattr(demo, "TEACHER", teacher)


def test_all_stages_lead_to_a_report_and_every_promised_number(small, tmp_path):
    folder = tmp_path / "demo"
    page = demo.run(folder)
    assert page == folder / "report.html" and "data:image/apng" in page.read_text()
    scores = json.loads((folder / "metrics.json").read_text())
    assert scores.pop("wall_seconds") > 0
    frame_wise = ["teacher", "tf_cm_4step", "student_4step", "student_2step", "student_1step"]
    assert list(scores) == [*frame_wise, "student_4step_c3-3", "student_2step_c3-3"]
    for row in scores.values():
        assert {"class_accuracy", "motion_error", "frechet", "diversity", "frames_per_second"} <= set(row)
    assert {path.name for path in (folder / "clips").glob("*.gif")} >= {"real_example.gif"}


def test_a_stage_that_was_stopped_stops_the_demo(small, tmp_path, monkeypatch):
    monkeypatch.setattr(processes.StopSignal, "agreed", lambda self: True)
    with pytest.raises(UserError, match="goes on from here"):
        demo.run(tmp_path / "demo", from_scratch=True)
    assert not (tmp_path / "demo" / "metrics.json").exists()


def test_the_shipped_teacher_fits_the_configuration_of_its_stage():
    meta = weights.load_meta(demo.TEACHER)
    config = demo.stage_config("tf", demo.TEACHER.parent, {})
    assert meta["training"] == "bidirectional" and "crcm train" in meta["command"]
    for section in ("codec", "text"):
        assert meta["config"][section] == config[section].to_dict(), section
    assert demo.TEACHER.stat().st_size <= 5_000_000
