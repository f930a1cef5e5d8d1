"""One grain pipeline for every source: shuffled, sharded, batched, encoded, prefetched, and resumable to the example.

The order of examples is a pure function of the configuration (seed included) and does not depend on the number of
threads or hosts. An iterator's `get_state()` is a small dictionary of integers that JSON can hold; `set_state()` on a
fresh iterator goes on with the very next batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import grain
import numpy as np

from crcm_jax.data.digits import DigitsSource
from crcm_jax.data.tfds_source import TfdsSource
from crcm_jax.errors import UserError
from crcm_jax.models.base import Codec, Params, TextEncoder

SOURCES: dict[str, Callable[[Any, str], Any]] = {"digits": DigitsSource, "tfds": TfdsSource}
"""`config.data.name` → `(config.data, split)` → a sequence of dictionaries with at least `video` and `prompt`."""


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
    text_encoder: TextEncoder,
    codec_params: Params = None,
    shard_index: int = 0,
    shard_count: int = 1,
) -> grain.IterDataset:
    """Endless batches `{"latents": [batch, frame, height, width, channel], "text": [batch, token, channel]}`, float32.

    `batch_size` (default `config.data.batch_size`) counts the examples of this shard's batches. With several shards,
    shard i of n sees examples i, i + n, … of the one global order, so together they see what one host would have seen.
    Shuffled anew each time the source is used up. `config.data.threads` (0: the caller's) and `prefetch` (batches
    ahead) hide the cost; `workers` processes share it where one is not enough. Raises UserError for an unknown source,
    split, or a canvas that the codec does not take.
    """
    data = config.data
    batch_size = data.batch_size if batch_size is None else batch_size
    source = make_source(config, split)
    if not 0 <= shard_index < shard_count:
        raise UserError(f"shard {shard_index} of {shard_count} does not exist")
    if batch_size < 1 or len(source) < batch_size * shard_count:
        raise UserError(
            f"{len(source)} examples do not fill {shard_count} × a batch of {batch_size}: change data.batch_size"
        )
    codec.latent_shape(data.frames, data.height, data.width)  # an impossible canvas fails here, not in a thread

    order = grain.MapDataset.source(source).seed(data.seed).shuffle().repeat()
    batches = order[shard_index::shard_count].batch(
        batch_size, drop_remainder=True, batch_fn=_Encode(codec, codec_params, text_encoder)
    )
    threads, prefetch, workers = data.get("threads", 1), data.get("prefetch", 4), data.get("workers", 0)
    stream = batches.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch))
    return stream.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers)) if workers else stream


class _Encode:
    """Examples → one training batch: encoded together, which costs less than singly. A class, so that it pickles."""

    def __init__(self, codec: Codec, codec_params: Params, text_encoder: TextEncoder):
        self._codec, self._codec_params, self._text_encoder = codec, codec_params, text_encoder

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, np.ndarray]:
        video = np.stack([example["video"] for example in examples])
        return dict(
            latents=np.asarray(self._codec.encode(self._codec_params, video), np.float32),
            text=self._text_encoder([example["prompt"] for example in examples]),
        )
