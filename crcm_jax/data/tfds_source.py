"""Video data sets prepared by tensorflow-datasets, read at random without TensorFlow.

A data set must have been prepared in a random-access format (`download_and_prepare(file_format="array_record")`). Its
directory is self-describing, so any of them can be read by name, whatever code prepared it.
"""

from __future__ import annotations

import json
import operator
from pathlib import Path
from typing import Any

import grain
import ml_collections
import numpy as np
from PIL import Image

from crcm_jax.errors import UserError, need
from crcm_jax.saving.reading import reading

_FEATURES = "tensorflow_datasets.core.features."


def default_config() -> ml_collections.ConfigDict:
    """The keys of `config.data` that this source reads besides `frames`, `height` and `width`."""
    return ml_collections.ConfigDict(
        dict(
            dataset="",  # name, name/config or name:version, as in tfds.load
            data_dir="~/tensorflow_datasets",
            splits=dict(train="train", heldout="test"),  # ours → theirs; theirs may be a slice such as "train[:90%]"
            video="",  # name of the video feature; empty: the only one
            text="",  # name of the text or class feature; empty: the only one, or no prompt where there is none
            stride=1,  # take every n-th frame
        )
    )


class TfdsSource:
    """Random access to a prepared data set: `source[i]` has `video` and `prompt`.

    video: float32 `[frame, height, width, channel]` in [−1, 1], the clip's first frames, scaled to cover the canvas and
    cropped about the centre; prompt: the text feature, or the class's name, or "".
    """

    def __init__(self, config: Any, split: str = "train"):
        """`config` is `config.data`. UserError if the data set is unknown, not prepared, or has no such feature."""
        config = ml_collections.ConfigDict({**default_config(), **config})
        self._frames, self._stride = config.frames, config.stride
        self._height, self._width = config.height, config.width
        root = _find(Path(config.data_dir).expanduser(), config.dataset)
        self._name = f"{config.dataset} in {root}"
        self._features = _load_features(root)
        self._video = _choose(config.dataset, self._features, "video", config.video, _is_video)
        self._text = _choose(config.dataset, self._features, "text", config.text, _is_text)
        if split not in config.splits:
            raise UserError(f'data.splits has no entry for "{split}", only for {", ".join(config.splits)}')
        self._split = config.splits[split]
        self._records, self._offset, self._count = _open_split(root, config.dataset, self._split)

    def __len__(self) -> int:
        return self._count

    def __repr__(self) -> str:
        # grain compares this text when it restores an iterator over a random-access source.
        return f"TfdsSource({self._name!r}, split={self._split!r})"

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = operator.index(index)
        if not 0 <= index < self._count:
            raise IndexError(f"example {index} of {self._count}")
        with reading(self._name, f"a data set whose example {index} is whole"):
            example = self._features.deserialize_example_np(self._records[self._offset + index])
        frames = list(example[self._video])[: self._frames * self._stride : self._stride]
        if len(frames) < self._frames:
            raise UserError(
                f"example {index} of {self._name} has {len(example[self._video])} frames, too few for "
                f"data.frames {self._frames} at data.stride {self._stride}"
            )
        video = np.stack([_cover(np.asarray(frame), self._height, self._width) for frame in frames])
        return dict(video=video.astype(np.float32) / 127.5 - 1, prompt=self._prompt(example))

    def _prompt(self, example: dict[str, Any]) -> str:
        if not self._text:
            return ""
        value = example[self._text]
        if hasattr(self._features[self._text], "int2str"):
            return self._features[self._text].int2str(int(value))
        return value.decode() if isinstance(value, bytes) else str(value)


def _find(data_dir: Path, dataset: str) -> Path:
    """The directory of a prepared data set; the newest version if several match."""
    name, _, version = dataset.partition(":")
    if not name:
        raise UserError("data.dataset is empty: give the name of a prepared data set")
    versions = [path.parent for path in (data_dir / name).glob("**/features.json") if version in ("", path.parent.name)]
    if not versions:
        raise UserError(
            f'there is no prepared data set "{dataset}" in {data_dir}: prepare it with tfds.builder("{name}").'
            'download_and_prepare(file_format="array_record"), or set data.data_dir to where it is'
        )
    if len({path.parent for path in versions}) > 1:
        configs = sorted({str(path.parent.relative_to(data_dir)) for path in versions})
        raise UserError(f'"{dataset}" has several configs, set data.dataset to one of {", ".join(configs)}')
    return max(versions, key=lambda path: [int(n) if n.isdigit() else -1 for n in path.name.split(".")])


