"""Names of the UMT5 encoder's tensors: Wan's native checkpoint and transformers, against ours.

An entry is `(foreign pattern, our path, transform)`. `{i}` stands for the layer's number; ours stacks the layers on a
leading axis. Transforms: "same"; "linear", `[out, in]` → `[in, out]`. Sources: spec wan21 3,
spec cosmos3 6.3.
"""

from __future__ import annotations

NATIVE = (
    ("token_embedding.weight", "embedding", "same"),
    ("blocks.{i}.norm1.weight", "layers.norm1.scale", "same"),
    ("blocks.{i}.attn.q.weight", "layers.attention.q.kernel", "linear"),
    ("blocks.{i}.attn.k.weight", "layers.attention.k.kernel", "linear"),
    ("blocks.{i}.attn.v.weight", "layers.attention.v.kernel", "linear"),
    ("blocks.{i}.attn.o.weight", "layers.attention.o.kernel", "linear"),
    ("blocks.{i}.pos_embedding.embedding.weight", "layers.attention.position", "same"),
    ("blocks.{i}.norm2.weight", "layers.norm2.scale", "same"),
    ("blocks.{i}.ffn.gate.0.weight", "layers.ffn.gate.kernel", "linear"),
    ("blocks.{i}.ffn.fc1.weight", "layers.ffn.up.kernel", "linear"),
    ("blocks.{i}.ffn.fc2.weight", "layers.ffn.down.kernel", "linear"),
    ("norm.weight", "norm.scale", "same"),
)

TRANSFORMERS = (
    ("shared.weight", "embedding", "same"),
    ("encoder.block.{i}.layer.0.layer_norm.weight", "layers.norm1.scale", "same"),
    ("encoder.block.{i}.layer.0.SelfAttention.q.weight", "layers.attention.q.kernel", "linear"),
    ("encoder.block.{i}.layer.0.SelfAttention.k.weight", "layers.attention.k.kernel", "linear"),
    ("encoder.block.{i}.layer.0.SelfAttention.v.weight", "layers.attention.v.kernel", "linear"),
    ("encoder.block.{i}.layer.0.SelfAttention.o.weight", "layers.attention.o.kernel", "linear"),
    (
        "encoder.block.{i}.layer.0.SelfAttention.relative_attention_bias.weight",
        "layers.attention.position",
        "same",
    ),
    ("encoder.block.{i}.layer.1.layer_norm.weight", "layers.norm2.scale", "same"),
    ("encoder.block.{i}.layer.1.DenseReluDense.wi_0.weight", "layers.ffn.gate.kernel", "linear"),
    ("encoder.block.{i}.layer.1.DenseReluDense.wi_1.weight", "layers.ffn.up.kernel", "linear"),
    ("encoder.block.{i}.layer.1.DenseReluDense.wo.weight", "layers.ffn.down.kernel", "linear"),
    ("encoder.final_layer_norm.weight", "norm.scale", "same"),
)

TRANSFORMERS_ALIASES = {"encoder.embed_tokens.weight": "shared.weight"}
"""Second names of a tensor: a file may hold either one, or both."""
