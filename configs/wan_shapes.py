"""Wan2.1's shapes at 480p, for measuring and for compiling ahead of time; its data are stand-ins, nothing to train on.

    crcm aot --config=configs/wan_shapes.py:tf_scm,1.3b,14b --topology=v5p:4x4x4 --config.mesh.fsdp=64

A variant is a training type, the student's size, and the size of teacher and both scores [the student's].
"""

from ml_collections import ConfigDict

from crcm_jax.configs import digits
from crcm_jax.models import registry
from crcm_jax.models.wan.family import COMMON

RELEASE = registry.RELEASES["wan2.1-t2v-1.3b"]
SIZES = ("1.3b", "14b")


def get_config(variant: str = "tf_scm,1.3b") -> ConfigDict:
    training, *sizes = variant.split(",")
    sizes = [size.lower() for size in sizes] or [SIZES[0]]
    for size in sizes:
        if size not in SIZES:
            raise ValueError(f"configs/wan_shapes.py knows no size {size!r}: choose one of {', '.join(SIZES)}")
    student, *others = sizes
    c = digits.get_config(training)
    c.param_dtype = "bfloat16"
    # 81 frames of 480×832 pixels, which are 21 frames of 60×104 latents with 16 channels.
    c.data.update({"frames": RELEASE.frames, "height": RELEASE.height, "width": RELEASE.width, "batch_size": 1})
    c.codec = ConfigDict(dict(RELEASE.codec))
    c.text = ConfigDict({**RELEASE.text, "weights": "", "tokenizer": ""})
    c.model.update({**registry.size(student), **COMMON, "dtype": "bfloat16", "round_time": True, "remat": "block"})
    for role in ("teacher", "real", "critic") if others else ():
        c.sizes[role] = ConfigDict(registry.size(others[0]))
    return c
