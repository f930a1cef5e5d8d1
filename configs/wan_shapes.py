"""Wan2.1's shapes at 480p, for measuring and for compiling ahead of time; its data are stand-ins, nothing to train on.

    crcm aot --config=configs/wan_shapes.py:tf_scm,1.3B,14B --topology=v5p:4x4x4 --config.mesh.fsdp=64

A variant is a training type, the student's size, and the size of teacher and both scores [the student's].
"""

from ml_collections import ConfigDict

from crcm_jax.configs import digits

SIZES = {
    "1.3B": {"dim": 1536, "ffn_dim": 8960, "heads": 12, "layers": 30},
    "14B": {"dim": 5120, "ffn_dim": 13824, "heads": 40, "layers": 40},
}


def get_config(variant: str = "tf_scm,1.3B") -> ConfigDict:
    training, student, *others = [*variant.split(","), "1.3B"][: max(2, variant.count(",") + 1)]
    for size in (student, *others):
        if size not in SIZES:
            raise ValueError(f"configs/wan_shapes.py knows no size {size!r}: choose one of {', '.join(SIZES)}")
    c = digits.get_config(training)
    c.param_dtype = "bfloat16"
    # 21 frames of 60×104 latents with 16 channels: 81 frames of 480×832 pixels through Wan's VAE.
    c.data.update({"frames": 21, "height": 240, "width": 416, "batch_size": 1})
    c.codec.patch = 4
    c.text.update({"length": 512, "dim": 4096})
    c.model.update(
        {**SIZES[student], "in_channels": 16, "out_channels": 16, "patch": (1, 2, 2), "freq_dim": 256,
         "text_dim": 4096, "dtype": "bfloat16", "round_time": True, "remat": "block"}
    )  # fmt: skip
    for role in ("teacher", "real", "critic") if others else ():
        c.sizes[role] = ConfigDict(SIZES[others[0]])
    c.mesh = ConfigDict({"data": 1, "fsdp": 1, "context": 1, "tensor": 1})
    return c
