"""One grain pipeline for every source: shuffled, sharded, batched, encoded, prefetched, and resumable to the example.

The order of examples is a pure function of the configuration (seed included) and does not depend on the number of
threads or hosts. An iterator's `get_state()` is a small dictionary that JSON can hold; `set_state()` on a fresh
iterator goes on with the very next batch, if the data are still the same.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import grain
import numpy as np

from crcm_jax.data.digits import DigitsSource
from crcm_jax.data.latents import LatentSource
from crcm_jax.data.skipping import Skipping
from crcm_jax.data.tfds_source import TfdsSource
from crcm_jax.errors import UserError
from crcm_jax.models import registry
from crcm_jax.models.base import Codec, Params, TextEncoder

SOURCES: dict[str, Callable[[Any, str], Any]] = {"digits": DigitsSource, "tfds": TfdsSource, "latents": LatentSource}
"""`config.data.name` → `(config.data, split)` → a sequence of dictionaries with at least `video` and `prompt`; those of
`LatentSource` have `latents` and `text` in place of `video`."""


HOLDS: dict[str, frozenset[str]] = {name: frozenset({"latents"}) for name in SOURCES}
"""What each source's examples give, in the words of `Recipe.needs`; encoded on the way where they are videos."""


def require(config: Any, needs: frozenset[str]) -> None:
    """UserError where the data that `config` names lack something that its recipe needs."""
    if config.data.name in SOURCES and (missing := sorted(needs - HOLDS[config.data.name])):
        holding = [name for name, holds in HOLDS.items() if needs <= holds]
        raise UserError(
            f"training {config.training!r} needs {missing[0]} in its data, and data.name={config.data.name} has none: "
            + (f"use {' or '.join(holding)}" if holding else "no source of this version has them")
        )


def holds_latents(config: Any) -> bool:
    """Whether the data are encoded already, so that neither codec parameters nor a text encoder are needed."""
    return SOURCES.get(config.data.name) is LatentSource


def make_source(config: Any, split: str = "train"):
    """The random-access source that `config.data` names: `source[i]["video"]`, `["prompt"]`, …; UserError if none."""
    if config.data.name not in SOURCES:
        raise UserError(f'there is no data source "{config.data.name}": set data.name to one of {", ".join(SOURCES)}')
    return SOURCES[config.data.name](config.data, split)


def make(
    config: Any,
    split: str = "train",
    batch_size: int | None = None,
    *,
    codec: Codec,
    text_encoder: TextEncoder | None = None,
    codec_params: Params = None,
    rows: Sequence[int] | None = None,
) -> Iterable[dict[str, np.ndarray]]:
    """Endless batches, as `recipes.base.Batch` has them: `latents` `[batch, frame, height, width, channel]`, `prompt`.

    Where the data are latents already (`holds_latents`) the codec only says of which shape they must be, the text
    encoder is not asked, and batches also have `damaged`, int32 `[batch]`: how many damaged examples were passed over.

    `batch_size` (default `config.data.batch_size`) is the whole batch's. `rows` are those of its rows that are read and
    given, for a process that holds only them (default: all). Which example is in which row does not depend on it, so
    that processes together see what one would have seen. Shuffled anew each time the source is used up.
    `config.data.threads` (0: the caller's) and `prefetch` (batches ahead) hide the cost; `workers` processes share it
    where one is not enough. Raises UserError for an unknown source or split, a canvas that the codec does not take, and
    latents or texts that do not fit the configuration.
    """
    data = config.data
    batch_size = data.batch_size if batch_size is None else batch_size
    source = make_source(config, split)
    if batch_size < 1 or len(source) < batch_size:
        raise UserError(f"{len(source)} examples do not fill a batch of {batch_size}: change data.batch_size")
    rows = range(batch_size) if rows is None else rows
    # An impossible canvas fails here, not in a thread.
    shape = codec.latent_shape(data.frames, data.height, data.width)
    fingerprint = None
    if isinstance(source, LatentSource):
        family, fields = registry.fields(config.model)
        tokens, channels = family.prompt_shape(fields, config.text.length)["text"]
        source.require(shape, (tokens, channels))
        fingerprint = source.fingerprint()
        source, batch_fn = Skipping(source), _stack
    else:
        assert text_encoder is not None, "prompts are to be encoded"
        batch_fn = _Encode(codec, codec_params, text_encoder)

    order = grain.MapDataset.source(source).seed(data.seed).shuffle().repeat()
    batches = _Rows(order, batch_size, rows).batch(len(rows), drop_remainder=True, batch_fn=batch_fn)
    threads, prefetch, workers = data.get("threads", 1), data.get("prefetch", 4), data.get("workers", 0)
    stream = batches.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch))
    if workers:
        stream = stream.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers), worker_init_fn=_leave_signals)
    return stream if fingerprint is None else _OfOneSet(stream, fingerprint, data.path)


def _leave_signals(worker: int, workers: int) -> None:
    """In a worker process: Ctrl-C, which a terminal sends to all, is for the run to deal with, which ends this too."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class _Rows(grain.MapDataset):
    """Rows `rows` of every `size` examples in turn."""

    def __init__(self, parent: grain.MapDataset, size: int, rows: Sequence[int]):
        super().__init__(parent)
        self._size, self._rows = size, tuple(map(int, rows))

    def __len__(self) -> int:
        return len(self._parent) // self._size * len(self._rows)

    def __getitem__(self, index: int) -> Any:
        batch, place = divmod(index, len(self._rows))
        return self._parent[batch * self._size + self._rows[place]]


class _OfOneSet:
    """A stream whose state knows the files that it counts the examples of, and will not go on with others."""

    def __init__(self, stream: grain.IterDataset, fingerprint: str, path: str):
        self._stream, self._fingerprint, self._path = stream, fingerprint, path

    def __iter__(self) -> _Position:
        return _Position(iter(self._stream), self._fingerprint, self._path)


class _Position(Iterator):
    def __init__(self, iterator: grain.DatasetIterator, fingerprint: str, path: str):
        self._iterator, self._fingerprint, self._path = iterator, fingerprint, path

    def __next__(self) -> dict[str, np.ndarray]:
        return next(self._iterator)

    def get_state(self) -> dict[str, Any]:
        return {"position": self._iterator.get_state(), "data": self._fingerprint}

    def set_state(self, state: dict[str, Any]) -> None:
        if state["data"] != self._fingerprint:
            raise UserError(
                f"{self._path} no longer holds the examples that this run began with (files or their lengths differ): "
                "restore them, or start a new run from this one's weights with --config.init.student"
            )
        self._iterator.set_state(state["position"])

    def close(self) -> None:
        self._iterator.close()


def _stack(examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Encoded examples → one training batch."""

    def stack(name):
        return np.stack([example[name] for example in examples])

    damaged = np.array([example["damaged"] for example in examples], np.int32)
    return {"latents": stack("latents"), "prompt": {"text": stack("text")}, "damaged": damaged}


class _Encode:
    """Examples → one training batch: encoded together, which costs less than singly. A class, so that it pickles."""

    def __init__(self, codec: Codec, codec_params: Params, text_encoder: TextEncoder):
        self._codec, self._codec_params, self._text_encoder = codec, codec_params, text_encoder

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        video: Any = np.stack([example["video"] for example in examples])
        return dict(
            latents=np.asarray(self._codec.encode(self._codec_params, video), np.float32),
            prompt=self._text_encoder([example["prompt"] for example in examples]),
        )
