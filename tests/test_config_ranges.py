"""Every key of every shipped configuration has a range, which holds what is shipped and refuses what cannot be."""

import math

import pytest

from crcm_jax import config_ranges, recipes
from crcm_jax.config_ranges import Choice, Optional, Several, Text
from crcm_jax.configs import digits, wan2_1, wan_shapes
from crcm_jax.errors import UsageError
from crcm_jax.models.core.remat import REMAT
from crcm_jax.objectives import diffusion
from crcm_jax.parallel import mesh
from crcm_jax.recipes.averages import Power

CONFIGS = {
    **{f"digits:{name}": digits.get_config(name) for name in (*digits.TRAINING, "tf,c3-3")},
    **{f"wan2_1:{name}": wan2_1.get_config(name) for name in (*wan2_1.VARIANTS, "tf,14b", "df,14b", "tf_scm,c3-3")},
    **{f"wan_shapes:{t},1.3B,14B": wan_shapes.get_config(f"{t},1.3B,14B") for t in digits.TRAINING},
}
BAD = {
    "number": (-1e30, math.nan, math.inf, -math.inf, 1e30, "fast", "", None, True, (), (1,)),
    "several": ((), ("a",), (-1,), (math.nan,), 4, 0, "4", None),
    "choice": ("", "fast", -1, 0.5, math.nan, None, ()),
    "text": (0, -1, math.nan, None, (), True),
}
LEAVES = sorted({key for config in CONFIGS.values() for key, _ in config_ranges.leaves(config)})


def kind(rule) -> str:
    rule = rule.rule if isinstance(rule, Optional) else rule
    return {Several: "several", Choice: "choice", Text: "text"}.get(type(rule), "number")


@pytest.mark.parametrize("name", CONFIGS)
def test_every_key_is_declared_and_what_is_shipped_passes(name):
    for key, value in config_ranges.leaves(CONFIGS[name]):
        rule = config_ranges.rule(key)
        assert rule is not None, f"{key} has no range"
        assert rule.holds(value), (key, value, rule.words())
    config_ranges.check(CONFIGS[name])


@pytest.mark.parametrize("key", LEAVES)
def test_what_cannot_be_is_one_sentence_with_the_key_and_its_range(key):
    rule = config_ranges.rule(key)
    for value in BAD[kind(rule)]:
        if isinstance(rule, Optional) and value is None:
            continue
        if rule == config_ranges._ANY and value in (-1e30, 1e30):
            continue
        nested = value
        for part in reversed(key.split(".")):
            nested = {part: nested}
        with pytest.raises(UsageError) as caught:
            config_ranges.check(nested)
        said = str(caught.value)
        assert said == f"config.{key} is {value!r}, and must be {rule.words()}"
        assert "\n" not in said


@pytest.mark.parametrize(
    "key, bad, good",
    [
        ("optim.lr", (-1.0,), (0.0, 1e-4, 1)),
        ("critic_optim.lr", (-1.0,), (4e-7,)),
        ("train.steps", (-5, 0, 1.5), (1, 100_000)),
        ("data.batch_size", (-4, 0), (1,)),
        ("optim.accumulate", (0, -1), (1, 8)),
        ("model.heads", (0,), (12,)),
        ("sizes.teacher.heads", (0,), (40,)),
        ("data.frames", (0,), (81,)),
        ("data.height", (0, 400_000), (480,)),
        ("optim.b1", (1.5, 1, -0.1), (0.0, 0.9)),
        ("ema.rate", (1, 0, 0.3), (0.1, 0.28)),
        ("mesh.fsdp", (0, -1, 1.0, True), (64,)),
        ("rollout.steps", ((), (0,), (4, -1), 4), ((4,), (4, 2))),
        ("rollout.times", ((), ((1.0,),), ((0.0,),), (0.5,)), (((),), ((0.9, 0.5), ()))),
        ("data.speed", ((1.2,), (1.2, math.nan)), ((1.2, 1.6),)),
        ("model.patch", ((1, 2), (1, 0, 2)), ((1, 2, 2),)),
        ("train.save_every", (-1,), (0, 50)),
        ("seed", (-1, 2**32), (0, 2**32 - 1)),
        ("objective.times.std", (0, -1), (1.6,)),
        ("dmd.times.s", (0,), (5.0,)),
    ],
)
def test_ranges(key, bad, good):
    rule = config_ranges.rule(key)
    assert [value for value in bad if rule.holds(value)] == [] == [value for value in good if not rule.holds(value)]


def test_declarations_are_those_of_the_code():
    """Written again there, because a wrong command line is answered without JAX."""
    rules = config_ranges.RULES
    assert rules["training"].among == tuple(recipes.RECIPES)
    assert rules["model.remat"].among == REMAT
    assert rules["objective.weighting"].among == tuple(diffusion.WEIGHTINGS)
    assert rules["objective.strategy"].among == diffusion.STRATEGIES
    assert {key.removeprefix("mesh.") for key in rules if key.startswith("mesh.")} == set(mesh.AXES)
    limit = rules["ema.rate"].below
    with pytest.raises(ValueError, match=r"ema\.rate"):
        Power(limit)
    assert Power(limit - 1e-6).exponent > 0


def test_keys_that_are_nowhere_declared_may_be_anything():
    config_ranges.check({"my": {"own": -1}, "data": {"colour": "blue"}})
