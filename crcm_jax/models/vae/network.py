"""The encoder and decoder of the Wan autoencoders (spec wan21 2.1), 2.1 and 2.2 by configuration.

Parameter names are `stage{s}.block{r}.…`, with stages counted from the input of each network. Like its layers, a
network takes and returns `past`: None at the start of a clip, later what the last call returned.
"""

from __future__ import annotations

import jax
from einops import rearrange
from flax import nnx

from crcm_jax.models.vae.config import WanVAEConfig
from crcm_jax.models.vae.layers import (
    Attention,
    CausalConv,
    Conv,
    Downsample,
    ResidualBlock,
    RmsNorm,
    Upsample,
    average_down,
    duplicate_up,
)


class Stage(nnx.Module):
    """Residual blocks at one resolution, then a change of resolution, if any."""

    def __init__(self, inputs: int, outputs: int, blocks: int, resample, c: WanVAEConfig, rngs: nnx.Rngs):
        for r in range(blocks):
            setattr(self, f"block{r}", ResidualBlock(outputs if r else inputs, outputs, c, rngs))
        self.blocks, self.changes = blocks, resample is not None
        if self.changes:
            self.resample = resample

    def __call__(self, x, past=None):
        past, kept = past or {}, {}
        for name in (f"block{r}" for r in range(self.blocks)):
            x, kept[name] = getattr(self, name)(x, past.get(name))
        if self.changes:
            x, kept["resample"] = self.resample(x, past.get("resample"))
        return x, kept


class Middle(nnx.Module):
    """Residual block, attention within each frame, residual block."""

    def __init__(self, channels: int, c: WanVAEConfig, rngs: nnx.Rngs):
        self.block0, self.block1 = (ResidualBlock(channels, channels, c, rngs) for _ in range(2))
        self.attention = Attention(channels, c, rngs)

    def __call__(self, x, past=None):
        past = past or {}
        x, first = self.block0(x, past.get("block0"))
        x, second = self.block1(self.attention(x), past.get("block1"))
        return x, {"block0": first, "block1": second}


class Encoder(nnx.Module):
    """Pixels `[batch, frame, height, width, 3]` → means and log variances, `[…, 2·channels]`, not normalised.

    The first call takes 1 + 4k frames and gives 1 + k, later ones 4k and k.
    """

    def __init__(self, c: WanVAEConfig, rngs: nnx.Rngs):
        widths = [c.encoder_dim * m for m in (1, *c.multipliers)]
        self.conv_in = CausalConv(3 * c.patch**2, widths[0], (3, 3, 3), c, rngs, padding=1)
        for s, (inputs, outputs) in enumerate(zip(widths, widths[1:])):
            down = Downsample(outputs, c.temporal[s], c, rngs) if s < len(c.temporal) else None
            setattr(self, f"stage{s}", Stage(inputs, outputs, c.blocks, down, c, rngs))
        self.middle = Middle(widths[-1], c, rngs)
        self.norm_out = RmsNorm(widths[-1], c)
        self.conv_out = CausalConv(widths[-1], 2 * c.channels, (3, 3, 3), c, rngs, padding=1)
        self.quant_conv = Conv(2 * c.channels, 2 * c.channels, (1, 1, 1), c, rngs)
        self.config, self.widths = c, tuple(widths)

    def __call__(self, x, past=None):
        c, past, kept = self.config, past or {}, {}
        # Channel order (colour, column, row), the colour slowest.
        x = rearrange(x, "b f (h p) (w q) c -> b f h w (c q p)", p=c.patch, q=c.patch)
        x, kept["conv_in"] = self.conv_in(x, past.get("conv_in"))
        for s, outputs in enumerate(self.widths[1:]):
            name = f"stage{s}"
            y, kept[name] = getattr(self, name)(x, past.get(name))
            if c.residual:
                last = s == len(c.temporal)
                time = 2 if not last and c.temporal[s] else 1
                y = y + average_down(x, outputs, time, 1 if last else 2)
            x = y
        x, kept["middle"] = self.middle(x, past.get("middle"))
        x, kept["conv_out"] = self.conv_out(jax.nn.silu(self.norm_out(x)), past.get("conv_out"))
        return self.quant_conv(x), kept


class Decoder(nnx.Module):
    """Latents `[batch, frame, height, width, channel]`, not normalised, → pixels `[…, 3]`, not clipped.

    The first call takes 1 + k frames and gives 1 + 4k, later ones k and 4k.
    """

    def __init__(self, c: WanVAEConfig, rngs: nnx.Rngs):
        widths = [c.decoder_dim * m for m in (c.multipliers[-1], *reversed(c.multipliers))]
        self.temporal = tuple(reversed(c.temporal))
        self.post_quant_conv = Conv(c.channels, c.channels, (1, 1, 1), c, rngs)
        self.conv_in = CausalConv(c.channels, widths[0], (3, 3, 3), c, rngs, padding=1)
        self.middle = Middle(widths[0], c, rngs)
        for s, (inputs, outputs) in enumerate(zip(widths, widths[1:])):
            # In 2.1 an upsampling also halves the channels; in 2.2 the next stage's first block does.
            inputs = inputs if c.residual or s == 0 else inputs // 2
            up = None
            if s < len(self.temporal):
                up = Upsample(outputs, outputs if c.residual else outputs // 2, self.temporal[s], c, rngs)
            setattr(self, f"stage{s}", Stage(inputs, outputs, c.blocks + 1, up, c, rngs))
        self.norm_out = RmsNorm(widths[-1], c)
        self.conv_out = CausalConv(widths[-1], 3 * c.patch**2, (3, 3, 3), c, rngs, padding=1)
        self.config, self.widths = c, tuple(widths)

    def __call__(self, x, past=None):
        c, start, past, kept = self.config, past is None, past or {}, {}
        x, kept["conv_in"] = self.conv_in(self.post_quant_conv(x), past.get("conv_in"))
        x, kept["middle"] = self.middle(x, past.get("middle"))
        for s, outputs in enumerate(self.widths[1:]):
            name = f"stage{s}"
            y, kept[name] = getattr(self, name)(x, past.get(name))
            if c.residual and s < len(self.temporal):
                y = y + duplicate_up(x, outputs, 2 if self.temporal[s] else 1, 2, start)
            x = y
        x, kept["conv_out"] = self.conv_out(jax.nn.silu(self.norm_out(x)), past.get("conv_out"))
        return rearrange(x, "b f h w (c q p) -> b f (h p) (w q) c", p=c.patch, q=c.patch), kept
