"""Causal-rCM in JAX: distil a bidirectional video diffusion model into a causal one that streams.

`dir(crcm_jax)` is the public surface. Every name below is loaded when it is first asked for, so that `import crcm_jax`
itself costs nothing.

What is computed
    ChunkPattern             which frames stand together, and what they see of earlier ones
    Condition                what a clip is conditioned on: prompt, first image
    flow                     the algebra of rectified flow, and distributions of times
    attention                flash attention with masks as descriptions, forward- and reverse-mode derivatives
    Mask, Full, BlockCausal, TeacherForcing, Cached, Intervals
                             the descriptions of masks

Networks and codecs
    Network, Codec, TextEncoder
                             what samplers and objectives ask of them
    WanTransformer, WanConfig
                             Wan2.1's transformer, of any size
    WanVAE, PixelCodec       videos to latents and back
    Bound                    a network with its parameters, which samplers and objectives take
    load_params, save_params
                             weights on disk

Training
    RECIPES, Recipe          training types, declared: who learns from what, and when

Sampling
    Schedule, ContextRule    how many steps each chunk takes and at which times; which context it leaves
    Session, fork            a stream as a value, of any length, that may hear another prompt on its way
    Few, Ode                 solvers of few-step students and of causal diffusion models
    stream, generate         a clip chunk by chunk, as it comes or as a whole
    Whole, generate_whole    a clip of a bidirectional model
    rollout                  a clip as training on own rollouts simulates it

Errors
    UserError                a wrong input, said in one sentence
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "BlockCausal": "pallas_kernels.attention",
    "Cached": "pallas_kernels.attention",
    "ChunkPattern": "crcm_jax.chunks",
    "Codec": "crcm_jax.models.base",
    "Condition": "crcm_jax.models.base",
    "Few": "crcm_jax.sampling",
    "Full": "pallas_kernels.attention",
    "Intervals": "pallas_kernels.attention",
    "Mask": "pallas_kernels.attention",
    "Network": "crcm_jax.models.base",
    "Ode": "crcm_jax.sampling",
    "PixelCodec": "crcm_jax.models.vae.pixels",
    "Bound": "crcm_jax.models.bound",
    "ContextRule": "crcm_jax.sampling",
    "RECIPES": "crcm_jax.recipes",
    "Recipe": "crcm_jax.recipes",
    "Schedule": "crcm_jax.sampling",
    "Session": "crcm_jax.sampling",
    "fork": "crcm_jax.sampling",
    "TeacherForcing": "pallas_kernels.attention",
    "TextEncoder": "crcm_jax.models.base",
    "UserError": "crcm_jax.errors",
    "WanConfig": "crcm_jax.models.wan.config",
    "WanTransformer": "crcm_jax.models.wan.transformer",
    "WanVAE": "crcm_jax.models.vae.wan",
    "Whole": "crcm_jax.sampling",
    "attention": "pallas_kernels.attention",
    "generate": "crcm_jax.sampling",
    "generate_whole": "crcm_jax.sampling",
    "load_params": "crcm_jax.saving.weights",
    "rollout": "crcm_jax.sampling.rollout",
    "save_params": "crcm_jax.saving.weights",
    "stream": "crcm_jax.sampling",
}
"""Public name → the module that it is taken from. No name of a sub-package's: importing that would take its place."""

_MODULES = ("flow",)
"""Modules that are public as they are."""

__all__ = sorted([*_HOMES, *_MODULES])


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _HOMES:
        raise AttributeError(f"crcm_jax has no {name!r}: dir(crcm_jax) lists what it has")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value  # so that the next look-up does not come here
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
