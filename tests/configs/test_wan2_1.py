"""The Wan2.1 recipes against the published table (spec causal_rcm 6.1, 7.1), written out by hand."""

import jax
import pytest

from crcm_jax import flow, parts, recipes
from crcm_jax.configs.wan2_1 import VARIANTS, get_config
from crcm_jax.errors import UserError
from crcm_jax.models.wan.config import WanConfig
from crcm_jax.recipes.averages import Power
from crcm_jax.recipes.options import rollout_plan

# variant: (lr, beta 1, save every, teacher or real score, its guidance)
TABLE = {
    "tf": (1e-5, 0.9, 1000, None, None),
    "tf,14b": (1e-5, 0.9, 500, None, None),
    "df": (1e-5, 0.9, 1000, None, None),
    "df,14b": (1e-5, 0.9, 500, None, None),
    "tf_dcm": (2e-6, 0.0, 500, "teacher", 3.0),
    "tf_scm": (2e-6, 0.0, 500, "teacher", 3.0),
    "sf_dmd": (2e-6, 0.0, 50, "real", 5.0),
    "sf_dmd_1step": (2e-6, 0.0, 50, "real", 5.0),
    "sf_dmd_2step": (2e-6, 0.0, 50, "real", 5.0),
    "sf_dmd_2step_noisy_ctx": (2e-6, 0.0, 50, "real", 5.0),
}


@pytest.mark.parametrize("variant", TABLE)
def test_numbers_are_the_published_ones(variant):
    c = get_config(variant)
    lr, b1, save_every, teacher, guidance = TABLE[variant]
    optim = {"lr": lr, "b1": b1, "b2": 0.999, "eps": 1e-8, "weight_decay": 0.01, "warmup": 100, "grad_clip": 0.0}
    assert c.optim.to_dict() == {**optim, "accumulate": 1}
    assert c.critic_optim.to_dict() == {**optim, "lr": 4e-7, "b1": 0.0}
    assert (c.train.save_every, c.train.steps, c.data.batch_size, c.ema.rate) == (save_every, 100_000, 1, 0.1)
    assert (c.objective.scale, c.dmd.scale, c.dmd.student_update_freq) == (100.0, 1.0, 6)
    assert (c.param_dtype, c.model.dtype, c.model.round_time, c.seed) == ("bfloat16", "bfloat16", True, 0)
    large, small = WanConfig.t2v_14b(remat="block"), WanConfig.t2v_1_3b(remat="attention")
    training = recipes.make(c)
    assert training.networks["student"].config == (large if "14b" in variant else small)
    if teacher:
        assert training.networks[teacher].config == parts.network(c, "critic", causal=False).config == large
        assert guidance == (c.objective.guidance if teacher == "teacher" else c.dmd.guidance)
    assert training.reads == ((teacher,) if teacher else ())
    matches = variant.startswith("sf_dmd")
    assert set(training.players) == ({"student", "critic"} if matches else {"student"})
    assert not matches or training.networks["critic"].config == large
    sections = {name: player.optim for name, player in training.players.items()}
    assert sections == {"student": "optim", "critic": "critic_optim"} if matches else {"student": "optim"}
    assert training.players["student"].averages == {"ema": Power(0.1)}


def test_times_and_weightings():
    uniform, log_normal = flow.UniformShift(5.0), flow.LogNormal(-0.8, 1.6)
    for variant in VARIANTS:
        c = get_config(variant)
        assert flow.time_distribution(**c.objective.times) == (log_normal if variant == "tf_scm" else uniform)
        assert flow.time_distribution(**c.dmd.times) == uniform
        assert c.objective.weighting == ("gaussian_bell" if variant == "tf" else "none")
        assert c.objective.warmup == (1000 if variant == "tf_scm" else 0)
    c = get_config("tf_dcm").objective
    assert (c.levels, c.skip, c.time_shift) == (48, 1, 3.0)
    assert get_config("df").objective.strategy == "random"


@pytest.mark.parametrize(
    "variant, first, later, noisy, start",
    [
        ("sf_dmd", (1, 15 / 16, 5 / 6, 5 / 8), (1, 15 / 16, 5 / 6, 5 / 8), False, 0),
        ("sf_dmd_1step", (1, 15 / 16, 5 / 6, 5 / 8), (1,), False, 0),
        ("sf_dmd_2step", (1, 15 / 16, 5 / 6, 5 / 8), (1, 5 / 6), False, 0),
        ("sf_dmd_2step_noisy_ctx", (1, 15 / 16, 5 / 6, 5 / 8), (1, 5 / 8), True, 1),
    ],
)
def test_step_schedules(variant, first, later, noisy, start):
    plan = rollout_plan(get_config(variant))
    assert plan.schedule.times(0) == first and plan.schedule.times(1) == plan.schedule.times(20) == later
    assert (plan.context.noisy, plan.context.start) == (noisy, start)


def test_geometry_and_options():
    c = get_config("tf,c3-3")
    assert parts.codec(c).latent_shape(c.data.frames, c.data.height, c.data.width) == (21, 60, 104, 16)
    pattern = parts.chunk_pattern(c)
    assert (pattern.first, pattern.size, pattern.count(21)) == (3, 3, 7)
    assert parts.chunk_pattern(get_config("tf")).count(21) == 21
    shapes = jax.eval_shape(recipes.student(c).init, jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 1_418_996_800
    with pytest.raises(ValueError, match="no variant 'rcm'"):
        get_config("rcm")
    with pytest.raises(ValueError, match="only tf and df"):
        get_config("tf_scm,14b")
    with pytest.raises(UserError, match=r"--config\.text\.weights is missing"):
        parts.text_encoder(c)
    c.codec.version = "3"
    with pytest.raises(UserError, match=r"codec\.version '3' is not one of 2\.1, 2\.2"):
        parts.codec(c)
