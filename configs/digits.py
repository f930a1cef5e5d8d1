"""Moving digits: the whole recipe at a size that two CPU cores can train.

    crcm train --config=configs/digits.py:tf_scm --workdir=out/tf_scm

Variants are the training types; `:tf_scm,c3-3` chooses another chunk pattern (first-size).
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

TRAINING = ("bidirectional", "tf", "df", "tf_dcm", "tf_scm", "tf_dscm", "sf_dmd", "tf_scm_sf_dmd")


def get_config(variant: str = "tf_scm") -> ConfigDict:
    training, _, pattern = variant.partition(",")
    if training not in TRAINING:
        raise ValueError(f"configs/digits.py has no variant {training!r}: choose one of {', '.join(TRAINING)}")
    first, _, size = (pattern or "c1-1").removeprefix("c").partition("-")

    c = ConfigDict()
    c.seed = 0
    c.training = training
    c.param_dtype = "float32"
    c.chunks = ConfigDict({"first": int(first), "size": int(size or first), "window": 0, "sink": 0})
    c.data = ConfigDict(
        {"name": "digits", "batch_size": 128 if training == "bidirectional" else 32, "seed": 0, "examples": 1_000_000,
         "frames": 9, "height": 16, "width": 16, "digit_size": 10.0, "digits": 1, "speed": (1.2, 1.6), "straight": 2,
         "threads": 1, "prefetch": 4, "workers": 0}
    )  # fmt: skip
    # The pixels' own mean and spread, so that latents have about unit variance.
    c.codec = ConfigDict({"name": "pixels", "patch": 2, "mean": -0.75, "std": 0.53})
    c.text = ConfigDict({"name": "words", "length": 12, "dim": 32})
    # Four tokens a frame: 8×8 pixels each, 2×2 of them in the codec and 4×4 latents in a token.
    c.model = ConfigDict(
        {"dim": 192, "ffn_dim": 512, "heads": 6, "layers": 4, "in_channels": 4, "out_channels": 4, "patch": (1, 4, 4),
         "freq_dim": 64, "text_dim": c.text.get_ref("dim"), "dtype": "float32", "round_time": False, "remat": "none",
         "attention": placeholder(str)}
    )  # fmt: skip
    c.mesh = ConfigDict({"data": 1, "fsdp": 1, "context": 1, "tensor": 1})
    c.sizes = ConfigDict({"student": {}, "teacher": {}, "real": {}, "critic": {}})
    c.init = ConfigDict({"student": "", "teacher": "", "real": "", "critic": ""})

    diffusion = training in ("bidirectional", "tf", "df")
    c.objective = ConfigDict(
        {"times": {"name": "log_normal", "mean": -0.8, "std": 1.6}, "scale": 100.0,
         # diffusion
         "weighting": "none", "strategy": "random", "prompt_dropout": 0.1 if diffusion else 0.0,
         # consistency
         "guidance": 2.5, "levels": 48, "skip": 1, "time_shift": 3.0, "warmup": 0, "one_pass": True}
    )  # fmt: skip
    if diffusion:
        c.objective.times = ConfigDict({"name": "uniform_shift", "s": 3.0})
        c.objective.scale = 1.0
    c.rollout = ConfigDict(
        {"steps": (4,), "times": ((15 / 16, 5 / 6, 5 / 8),), "noisy_context": False, "context_start": 0}
    )
    c.dmd = ConfigDict(
        {"times": {"name": "uniform_shift", "s": 5.0}, "guidance": 2.5, "scale": 1.0, "replayed": True, "at_once": True,
         "gather_once": True, "student_update_freq": 3}
    )  # fmt: skip

    b1 = 0.9 if diffusion else 0.0
    lr = 1e-3 if diffusion else 1e-4
    c.optim = ConfigDict(
        {"lr": lr, "b1": b1, "b2": 0.999, "eps": 1e-8, "weight_decay": 0.01,
         "warmup": 20, "grad_clip": 1.0 if diffusion else 0.0, "accumulate": 1}
    )  # fmt: skip
    c.critic_optim = ConfigDict(
        {"lr": 3e-4, "b1": 0.0, "b2": 0.999, "eps": 1e-8, "weight_decay": 0.01, "warmup": 20, "grad_clip": 0.0}
    )
    c.ema = ConfigDict({"rate": 0.1})
    steps = 16_000 if training == "bidirectional" else 400
    c.train = ConfigDict({"steps": steps, "log_every": 10, "save_every": 200, "sample_every": 200, "keep": 2})
    c.sample = ConfigDict({"ode_steps": 24, "guidance": 2.5, "prompts": 4})
    return c