def _load_features(root: Path):
    """The data set's features. A `Video` becomes the `Sequence` of `Image` that it is: its class needs TensorFlow."""
    features = need("tensorflow_datasets", extra="data").features  # half a second to import: only where it is used

    def without_video(node):
        if not isinstance(node, dict):
            return node
        node = {key: without_video(value) for key, value in node.items()}
        if node.get("pythonClassName") == _FEATURES + "video_feature.Video":
            video = node.pop("video")
            length, *shape = video.pop("shape", {}).get("dimensions", [-1, -1, -1, 3])
            video = {key: video[key] for key in ("dtype", "encodingFormat", "useColormap") if key in video}
            image = dict(video, shape={"dimensions": shape})
            frame = dict(pythonClassName=_FEATURES + "image_feature.Image", image=image)
            node["pythonClassName"] = _FEATURES + "sequence_feature.Sequence"
            node["sequence"] = dict(feature=frame, length=length)
        return node

    with reading(root / "features.json", "the description of a data set"):
        description = without_video(json.loads((root / "features.json").read_text(encoding="utf-8")))
        loaded = features.FeatureConnector.from_json(description)
        loaded.load_metadata(root, feature_name=None)  # the names of the classes
    return loaded


def _is_video(feature) -> bool:
    shape = feature.shape
    return len(shape) == 4 and shape[-1] in (1, 3) and np.dtype(feature.np_dtype) == np.uint8


def _is_text(feature) -> bool:
    return feature.shape == () and (hasattr(feature, "int2str") or type(feature).__name__ == "Text")


def _choose(dataset: str, features, kind: str, name: str, is_kind) -> str:
    """The feature called `name`, or the only one of its kind; "" if there is no text feature."""
    candidates = [key for key, feature in features.items() if is_kind(feature)]
    if name in candidates:
        return name
    if name:
        allowed = ", ".join(candidates) or "left empty only"
        raise UserError(f'"{name}" is no {kind} feature of {dataset}: data.{kind} can be {allowed}')
    if len(candidates) > 1:
        raise UserError(f"{dataset} has several {kind} features, set data.{kind} to one of {', '.join(candidates)}")
    if not candidates and kind == "video":
        raise UserError(f"{dataset} has no video feature (uint8 frames of 1 or 3 channels), only {', '.join(features)}")
    return candidates[0] if candidates else ""


def _open_split(root: Path, dataset: str, spec: str) -> tuple[grain.sources.ArrayRecordDataSource, int, int]:
    """(all records of the split's files, first record, number of records) of a split or a slice of one."""
    core = need("tensorflow_datasets.core", extra="data")
    with reading(root / "dataset_info.json", "the description of a data set"):
        info = json.loads((root / "dataset_info.json").read_text(encoding="utf-8"))
        splits = {
            part["name"]: core.splits.SplitInfo(
                part["name"], [int(n) for n in part.get("shardLengths", [])], int(part["numBytes"])
            )
            for part in info["splits"]
        }
    name = spec.partition("[")[0]
    if name not in splits:
        raise UserError(f'{dataset} has no split "{name}", only {", ".join(splits)}: set data.splits')
    if info.get("fileFormat") != "array_record":
        raise UserError(
            f"{dataset} was prepared as {info.get('fileFormat', 'tfrecord')}, which has no random access: "
            'prepare it with file_format="array_record"'
        )
    try:
        (part,) = core.ReadInstruction.from_spec(spec).to_absolute(splits)
    except ValueError as error:
        raise UserError(f'"{spec}" is not a split or a slice of one such as "train[:90%]": {error}') from error
    files = sorted(str(path) for path in root.glob(f"{info['name']}-{name}.array_record-*"))
    with reading(root, "the files of a data set"):
        records = grain.sources.ArrayRecordDataSource(files) if files else []
    expected = splits[name].num_examples
    if len(records) != expected:
        raise UserError(f"{root} holds {len(records)} of the {expected} examples of {name}: prepare the data set again")
    start, stop, _ = slice(part.from_, part.to).indices(expected)
    return records, start, stop - start


def _cover(frame: np.ndarray, height: int, width: int) -> np.ndarray:
    """A frame scaled so that it covers the canvas, centre-cropped; uint8 `[height, width, channel]`."""
    if frame.shape[:2] == (height, width):
        return frame
    scale = max(height / frame.shape[0], width / frame.shape[1])
    box_height, box_width = height / scale, width / scale
    top, left = (frame.shape[0] - box_height) / 2, (frame.shape[1] - box_width) / 2
    image = Image.fromarray(frame[..., 0] if frame.shape[-1] == 1 else frame)
    scaled = image.resize((width, height), Image.Resampling.BICUBIC, (left, top, left + box_width, top + box_height))
    return np.asarray(scaled).reshape(height, width, frame.shape[-1])
