"""Ours beside diffusers' classes on the same device in the same run (see `bench` and `bench_vae`)."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import torch

from benchmarks.clock import seconds
from crcm_jax.convert.tables import wan_transformer as tables
from crcm_jax.models.base import Condition
from crcm_jax.models.bound import Bound
from crcm_jax.models.wan.config import WanConfig
from crcm_jax.models.wan.transformer import WanTransformer

TIME = 0.7
"""1000·t is a whole number that bfloat16 holds, so that no rounding of the time hides in the comparison."""


def compare(c: WanConfig, params, shape, cond: Condition, repeats: int) -> None:
    """Prints times in bfloat16 and largest differences, relative to the largest velocity in float32."""
    try:
        from diffusers import WanTransformer3DModel
    except ImportError as error:
        print(f"no comparison with diffusers: {error}")
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    with torch.device("meta"):
        model = WanTransformer3DModel(
            patch_size=c.patch, num_attention_heads=c.heads, attention_head_dim=c.head_dim, in_channels=c.in_channels,
            out_channels=c.out_channels, text_dim=c.text_dim, freq_dim=c.freq_dim, ffn_dim=c.ffn_dim,
            num_layers=c.layers, cross_attn_norm=True, qk_norm="rms_norm_across_heads", eps=c.eps,
        ).eval()  # fmt: skip
    rope = WanTransformer3DModel(num_layers=0, attention_head_dim=c.head_dim).rope  # its tables are no parameters
    x = jax.random.normal(jax.random.key(1), shape)
    theirs_in = torch.from_dlpack(jnp.moveaxis(x, -1, 1)).to(device), torch.from_dlpack(cond.prompt["text"]).to(device)
    outputs = {}
    for name, dtype in (("bfloat16", torch.bfloat16), ("float32", torch.float32)):
        own = dataclasses.replace(c, dtype=name)
        velocity = jax.jit(Bound.velocity)
        ours = functools.partial(velocity, Bound(WanTransformer(own), params), x, jnp.full((1, 1), TIME), cond)
        model.load_state_dict(_state(c, params, dtype, device), assign=True)
        model.rope = rope.to(device)

        @torch.no_grad()
        def theirs(dtype=dtype):
            clip, text = (a.to(dtype) for a in theirs_in)
            time = torch.tensor([1000 * TIME], device=device)
            y = model(clip, time, text, return_dict=False)[0]
            return y.movedim(1, -1).float().cpu().numpy()

        outputs["ours", name], outputs["diffusers", name] = jnp.asarray(ours(), jnp.float32), jnp.asarray(theirs())
        if name == c.dtype:
            took = {"ours": seconds(ours, repeats), "diffusers": seconds(theirs, repeats)}
            print("velocity, bidirectional, " + ", ".join(f"{who}: {s:.3f} s" for who, s in took.items()), flush=True)
    right = outputs["diffusers", "float32"]
    for key, found in outputs.items():
        error = float(jnp.abs(found - right).max() / jnp.abs(right).max())
        mean = float(jnp.sqrt(jnp.mean((found - right) ** 2) / jnp.mean(right**2)))
        print(f"{' '.join(key):20s} against diffusers float32: largest {error:.1e}, mean square {mean:.1e}")


def vae(frames: int, height: int, width: int, repeats: int) -> None:
    """Prints times and peak memory of diffusers' `AutoencoderKLWan` 2.1, bfloat16, its own random weights, one clip."""
    try:
        from diffusers import AutoencoderKLWan
    except ImportError as error:
        print(f"no comparison with diffusers: {error}")
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoencoderKLWan().eval().to(device, torch.bfloat16)
    video = torch.rand(1, 3, frames, height, width, device=device, dtype=torch.bfloat16) * 2 - 1
    z = torch.randn(1, 16, 1 + (frames - 1) // 4, height // 8, width // 8, device=device, dtype=torch.bfloat16)

    @torch.no_grad()
    def finished(function, argument):
        result = function(argument, return_dict=False)
        if device == "cuda":
            torch.cuda.synchronize()
        del result
        return 0

    for name, function, argument in (("decode", model.decode, z), ("encode", model.encode, video)):
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        took = seconds(functools.partial(finished, function, argument), repeats)
        peak = f"{torch.cuda.max_memory_allocated() / 2**30:.2f} GiB" if device == "cuda" else "memory not reported"
        print(f"diffusers, {name:9s} {took * 1e3:10.1f} ms {frames / took:8.1f} frames/s   {peak}", flush=True)


def _state(c: WanConfig, params, dtype, device) -> dict[str, torch.Tensor]:
    """Our weights under diffusers' names."""
    state = {}
    for name, path, transform in tables.diffusers(c.image_dim is not None):
        leaf = functools.reduce(lambda node, key: node[key], path.split("."), params)
        leaf = torch.from_dlpack(leaf).to(device, dtype)
        for i in range(c.layers) if "{i}" in name else (None,):
            x = leaf if i is None else leaf[i]
            if transform == "linear":
                x = x.T.contiguous()
            elif transform == "patch":
                x = x.T.reshape(x.shape[1], -1, *c.patch)
            elif transform == "unit":
                x = x[None]
            state[name.format(i=i)] = torch.nn.Parameter(x, requires_grad=False)
    return state
