"""Names of the Wan autoencoders' tensors: native checkpoints and diffusers, against ours.

An entry is `(foreign name, our path, transform)`: our path joins the keys of the nested parameter dict with dots, and
the transform names the change of layout from theirs to ours:

* "same": none
* "conv2d": OIHW → HWIO
* "conv3d": OITHW → THWIO
* "gamma2d": `[C, 1, 1]` → `[C]`
* "gamma3d": `[C, 1, 1, 1]` → `[C]`

The names depend on how deep a network is, not on its widths: tables are made for `config`, anything with the fields
`blocks`, `multipliers`, `temporal`, `encoder_dim`, `decoder_dim` and `residual` of `WanVAEConfig`. Sources:
spec wan21 2.1, spec cosmos3 6.2; native 2.2 nests a stage's layers (`upsamples.{s}.upsamples.{j}`), 2.1 counts them
through.
"""

from __future__ import annotations

from collections.abc import Iterator

Entry = tuple[str, str, str]

_BLOCK = {
    # ours: (native, diffusers, layout)
    "norm1": ("residual.0", "norm1", "gamma3d"),
    "conv1": ("residual.2", "conv1", "conv3d"),
    "norm2": ("residual.3", "norm2", "gamma3d"),
    "conv2": ("residual.6", "conv2", "conv3d"),
}
_SHORTCUT = {"shortcut": ("shortcut", "conv_shortcut", "conv3d")}
_ATTENTION = {
    "norm": ("norm", "norm", "gamma2d"),
    "qkv": ("to_qkv", "to_qkv", "conv2d"),
    "proj": ("proj", "proj", "conv2d"),
}
_RESAMPLE = {"conv": ("resample.1", "resample.1", "conv2d")}
_TIME = {"time_conv": ("time_conv", "time_conv", "conv3d")}
_ENDS = {
    "conv_in": ("conv1", "conv_in", "conv3d"),
    "norm_out": ("head.0", "norm_out", "gamma3d"),
    "conv_out": ("head.2", "conv_out", "conv3d"),
}
_MIDDLE = {
    "block0": ("middle.0", "mid_block.resnets.0", _BLOCK),
    "attention": ("middle.1", "mid_block.attentions.0", _ATTENTION),
    "block1": ("middle.2", "mid_block.resnets.1", _BLOCK),
}
_QUANT = {
    "encoder.quant_conv": ("conv1", "quant_conv", "conv3d"),
    "decoder.post_quant_conv": ("conv2", "post_quant_conv", "conv3d"),
}


def native(config) -> list[Entry]:
    """`Wan2.1_VAE.pth`, `Wan2.2_VAE.pth`."""
    return _entries(config, 0)


def diffusers(config) -> list[Entry]:
    """`AutoencoderKLWan`."""
    return _entries(config, 1)


def _entries(config, layout: int) -> list[Entry]:
    out = list(_parts("", "", _QUANT, layout))
    for name in ("encoder", "decoder"):
        out += _parts(f"{name}.", f"{name}.", _ENDS, layout)
        for ours, (*foreign, parts) in _MIDDLE.items():
            out += _parts(f"{name}.{foreign[layout]}.", f"{name}.middle.{ours}.", parts, layout)
        for s, (inputs, outputs, blocks, time) in enumerate(_stages(config, name)):
            for r in range(blocks):
                widens = r == 0 and inputs != outputs
                place = f"{name}.{_place(config, layout, name, s, r, blocks)}."
                out += _parts(place, f"{name}.stage{s}.block{r}.", _BLOCK | (_SHORTCUT if widens else {}), layout)
            if time is not None:
                place = f"{name}.{_place(config, layout, name, s, blocks, blocks)}."
                out += _parts(place, f"{name}.stage{s}.resample.", _RESAMPLE | (_TIME if time else {}), layout)
    return out


def _parts(foreign: str, ours: str, parts: dict, layout: int) -> Iterator[Entry]:
    for name, (*names, transform) in parts.items():
        if transform.startswith("gamma"):
            yield f"{foreign}{names[layout]}.gamma", f"{ours}{name}.scale", transform
        else:
            yield f"{foreign}{names[layout]}.weight", f"{ours}{name}.kernel", transform
            yield f"{foreign}{names[layout]}.bias", f"{ours}{name}.bias", "same"


def _stages(config, name: str) -> Iterator[tuple[int, int, int, bool | None]]:
    """(width in, width out, blocks, whether the change of resolution is temporal or None for no change) by stage."""
    encoder = name == "encoder"
    dim = config.encoder_dim if encoder else config.decoder_dim
    widths = [dim * m for m in (config.multipliers if encoder else reversed(config.multipliers))]
    times = [*(config.temporal if encoder else reversed(config.temporal)), None]
    inputs = dim if encoder else widths[0]
    for outputs, time in zip(widths, times):
        yield inputs, outputs, config.blocks if encoder else config.blocks + 1, time
        inputs = outputs if encoder or config.residual else outputs // 2


def _place(config, layout: int, name: str, s: int, r: int, blocks: int) -> str:
    """The foreign name of layer r of stage s, the change of resolution being layer number `blocks`."""
    plural, down = ("downsamples", True) if name == "encoder" else ("upsamples", False)
    counted = s * (blocks + 1) + r
    if layout == 0:
        return f"{plural}.{s}.{plural}.{r}" if config.residual else f"{plural}.{counted}"
    stage = "down_blocks" if down else "up_blocks"
    if down and not config.residual:
        return f"{stage}.{counted}"
    if r < blocks:
        return f"{stage}.{s}.resnets.{r}"
    return f"{stage}.{s}.{'downsampler' if down else 'upsampler' if config.residual else 'upsamplers.0'}"
