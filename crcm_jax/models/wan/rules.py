"""How a mesh cuts the parameters of Wan's transformer."""

from __future__ import annotations

from jax.sharding import PartitionSpec as P

from crcm_jax.parallel.rules import Table

_ATTENTION = r"blocks/(self|cross)_attn/"

RULES: Table = (
    # Stacked layers: the first axis is the scan's and stays whole, so that a step of the scan gathers one layer.
    (_ATTENTION + r"(q|k|v|k_img|v_img)/kernel", P(None, "fsdp", "tensor")),
    (_ATTENTION + r"o/kernel", P(None, "tensor", "fsdp")),
    (r"blocks/ffn/up/kernel", P(None, "fsdp", "tensor")),
    (r"blocks/ffn/down/kernel", P(None, "tensor", "fsdp")),
    # What meets a tensor-parallel activation is cut as that is: heads, or feed-forward width.
    (_ATTENTION + r"(q|k|v|k_img|v_img)/bias", P(None, "tensor")),
    (_ATTENTION + r"norm_\w+/scale", P(None, "tensor")),
    (r"blocks/ffn/up/bias", P(None, "tensor")),
    (r"outside/.*kernel", P("fsdp", None)),
)
