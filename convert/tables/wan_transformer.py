"""Names of the Wan transformer's tensors: native, rCM's and diffusers' checkpoints, against ours.

An entry is `(foreign pattern, our path, transform)`. `{i}` stands for the layer's number; ours stacks the layers on a
leading axis. Transforms, from theirs to ours: "same"; "linear", `[out, in]` → `[in, out]`; "patch", the convolution
over 1×2×2 patches `[out, channel, 1, 2, 2]` → `[channel·1·2·2, out]`, channel slowest; "unit", a leading axis of one
dropped. Sources: spec wan21 1.5, spec cosmos3 6.1.
"""

from __future__ import annotations

Entry = tuple[str, str, str]


def _linear(foreign: str, ours: str) -> tuple[Entry, Entry]:
    return (f"{foreign}.weight", f"{ours}.kernel", "linear"), (f"{foreign}.bias", f"{ours}.bias", "same")


def _norm(foreign: str, ours: str) -> tuple[Entry, Entry]:
    return (f"{foreign}.weight", f"{ours}.scale", "same"), (f"{foreign}.bias", f"{ours}.bias", "same")


def _attention(foreign: str, ours: str, *, o: str, **projections: str) -> list[Entry]:
    entries = [
        entry for letter, name in projections.items() for entry in _linear(f"{foreign}.{name}", f"{ours}.{letter}")
    ]
    entries += _linear(f"{foreign}.{o}", f"{ours}.o")
    return entries + [(f"{foreign}.norm_{x}.weight", f"{ours}.norm_{x}.scale", "same") for x in "qk"]


_THEIRS = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0"}
_SAME = {letter: letter for letter in "qkvo"}

NATIVE = (
    ("patch_embedding.weight", "outside.patch_embedding.kernel", "patch"),
    ("patch_embedding.bias", "outside.patch_embedding.bias", "same"),
    *_linear("text_embedding.0", "outside.text_embedding.up"),
    *_linear("text_embedding.2", "outside.text_embedding.down"),
    *_linear("time_embedding.0", "outside.time_embedding.up"),
    *_linear("time_embedding.2", "outside.time_embedding.down"),
    *_linear("time_projection.1", "outside.time_projection"),
    ("blocks.{i}.modulation", "blocks.modulation", "unit"),
    *_attention("blocks.{i}.self_attn", "blocks.self_attn", **_SAME),
    *_norm("blocks.{i}.norm3", "blocks.norm3"),
    *_attention("blocks.{i}.cross_attn", "blocks.cross_attn", **_SAME),
    *_linear("blocks.{i}.ffn.0", "blocks.ffn.up"),
    *_linear("blocks.{i}.ffn.2", "blocks.ffn.down"),
    ("head.modulation", "outside.head_modulation", "unit"),
    *_linear("head.head", "outside.head"),
)

NATIVE_IMAGE = (
    *_norm("img_emb.proj.0", "outside.image_embedding.norm_in"),
    *_linear("img_emb.proj.1", "outside.image_embedding.mlp.up"),
    *_linear("img_emb.proj.3", "outside.image_embedding.mlp.down"),
    *_norm("img_emb.proj.4", "outside.image_embedding.norm_out"),
    *_linear("blocks.{i}.cross_attn.k_img", "blocks.cross_attn.k_img"),
    *_linear("blocks.{i}.cross_attn.v_img", "blocks.cross_attn.v_img"),
    ("blocks.{i}.cross_attn.norm_k_img.weight", "blocks.cross_attn.norm_k_img.scale", "same"),
)
"""What image-to-video adds (Wan2.1)."""

DIFFUSERS = (
    ("patch_embedding.weight", "outside.patch_embedding.kernel", "patch"),
    ("patch_embedding.bias", "outside.patch_embedding.bias", "same"),
    *_linear("condition_embedder.text_embedder.linear_1", "outside.text_embedding.up"),
    *_linear("condition_embedder.text_embedder.linear_2", "outside.text_embedding.down"),
    *_linear("condition_embedder.time_embedder.linear_1", "outside.time_embedding.up"),
    *_linear("condition_embedder.time_embedder.linear_2", "outside.time_embedding.down"),
    *_linear("condition_embedder.time_proj", "outside.time_projection"),
    ("blocks.{i}.scale_shift_table", "blocks.modulation", "unit"),
    *_attention("blocks.{i}.attn1", "blocks.self_attn", **_THEIRS),
    *_norm("blocks.{i}.norm2", "blocks.norm3"),
    *_attention("blocks.{i}.attn2", "blocks.cross_attn", **_THEIRS),
    *_linear("blocks.{i}.ffn.net.0.proj", "blocks.ffn.up"),
    *_linear("blocks.{i}.ffn.net.2", "blocks.ffn.down"),
    ("scale_shift_table", "outside.head_modulation", "unit"),
    *_linear("proj_out", "outside.head"),
)

DIFFUSERS_IMAGE = (
    *_norm("condition_embedder.image_embedder.norm1", "outside.image_embedding.norm_in"),
    *_linear("condition_embedder.image_embedder.ff.net.0.proj", "outside.image_embedding.mlp.up"),
    *_linear("condition_embedder.image_embedder.ff.net.2", "outside.image_embedding.mlp.down"),
    *_norm("condition_embedder.image_embedder.norm2", "outside.image_embedding.norm_out"),
    *_linear("blocks.{i}.attn2.add_k_proj", "blocks.cross_attn.k_img"),
    *_linear("blocks.{i}.attn2.add_v_proj", "blocks.cross_attn.v_img"),
    ("blocks.{i}.attn2.norm_added_k.weight", "blocks.cross_attn.norm_k_img.scale", "same"),
)

DIFFUSERS_UNUSED = r"blocks\.\d+\.attn2\.norm_added_q\.weight"
"""In published image-to-video folders, and read by no version of the class: passed over."""

RCM_PREFIX = "net."


def native(image: bool) -> tuple[Entry, ...]:
    """Wan's own checkpoints, and Self-Forcing's; `image` for the image-to-video form."""
    return NATIVE + NATIVE_IMAGE * image


def diffusers(image: bool) -> tuple[Entry, ...]:
    """`WanTransformer3DModel`."""
    return DIFFUSERS + DIFFUSERS_IMAGE * image


def rcm(image: bool) -> tuple[Entry, ...]:
    """rCM and Causal-rCM: the native names, the patch embedding as the matrix that the convolution is."""
    first, *rest = native(image)
    return ((first[0], first[1], "linear"), *rest)
