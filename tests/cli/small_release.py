"""Published models in small, and a folder of their weights as `crcm convert` and a tokenizer make it."""

import dataclasses
from pathlib import Path

import pytest
import tiny

from crcm_jax import parts
from crcm_jax.models import registry
from crcm_jax.models.family import Release
from crcm_jax.models.text.umt5 import UMT5Config, UMT5Encoder
from crcm_jax.models.vae.wan import WanVAE
from crcm_jax.models.vision.clip import CLIPVisionConfig
from crcm_jax.models.wan.config import WanConfig
from crcm_jax.models.wan.transformer import WanTransformer
from crcm_jax.saving.weights import save_params

_TEXT = {"vocabulary": 60, "dim": 16, "heads": 2, "head_dim": 8, "ffn_dim": 24, "layers": 1, "dtype": "float32"}
_IMAGE = {"dim": 10, "ffn_dim": 12, "heads": 2, "layers": 2, "image": 8, "patch": 4, "projection": 3}

ROW = Release(
    model={
        "dim": 24, "ffn_dim": 32, "heads": 2, "layers": 2, "freq_dim": 16, "text_dim": 16, "dtype": "float32",
        "remat": "none",
    },
    codec={
        "name": "wan_vae", "encoder_dim": 8, "decoder_dim": 8, "multipliers": (1, 1, 1), "temporal": (True, True),
        "blocks": 1, "dtype": "float32",
    },
    text={"name": "umt5", "length": 12, **_TEXT},
)  # fmt: skip
"""The published model's parts, small: 4 pixels and 4 frames a latent one, so that 9 frames are 3 latent ones."""

ROW_I2V = dataclasses.replace(ROW, model={**ROW.model, "in_channels": 36, "image_dim": 10}, image=_IMAGE)
"""The image-to-video model's, small."""


class Small:
    """The configurations of a row's parts."""

    def __init__(self, row: Release):
        self.transformer = WanConfig(**registry.fields(row.model)[1])
        self.vae, self.text = parts.codec_of(row.codec).config, UMT5Config(**_TEXT)
        self.image = row.image and CLIPVisionConfig(**row.image)


SMALL, SMALL_I2V = Small(ROW), Small(ROW_I2V)


def register(patch: pytest.MonkeyPatch) -> None:
    """Makes `small` and `small-i2v` names of published models."""
    patch.setitem(registry.RELEASES, "small", ROW)
    patch.setitem(registry.RELEASES, "small-i2v", ROW_I2V)


def write(folder: Path) -> Path:
    """Random weights of `SMALL`, and a tokenizer."""
    pytest.importorskip("ftfy", reason="needs ftfy (pip install -e .[text])")
    tokenizers = pytest.importorskip("tokenizers", reason="needs tokenizers (pip install -e .[text])")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.Unigram())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    trainer = tokenizers.trainers.UnigramTrainer(
        vocab_size=60, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>"
    )
    tokenizer.train_from_iterator(["a cat walks over the street", "a dog sees a ball"] * 20, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    parts = {
        "transformer": WanTransformer(SMALL.transformer),
        "vae": WanVAE(SMALL.vae),
        "text_encoder": UMT5Encoder(SMALL.text),
    }
    for seed, (name, network) in enumerate(parts.items()):
        save_params(folder / f"{name}.safetensors", tiny.parameters(network, seed), {})
    return folder
