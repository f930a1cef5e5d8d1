"""Published networks that several families use: text and image encoders, autoencoders. Licences: spec cosmos3 7."""

from __future__ import annotations

from crcm_jax.models.family import Part

PARTS = {
    "wan2.1-vae": Part("wan2.1-vae", {"version": "2.1"}, "Wan-AI/Wan2.1-T2V-1.3B"),
    # The licence file of this one's repository was not seen.
    "wan2.2-vae": Part("wan2.2-vae", {"version": "2.2"}, "Wan-AI/Wan2.2-TI2V-5B", "unknown"),
    "umt5-xxl": Part(
        "umt5",
        {"vocabulary": 256_384, "dim": 4096, "heads": 64, "head_dim": 64, "ffn_dim": 10_240, "layers": 24},
        "google/umt5-xxl",
    ),
    "clip-vit-h14": Part(
        "clip-vision",
        {"dim": 1280, "ffn_dim": 5120, "heads": 16, "layers": 32, "projection": 1024},
        "Wan-AI/Wan2.1-I2V-14B-480P",
    ),
}
"""By the names that `crcm convert --model` takes. An autoencoder's sizes and statistics stand in `models/vae/config.py`
by its version."""

FPS = {"pixels": 8.0, "wan_vae": 16.0}
"""Frames per second of clips, by the name of their codec, where nothing else is said."""
