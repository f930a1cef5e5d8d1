"""One example of a set of latents: a clip's latents, its prompt's embedding, and the prompt.

As a record it is a safetensors file of two tensors, `latents` `[frame, height, width, channel]` and `text`
`[token, channel]`, whose metadata hold the JSON object `crcm` with `key` and `prompt`.
"""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import safetensors
import safetensors.numpy

from crcm_jax.errors import UserError
from crcm_jax.saving.tensors import TYPES


class DamagedExample(UserError):
    """An example that cannot be used; the message names it. Training goes on without it."""


@dataclasses.dataclass(frozen=True)
class Example:
    """latents: `[frame, height, width, channel]`; text: `[token, channel]`; both as they are stored."""

    key: str
    latents: np.ndarray
    text: np.ndarray
    prompt: str

    def flaw(self) -> str | None:
        """What makes the example unfit for training whatever the model, in a few words; None for nothing."""
        for name, array, rank in (("latents", self.latents, 4), ("text", self.text, 2)):
            if array.ndim != rank or not array.size:
                return f"has {name} of shape {list(array.shape)}"
            # A sum of finite numbers is finite in float64 whatever they are, and costs less than looking at each.
            if not np.isfinite(array.sum(dtype=np.float64)):
                return f"has {name} that are not finite"
        return None


def to_record(example: Example) -> bytes:
    """The example as a record; the same example gives the same bytes."""
    tensors = {"latents": np.ascontiguousarray(example.latents), "text": np.ascontiguousarray(example.text)}
    # One entry: several would be written in any order.
    return safetensors.numpy.save(tensors, {"crcm": json.dumps({"key": example.key, "prompt": example.prompt})})


def from_record(record: bytes, name: str) -> Example:
    """The example in a record, which messages call `name`. DamagedExample if it is none."""
    try:
        tensors = dict(safetensors.deserialize(record))
        length = int.from_bytes(record[:8], "little")
        about = json.loads(json.loads(record[8 : 8 + length])["__metadata__"]["crcm"])
        latents, text = (
            np.frombuffer(entry["data"], TYPES[entry["dtype"]]).reshape(entry["shape"])
            for entry in (tensors["latents"], tensors["text"])
        )
        example = Example(about["key"], latents, text, about["prompt"])
        if not (isinstance(example.key, str) and isinstance(example.prompt, str)):
            raise TypeError("its key or its prompt is no text")
        return example
    except (safetensors.SafetensorError, LookupError, ValueError, TypeError, RecursionError) as error:
        raise DamagedExample(f"{name} is not a record of latents and text ({error})") from None
