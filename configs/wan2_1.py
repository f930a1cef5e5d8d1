"""Wan2.1 at 480p: the published Causal-rCM recipes (spec causal_rcm 7.1).

    crcm train --config=configs/wan2_1.py:tf_scm --workdir=out/tf_scm --config.data.path=latents \\
        --config.init.teacher=… --config.init.student=… --config.init.uncond=negative.pt

Options follow the variant: `:tf_scm,c3-3` chooses another chunk pattern (first-size), `:tf,14b` the larger model for
the causal diffusion stage. `data.path` and `init` are for you to fill in; from videos (`data.name=tfds`) also
`data.dataset`, `text.weights`, `text.tokenizer` and `init.codec`.
"""

from ml_collections import ConfigDict

from crcm_jax.models import registry
from crcm_jax.models.wan.family import COMMON

VARIANTS = ("tf", "df", "tf_dcm", "tf_scm", "sf_dmd", "sf_dmd_1step", "sf_dmd_2step", "sf_dmd_2step_noisy_ctx")

RELEASE = registry.RELEASES["wan2.1-t2v-1.3b"]
"""Whose codec, text and clips all sizes share."""

T2V_1_3B = {**registry.size("1.3b"), "remat": "attention"}
T2V_14B = {**registry.size("14b"), "remat": "block"}

_MID = (15 / 16, 5 / 6, 5 / 8)
ROLLOUTS: dict[str, dict] = {
    "sf_dmd_1step": {"steps": (4, 1), "times": (_MID, ())},
    "sf_dmd_2step": {"steps": (4, 2), "times": (_MID, (5 / 6,))},
    "sf_dmd_2step_noisy_ctx": {"steps": (4, 2), "times": (_MID, (5 / 8,)), "noisy_context": True, "context_start": 1},
}
"""Steps of the first chunk and of the others, and where they stop on their way."""


def get_config(variant: str = "tf_scm") -> ConfigDict:
    variant, *options = variant.split(",")
    if variant not in VARIANTS:
        raise ValueError(f"configs/wan2_1.py has no variant {variant!r}: choose one of {', '.join(VARIANTS)}")
    training = "sf_dmd" if variant.startswith("sf_dmd") else variant
    diffusion = training in ("tf", "df")
    large = "14b" in options
    if large and not diffusion:
        raise ValueError(f"{variant},14b: the published students are of 1.3B; only tf and df have a 14B recipe")
    patterns = [option for option in options if option != "14b"] or ["c1-1"]
    first, _, size = patterns[0].removeprefix("c").partition("-")

    c = ConfigDict()
    c.seed = 0
    c.training = training
    c.param_dtype = "bfloat16"
    c.chunks = ConfigDict({"first": int(first), "size": int(size or first), "window": 0, "sink": 0})
    c.data = ConfigDict(
        {"name": "latents", "path": "", "batch_size": 1, "seed": 0, "frames": RELEASE.frames, "height": RELEASE.height,
         "width": RELEASE.width,
         "threads": 2, "prefetch": 4, "workers": 0,
         # of tfds
         "dataset": "", "data_dir": "~/tensorflow_datasets", "splits": {"train": "train"}, "video": "", "text": "",
         "stride": 1}
    )  # fmt: skip
    c.codec = ConfigDict(dict(RELEASE.codec))
    c.text = ConfigDict({**RELEASE.text, "weights": "", "tokenizer": ""})
    common = {name: COMMON[name] for name in ("in_channels", "out_channels", "freq_dim", "text_dim")}
    c.model = ConfigDict({**(T2V_14B if large else T2V_1_3B), **common, "dtype": "bfloat16", "round_time": True})
    teacher = {} if diffusion else T2V_14B
    c.mesh = ConfigDict({"data": 1, "fsdp": 1, "context": 1, "tensor": 1})
    c.sizes = ConfigDict({"student": {}, "teacher": teacher, "real": teacher, "critic": teacher})
    c.init = ConfigDict({"student": "", "teacher": "", "real": "", "critic": "", "uncond": "", "codec": ""})

    c.objective = ConfigDict(
        {"times": {"name": "uniform_shift", "s": 5.0}, "scale": 100.0,
         # diffusion
         "weighting": "gaussian_bell" if training == "tf" else "none", "strategy": "random", "prompt_dropout": 0.0,
         # consistency
         "guidance": 3.0, "levels": 48, "skip": 1, "time_shift": 3.0, "warmup": 0, "one_pass": True}
    )  # fmt: skip
    if training == "tf_scm":
        c.objective.times = ConfigDict({"name": "log_normal", "mean": -0.8, "std": 1.6})
        c.objective.warmup = 1000
    rollout = {"steps": (4,), "times": (_MID,), "noisy_context": False, "context_start": 0}
    c.rollout = ConfigDict({**rollout, **ROLLOUTS.get(variant, {})})
    c.dmd = ConfigDict(
        # Replayed: the same gradient without a rollout's activations; not at_once, with those of one chunk at a time;
        # gather_once: the student's weights lie whole on every device during a rollout.
        {"times": {"name": "uniform_shift", "s": 5.0}, "guidance": 5.0, "scale": 1.0, "replayed": True, "at_once": True,
         "gather_once": True, "student_update_freq": 6}
    )  # fmt: skip

    adam = {"b1": 0.9 if diffusion else 0.0, "b2": 0.999, "eps": 1e-8, "weight_decay": 0.01, "warmup": 100}
    c.optim = ConfigDict({**adam, "lr": 1e-5 if diffusion else 2e-6, "grad_clip": 0.0, "accumulate": 1})
    c.critic_optim = ConfigDict({**adam, "b1": 0.0, "lr": 4e-7, "grad_clip": 0.0})
    c.ema = ConfigDict({"rate": 0.1})
    save_every = 50 if training == "sf_dmd" else 500 if large or not diffusion else 1000
    # Real runs end long before: look at the samples and stop.
    c.train = ConfigDict({"steps": 100_000, "log_every": 10, "save_every": save_every, "sample_every": 0, "keep": 2})
    c.sample = ConfigDict({"ode_steps": 50, "guidance": 3.0, "prompts": 4})
    return c
