"""Tiny models as foreign files: random bits under the names that the layouts give them."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file

from crcm_jax.convert import engine, models
from crcm_jax.models.text.umt5 import UMT5Config
from crcm_jax.models.vae.config import WanVAEConfig
from crcm_jax.models.vision.clip import CLIPVisionConfig
from crcm_jax.models.wan.config import WanConfig

SIZES = {"dim": 24, "ffn_dim": 48, "heads": 2, "layers": 3, "freq_dim": 32, "text_dim": 20}
TINY = {
    "t2v": models.Model(models.TRANSFORMER, "wan-transformer", WanConfig(**SIZES)),
    "i2v": models.Model(models.TRANSFORMER, "wan-transformer", WanConfig(**SIZES, in_channels=36, image_dim=10)),
    "vae21": models.Model(
        models.VAE_21, "wan2.1-vae", WanVAEConfig.wan21(encoder_dim=4, decoder_dim=4, dtype="float32")
    ),
    "vae22": models.Model(
        models.VAE_22, "wan2.2-vae", WanVAEConfig.wan22(encoder_dim=8, decoder_dim=8, dtype="float32")
    ),
    "umt5": models.Model(
        models.UMT5, "umt5", UMT5Config(vocabulary=40, dim=16, heads=2, head_dim=8, ffn_dim=24, layers=3)
    ),
    "clip": models.Model(
        models.CLIP,
        "clip-vision",
        CLIPVisionConfig(dim=12, ffn_dim=20, heads=2, layers=3, image=6, patch=2, projection=5),
    ),
    "clip-bare": models.Model(
        models.CLIP, "clip-vision", CLIPVisionConfig(dim=12, ffn_dim=20, heads=2, layers=3, image=6, patch=2)
    ),
}
TYPES = {"F32": np.float32, "BF16": ml_dtypes.bfloat16, "F16": np.float16}


def shapes(model: models.Model, layout: str) -> dict[str, tuple[int, ...]]:
    """The foreign tensors of a model."""
    return {place.name: engine.tensor_shape(model, slot, place) for slot, place in engine.places(model, layout).items()}


def tensors(model: models.Model, layout: str = "native", seed: int = 0, kind: str | None = None) -> dict:
    """Random tensors; matrices in bfloat16 and the rest in float32, as mixed files have it, unless `kind` says."""
    rng = np.random.default_rng(seed)
    return {
        name: rng.standard_normal(shape).astype(TYPES[kind or ("BF16" if len(shape) > 1 else "F32")])
        for name, shape in shapes(model, layout).items()
    }


def save(path: Path, arrays: dict) -> Path:
    """Writes a .safetensors file by the format's own library."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(arrays, path)
    return path


def load(path: Path) -> dict:
    """A file's or a folder's tensors, by the format's own library."""
    if path.suffix in (".pth", ".pt"):
        import torch

        state = torch.load(path, weights_only=True)
        carriers = {torch.bfloat16: (torch.int16, ml_dtypes.bfloat16), torch.float32: (torch.int32, np.float32)}
        return {n: t.view(carriers[t.dtype][0]).numpy().view(carriers[t.dtype][1]) for n, t in state.items()}
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    return {name: array for file in files for name, array in load_file(file).items()}


def same(a: dict, b: dict) -> bool:
    """Whether two sets of tensors agree in names, types, shapes and every byte."""
    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype and a[n].shape == b[n].shape and a[n].tobytes() == b[n].tobytes() for n in a
    )


def quiet(line: str) -> None:
    """Somewhere for the engine to say things to."""
