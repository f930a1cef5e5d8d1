"""The judge of moving digits: a small convolutional network that says which digit a frame shows, and where.

It is trained in seconds on real training-split digits only, drawn wherever the data may draw them. Its features are
those of the Fréchet distances, so it also learns where the digits are: features of the class alone are blind to motion.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from flax import nnx

from crcm_jax.data import digits
from crcm_jax.errors import UserError

FEATURES = 32


class _Network(nnx.Module):
    def __init__(self, height: int, width: int, rngs: nnx.Rngs):
        widths, strides = (1, 16, 32, 48), (1, 2, 2)
        self.convolutions = nnx.List(
            nnx.Conv(before, after, (3, 3), (stride, stride), rngs=rngs)
            for before, after, stride in zip(widths, widths[1:], strides)
        )
        self.features = nnx.Linear(-(-height // 4) * -(-width // 4) * widths[-1], FEATURES, rngs=rngs)
        self.logits = nnx.Linear(FEATURES, 10, rngs=rngs)
        self.centre = nnx.Linear(FEATURES, 2, rngs=rngs)

    def __call__(self, frames):
        """Frames `[batch, height, width, 1]` → (class logits, centre (y, x) over the canvas's half sides, features)."""
        x = frames
        for convolution in self.convolutions:
            x = nnx.relu(convolution(x))
        features = self.features(x.reshape(len(x), -1))
        x = nnx.relu(features)
        return self.logits(x), self.centre(x), features


class Classifier:
    """A trained judge (see `train`), called on videos."""

    def __init__(self, apply, scale: np.ndarray, digits_per_clip: int):
        self._apply, self._scale, self.digits_per_clip = apply, scale, digits_per_clip

    def __call__(self, videos: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(class logits `[clip, frame, 10]`, features `[clip, frame, FEATURES]`) of `[clip, frame, height, width, 1]`.

        Features have about unit variance over the real data.
        """
        clips, frames = videos.shape[:2]
        # Pixels that a decoder let slip out of [−1, 1] are shown clipped, so they are judged clipped.
        flat = np.clip(np.asarray(videos, np.float32), -1, 1).reshape(-1, *videos.shape[2:])
        parts = [jax.device_get(self._apply(block)[0::2]) for block in _in_blocks(flat)]
        logits, features = (np.concatenate(part)[: len(flat)] for part in zip(*parts))
        return logits.reshape(clips, frames, -1), features.reshape(clips, frames, -1) / self._scale


def train(config: Any, *, steps: int = 500, batch: int = 128, seed: int = 0) -> Classifier:
    """A classifier for the clips of `config` (a `config.data` of the digits); about ten seconds on two cores.

    UserError if `config` is another data set's.
    """
    config = ml_collections.ConfigDict({**digits.default_config(), **config})
    if config.name != "digits":
        raise UserError(f'the classifier judges moving digits, and data.name is "{config.name}"')
    network, params = nnx.split(_Network(config.height, config.width, nnx.Rngs(seed)))
    optimizer = optax.adam(optax.cosine_onecycle_schedule(steps, 8e-3))

    def loss_fn(params, frames, target, centres):
        logits, where, _ = nnx.merge(network, params)(frames)
        return optax.softmax_cross_entropy(logits, target).mean() + jnp.mean((where - centres) ** 2)

    @jax.jit
    def step(params, state, *data):
        updates, state = optimizer.update(jax.grad(loss_fn)(params, *data), state)
        return optax.apply_updates(params, updates), state

    state, rng = optimizer.init(params), np.random.default_rng(seed)
    for _ in range(steps):
        params, state = step(params, state, *_draw(rng, config, batch))

    apply = jax.jit(lambda frames: nnx.merge(network, params)(frames))
    scale = np.asarray(apply(_draw(rng, config, 2048)[0])[2]).std(axis=0)
    return Classifier(apply, scale, config.digits)


def _draw(rng: np.random.Generator, config: Any, batch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(frames, class distribution, mean centre) of a training batch."""
    images, labels = digits.load_images("train")
    which = rng.integers(len(images), size=(batch, config.digits))
    low, high = digits.travel_box(config.height, config.width, config.digit_size)
    centres = rng.uniform(low, high, size=(batch, config.digits, 2)).astype(np.float32)
    # A little smaller or larger, turned and blurred by nothing but noise: what a person would still call that digit.
    size = config.digit_size * rng.uniform(0.9, 1.1)
    frames = digits.render(images[which], centres, config.height, config.width, size)
    frames = np.clip(frames + rng.normal(0, 0.1, frames.shape), -1, 1).astype(np.float32)
    half = np.array([config.height, config.width]) / 2
    return frames, np.eye(10, dtype=np.float32)[labels[which]].mean(1), ((centres - half) / half).mean(1)


def _in_blocks(frames: np.ndarray, size: int = 512):
    """Blocks of one length, the last one filled up, so that one program serves them all."""
    for start in range(0, len(frames), size):
        block = frames[start : start + size]
        yield np.pad(block, [(0, size - len(block))] + [(0, 0)] * (frames.ndim - 1))
