"""The report: self-contained, complete, well-formed, the same again from the same inputs."""

import base64
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image, ImageSequence

from crcm_jax.errors import UserError
from crcm_jax.evaluate.report import read_losses, write_report
from crcm_jax.evaluate.video import to_uint8

PROMPTS = ["a three moves up", "a <seven> moves left"]


class Page(HTMLParser):
    """Collects what a browser would fetch or show, and fails on tags that do not nest."""

    VOID = frozenset({"meta", "img", "br", "path", "use", "rect", "link"})

    def __init__(self, text):
        super().__init__()
        self.open, self.images, self.addresses, self.text = [], [], [], ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attributes:
            if name in ("src", "href", "xlink:href", "srcset"):
                self.addresses.append(value)
            if tag == "img" and name == "src":
                self.images.append(value)

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if not {"style", "svg"} & set(self.open):
            self.text += data


@pytest.fixture
def inputs(tmp_path):
    rng = np.random.default_rng(0)
    log = tmp_path / "metrics.jsonl"
    rows = [
        {"iteration": 10 * i, "student/loss": 100 / i, "critic/loss": 1 / i, "student/lr": 1e-4} for i in range(1, 40)
    ]
    log.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return dict(
        title="Digits & motion",
        summary="What happened.",
        prompts=PROMPTS,
        clips={name: rng.uniform(-1, 1, (2, 5, 8, 10, 1)) for name in ("real", "teacher", "student, 4 steps")},
        scores=dict(teacher=dict(class_accuracy=0.875, motion_error=0.25, clips=200), student=dict(class_accuracy=0.5)),
        losses={"stage 1": log, "stage 2": log},
        commands=["make demo"],
        facts=dict(seed=3),
    )


def test_page_is_self_contained_and_shows_everything(tmp_path, inputs):
    path = write_report(tmp_path / "out" / "report.html", **inputs)
    page = Page(path.read_text(encoding="utf-8"))
    assert all(address.startswith(("data:", "#")) for address in page.addresses)
    assert "@import" not in path.read_text() and "url(http" not in path.read_text()
    for shown in ("Digits & motion", *PROMPTS, "student, 4 steps", "87.5%", "0.25", "make demo", "seed: 3", "stage 2"):
        assert shown in page.text, shown
    assert "–" in page.text  # the student has no motion error
    assert len(page.images) == 2 * 3 * 2  # moving and still
    assert path.read_text().count("<svg") == 2
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]


def test_moving_images_are_the_clips(tmp_path, inputs):
    page = Page(write_report(tmp_path / "report.html", **inputs).read_text(encoding="utf-8"))
    moving = [image for image in page.images if image.startswith("data:image/apng")]
    expected = [videos[i] for i in range(2) for videos in inputs["clips"].values()]  # rows are prompts
    for image, video in zip(moving, expected, strict=True):
        with Image.open(io.BytesIO(base64.b64decode(image.split(",")[1]))) as file:
            frames = [np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(file)]
        np.testing.assert_array_equal(frames, to_uint8(video))


def test_same_inputs_same_page(tmp_path, inputs):
    a, b = (write_report(tmp_path / name, **inputs).read_bytes() for name in ("a.html", "b.html"))
    assert a == b
    assert str(tmp_path).encode() not in a  # nothing of the machine


def test_curves_hold_the_logged_losses(tmp_path, inputs):
    series = read_losses(inputs["losses"]["stage 1"])
    assert series.keys() == {"student/loss", "critic/loss"}
    np.testing.assert_allclose(series["student/loss"], (10 * np.arange(1, 40), 100 / np.arange(1, 40)))
    text = write_report(tmp_path / "report.html", **inputs).read_text()
    assert re.search(r"currentColor", text) and "#010203" not in text  # drawings take the page's colour


def test_mistakes_are_named(tmp_path, inputs):
    with pytest.raises(UserError, match="train that stage first"):
        write_report(tmp_path / "r.html", **inputs | dict(losses=dict(a=tmp_path / "none.jsonl")))
    log = tmp_path / "broken.jsonl"
    log.write_text('{"iteration": 1, "student/loss": 2.0}\n{"iter')  # killed while writing
    assert read_losses(log)["student/loss"][1] == [2.0]
    log.write_text('{"iter\n{"iteration": 1, "student/loss": 2.0}\n')
    with pytest.raises(UserError, match="line 1"):
        read_losses(log)
    log.write_text('{"iteration": 1}\n')
    with pytest.raises(UserError, match="no losses"):
        read_losses(log)
    with pytest.raises(ValueError, match="2 prompts need"):
        write_report(tmp_path / "r.html", **inputs | dict(clips=dict(a=np.zeros((3, 5, 8, 8, 1)))))
    assert not (tmp_path / "r.html").exists()
