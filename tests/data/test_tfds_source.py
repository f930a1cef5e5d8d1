"""A tensorflow-datasets source, on a video data set that the test prepares itself (without TensorFlow)."""

import io
import json

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from crcm_jax.data import pipeline
from crcm_jax.data.tfds_source import TfdsSource
from crcm_jax.errors import UserError
from crcm_jax.models.text.embedded import Embedded
from crcm_jax.models.text.words import WordEncoder
from crcm_jax.models.vae.pixels import PixelCodec

tfds = pytest.importorskip("tensorflow_datasets")
F = tfds.features

CLIPS = {"train": 12, "test": 5}
SIDES = ("left", "right")


def clip(split, i):
    """Seven 20×24 frames whose grey says split, example and frame, with one white column left of the middle."""
    frames = np.zeros((7, 20, 24, 3), np.uint8)
    frames += np.uint8(100 * (split == "test") + 8 * i) + np.arange(7, dtype=np.uint8)[:, None, None, None]
    frames[:, :, 6] = 255
    return frames


def as_png(frame):
    file = io.BytesIO()
    Image.fromarray(frame).save(file, "png")
    file.seek(0)
    return file


class TinyVideos(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = dict(
            video=F.Sequence(F.Image(shape=(20, 24, 3), encoding_format="png")),
            caption=F.Text(),
            side=F.ClassLabel(names=list(SIDES)),
        )
        return tfds.core.DatasetInfo(builder=self, features=F.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(split) for split in CLIPS}

    def _generate_examples(self, split):
        for i in range(CLIPS[split]):
            yield i, dict(video=[as_png(frame) for frame in clip(split, i)], caption=f"a {i} moves", side=i % 2)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("tfds")
    TinyVideos(data_dir=path, file_format="array_record").download_and_prepare()
    return path


def config(data_dir, **changes):
    options = dict(name="tfds", dataset="tiny_videos", data_dir=str(data_dir), text="caption", seed=0, batch_size=4)
    return ConfigDict({**options, "frames": 7, "height": 20, "width": 24, **changes})


def declare_as_video(data_dir, tmp_path):
    """A copy of the data set whose feature is described as a `Video`, as its class would have written it."""
    source, copy = data_dir / "tiny_videos" / "1.0.0", tmp_path / "tiny_videos" / "1.0.0"
    copy.mkdir(parents=True)
    for path in source.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    description = json.loads((copy / "features.json").read_text())
    description["featuresDict"]["features"]["video"] = {
        "pythonClassName": "tensorflow_datasets.core.features.video_feature.Video",
        "video": {"dtype": "uint8", "encodingFormat": "png", "shape": {"dimensions": ["7", "20", "24", "3"]}},
    }
    (copy / "features.json").write_text(json.dumps(description))
    return tmp_path


@pytest.mark.parametrize("as_video", [False, True])
def test_every_example_comes_back_exactly(data_dir, tmp_path, as_video):
    where = declare_as_video(data_dir, tmp_path) if as_video else data_dir
    for split, theirs in (("train", "train"), ("heldout", "test")):
        source = TfdsSource(config(where), split)
        assert len(source) == CLIPS[theirs]
        found = {example["prompt"]: example["video"] for example in (source[i] for i in range(len(source)))}
        for i in range(CLIPS[theirs]):  # tensorflow-datasets shuffles what it writes
            video = found[f"a {i} moves"]
            assert video.dtype == np.float32
            np.testing.assert_array_equal(np.round((video + 1) * 127.5), clip(theirs, i))


def test_canvas_stride_and_class_names(data_dir):
    source = TfdsSource(config(data_dir, text="side", frames=3, stride=2, height=10, width=10))
    video = source[0]["video"]
    assert video.shape == (3, 10, 10, 3) and source[0]["prompt"] in SIDES
    grey = np.round((video[:, 5, 9, 0] + 1) * 127.5)
    np.testing.assert_array_equal(np.diff(grey), 2)  # every second frame
    # 20×24 cropped to its central 20×20 moves the white column from 6 to 4, halved to 2.
    assert video[0, 5, :, 0].argmax() == 2


def test_slice_of_a_split(data_dir):
    splits = {"train": "train[:75%]", "heldout": "train[75%:]"}
    prompts = [
        {source[i]["prompt"] for i in range(len(source))}
        for source in (TfdsSource(config(data_dir, splits=splits), split) for split in splits)
    ]
    assert [len(p) for p in prompts] == [9, 3] and len(prompts[0] | prompts[1]) == 12


def test_through_the_pipeline(data_dir):
    c = ConfigDict(dict(data=config(data_dir, text="side", frames=5)))
    batches = pipeline.make(c, codec=PixelCodec(patch=4, channels=3), text_encoder=Embedded(WordEncoder()))
    batch = next(iter(batches))
    assert batch["latents"].shape == (4, 5, 5, 6, 48) and batch["prompt"]["text"].shape == (4, 12, 32)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(dataset="no_such_set"), "prepare it with"),
        (dict(dataset="tiny_videos:2.0.0"), "no prepared data set"),
        (dict(dataset=""), "data.dataset is empty"),
        (dict(video="caption"), "no video feature"),
        (dict(text=""), "several text features"),
        (dict(splits={"train": "valid"}), 'no split "valid"'),
        (dict(splits={"train": "train[:x%]"}), "slice"),
        (dict(splits={"heldout": "test"}), "no entry"),
    ],
)
def test_mistakes_are_named(data_dir, changes, message):
    with pytest.raises(UserError, match=message):
        TfdsSource(config(data_dir, **changes))


def test_too_short_clip_and_data_set_without_video(data_dir, tmp_path):
    with pytest.raises(UserError, match="too few"):
        TfdsSource(config(data_dir, frames=8))[0]
    where = declare_as_video(data_dir, tmp_path)
    path = where / "tiny_videos" / "1.0.0" / "features.json"
    description = json.loads(path.read_text())
    del description["featuresDict"]["features"]["video"]
    path.write_text(json.dumps(description))
    with pytest.raises(UserError, match="has no video feature"):
        TfdsSource(config(where))


def test_missing_shard_and_wrong_format_are_named(data_dir, tmp_path):
    root = declare_as_video(data_dir, tmp_path) / "tiny_videos" / "1.0.0"
    next(root.glob("*-train.array_record-*")).unlink()
    with pytest.raises(UserError, match="0 of the 12"):
        TfdsSource(config(tmp_path))
    info = (root / "dataset_info.json").read_text()
    (root / "dataset_info.json").write_text(info.replace('"array_record"', '"tfrecord"'))
    with pytest.raises(UserError, match="no random access"):
        TfdsSource(config(tmp_path))
