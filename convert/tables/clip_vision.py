"""Names of the CLIP vision tower's tensors: Wan's native checkpoint and transformers, against ours.

An entry is `(foreign pattern, our path, transform)`. `{i}` stands for the layer's number, ours stacks the layers on a
leading axis; `[1/3]` stands for the second of three equal parts of a tensor's first axis. Transforms: "same"; "linear",
`[out, in]` → `[in, out]`; "conv2d", OIHW → HWIO; "unit" and "units", one or two leading axes of one dropped.

The native file, `models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth`, holds a text tower beside the vision tower,
and so do CLIP's own folders: Wan never reads it, and it is passed over. Names as in
`Wan2.1: wan/modules/clip.py` and transformers' `CLIPVisionModel` and `CLIPVisionModelWithProjection`.
"""

from __future__ import annotations

Entry = tuple[str, str, str]


def _linear(foreign: str, ours: str, part: str = "") -> tuple[Entry, Entry]:
    return (f"{foreign}.weight{part}", f"{ours}.kernel", "linear"), (f"{foreign}.bias{part}", f"{ours}.bias", "same")


def _norm(foreign: str, ours: str) -> tuple[Entry, Entry]:
    return (f"{foreign}.weight", f"{ours}.scale", "same"), (f"{foreign}.bias", f"{ours}.bias", "same")


_LAYER, _HF_LAYER = "visual.transformer.{i}", "vision_model.encoder.layers.{i}"

NATIVE = (
    ("visual.patch_embedding.weight", "patch_embedding", "conv2d"),
    ("visual.cls_embedding", "class_token", "units"),
    ("visual.pos_embedding", "position", "unit"),
    *_norm("visual.pre_norm", "norm_in"),
    *_norm(f"{_LAYER}.norm1", "layers.norm1"),
    *(e for i, x in enumerate("qkv") for e in _linear(f"{_LAYER}.attn.to_qkv", f"layers.attention.{x}", f"[{i}/3]")),
    *_linear(f"{_LAYER}.attn.proj", "layers.attention.o"),
    *_norm(f"{_LAYER}.norm2", "layers.norm2"),
    *_linear(f"{_LAYER}.mlp.0", "layers.mlp.up"),
    *_linear(f"{_LAYER}.mlp.2", "layers.mlp.down"),
    *_norm("visual.post_norm", "norm_out"),
)
NATIVE_PROJECTION = (("visual.head", "projection", "same"),)

TRANSFORMERS = (
    ("vision_model.embeddings.patch_embedding.weight", "patch_embedding", "conv2d"),
    ("vision_model.embeddings.class_embedding", "class_token", "same"),
    ("vision_model.embeddings.position_embedding.weight", "position", "same"),
    *_norm("vision_model.pre_layrnorm", "norm_in"),
    *_norm(f"{_HF_LAYER}.layer_norm1", "layers.norm1"),
    *(e for x in "qkv" for e in _linear(f"{_HF_LAYER}.self_attn.{x}_proj", f"layers.attention.{x}")),
    *_linear(f"{_HF_LAYER}.self_attn.out_proj", "layers.attention.o"),
    *_norm(f"{_HF_LAYER}.layer_norm2", "layers.norm2"),
    *_linear(f"{_HF_LAYER}.mlp.fc1", "layers.mlp.up"),
    *_linear(f"{_HF_LAYER}.mlp.fc2", "layers.mlp.down"),
    *_norm("vision_model.post_layernorm", "norm_out"),
)
TRANSFORMERS_PROJECTION = (("visual_projection.weight", "projection", "linear"),)

TRANSFORMERS_ALIASES = {name.removeprefix("vision_model."): name for name, _, _ in TRANSFORMERS}
"""`CLIPVisionModel` of transformers 5 saves its tensors without the prefix, and loads them with it too."""

UNUSED = (
    r"textual\..*|log_scale|text_model\..*|text_projection\.weight|logit_scale"
    r"|(vision_model\.)?embeddings\.position_ids"
)
"""The text tower and its temperature, and the numbers of the positions, 0 to 256, that older files hold."""


def native(projection: bool) -> tuple[Entry, ...]:
    """Wan's own checkpoint."""
    return NATIVE + NATIVE_PROJECTION * projection


def transformers(projection: bool) -> tuple[Entry, ...]:
    """`CLIPVisionModelWithProjection`, or without its projection `CLIPVisionModel`."""
    return TRANSFORMERS + TRANSFORMERS_PROJECTION * projection
