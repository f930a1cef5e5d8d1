"""From a config to a training: every recipe runs and trains every parameter; what recipes say of themselves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from crcm_jax import parts, recipes
from crcm_jax.configs import digits
from crcm_jax.errors import UserError
from crcm_jax.models.base import Condition
from crcm_jax.models.bound import Bound
from crcm_jax.objectives.common import ContextNoise
from crcm_jax.recipes import RECIPES, Nets, Progress, options
from crcm_jax.recipes.averages import Power
from crcm_jax.recipes.combine import summed
from crcm_jax.recipes.turns import Alternate, Always
from crcm_jax.sampling import ContextRule, Few, Ode, Schedule, Whole


def config(training, **sections):
    """configs/digits.py, small: three frames of 2×2 latents, one layer."""
    c = digits.get_config(training)
    c.data.update({"frames": 3, "height": 4, "width": 4, "digit_size": 4})
    c.model.update(
        {"dim": 16, "ffn_dim": 16, "heads": 2, "layers": 1, "freq_dim": 8, "text_dim": 8, "patch": (1, 2, 2)}
    )
    c.text.update({"dim": 8, "length": 3})
    c.rollout.update({"steps": (2,), "times": ((5 / 6,),)})
    for name, changes in sections.items():
        c[name].update(changes)
    return c


SEEDS = {"student": 0, "teacher": 1, "real": 2, "critic": 3}


def world(c, roles):
    """A batch, and the networks of `roles`, all random; the same weights for the same role, whatever the recipe."""
    causal = {"student": recipes.of(c).causal, "teacher": True}
    bound = {}
    for role in roles:
        network = parts.network(c, role, causal.get(role, False))
        bound[role] = Bound(network, tiny.parameters(network, SEEDS[role]))
    batch = {
        "latents": tiny.normal(5, 2, *parts.latent_shape(c)),
        "prompt": {"text": tiny.normal(6, 2, 3, c.text.dim)},
    }
    return batch, Nets(bound, Condition({"text": tiny.normal(7, 1, 3, c.text.dim)}))


def progress(iteration=0, student=0, critic=0):
    iteration, student, critic = (jnp.asarray(n, jnp.int32) for n in (iteration, student, critic))
    return Progress(iteration, {"student": student, "critic": critic})


WEIGHTS = jnp.array([0.5, 0.5])


def assert_trains(grad_fn, player, nets, batch, at):
    (losses, metrics), grads = tiny.jit(grad_fn)(nets, batch, jax.random.key(0), at, WEIGHTS)
    assert losses.shape == (2,) and bool(jnp.isfinite(losses).all())
    assert all(bool(jnp.isfinite(m).all()) for m in metrics.values())
    assert jax.tree.structure(grads) == jax.tree.structure(nets[player].params)
    for path, g in jax.tree_util.tree_leaves_with_path(grads):
        assert bool(jnp.isfinite(g).all()) and float(jnp.abs(g).max()) > 0, jax.tree_util.keystr(path)
    return (losses, metrics), grads


@pytest.mark.parametrize("name", [t for t in RECIPES if t != "tf_scm_sf_dmd"])
def test_every_recipe_trains_every_parameter(name):
    """A gradient reaches every leaf of student and critic. (The joint type sums two: see its phases.)"""
    training = recipes.make(config(name))
    # Nothing but what it says it reads, and the players.
    batch, nets = world(config(name), (*training.reads, *training.players))
    for player in training.players:
        (_, metrics), _ = assert_trains(training.players[player].gradient, player, nets, batch, progress(3, 0, 1))
        if "steps" in metrics:
            assert int(metrics["steps"]) == {"student": 1, "critic": 2}[player], "by its own updates"
    assert set(training.players) == ({"student", "critic"} if "sf_dmd" in name else {"student"})
    assert ("teacher" in training.reads) == ("cm" in name)
    assert training.players["student"].averages == {"ema": Power(0.1)}


def test_both_consistency_losses_are_their_sum():
    """`tf_dscm` with the randomness of its parts."""
    batch, nets = world(config("tf_dscm"), ("student", "teacher"))
    key = jax.random.key(0)

    @tiny.jit
    def all_three(at):
        def run(name, key):
            return recipes.make(config(name)).players["student"].gradient(nets, batch, key, at, WEIGHTS)

        pieces = [run(name, jax.random.fold_in(key, i)) for i, name in enumerate(("tf_dcm", "tf_scm"))]
        return run("tf_dscm", key), pieces

    ((losses, _), grads), pieces = all_three(progress())
    np.testing.assert_allclose(losses, sum(piece[0][0] for piece in pieces), rtol=1e-5)
    expected = jax.tree.map(jnp.add, pieces[0][1], pieces[1][1])
    largest = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(expected))
    for g, e in zip(jax.tree.leaves(grads), jax.tree.leaves(expected)):
        np.testing.assert_allclose(g, e, atol=1e-5 * largest)  # the same sums in another program, float32


def test_losses_that_call_a_metric_alike_do_not_add_up():
    def loss(nets, batch, key, progress, weights):
        return (jnp.zeros(2), {"spread": jnp.zeros(2)}), {}

    with pytest.raises(ValueError, match="both call a metric 'spread': rename one"):
        summed([loss, loss])(None, {}, jax.random.key(0), progress(), WEIGHTS)


def test_the_joint_type_has_phases():
    """TF-sCM alone until the warm-up ends, then both; one program for the two."""
    c = config("tf_scm_sf_dmd", objective={"warmup": 4})
    training = recipes.make(c)
    assert [training.turns.player(i) for i in range(6)] == ["student"] * 5 + ["critic"]
    batch, nets = world(c, ("student", "teacher", "real", "critic"))
    run = tiny.jit(training.players["student"].gradient)
    before, after = (run(nets, batch, jax.random.key(0), progress(i, i, 0), WEIGHTS) for i in (3, 4))
    assert float(before[0][1]["dmd_norm"].max()) == 0 < float(after[0][1]["dmd_norm"].min())
    assert float(before[0][1]["warmup"]) == 0.75 and float(after[0][1]["warmup"]) == 1
    # DMD adds ‖G‖² to each sample's loss.
    extra = np.asarray(after[0][0] - after[0][1]["dmd_norm"] ** 2)
    norm = np.asarray(after[0][1]["tangent_norm"])
    np.testing.assert_allclose(extra, 100 * (norm / (norm + 0.1)) ** 2, rtol=1e-3)


def test_turns_and_counters():
    """One student update, then freq − 1 of the critic; counters as written in spec causal_rcm 4.5."""
    assert recipes.make(config("sf_dmd", dmd={"student_update_freq": 6})).turns == Alternate(6)
    joint = config("tf_scm_sf_dmd", dmd={"student_update_freq": 6}, objective={"warmup": 4})
    assert recipes.make(joint).turns == Alternate(6, alone=4)
    for warm in (0, 4):
        turns = Alternate(6, alone=warm)
        student = critic = 0
        for iteration in range(30):
            assert turns.counts(iteration) == {"student": student, "critic": critic}, iteration
            expected = iteration < warm or (iteration - warm) % 6 == 0
            assert turns.player(iteration) == ("student" if expected else "critic")
            # eff and eff_fake of spec causal_rcm 4.5, in the phase that uses them.
            eff = iteration if iteration < warm else warm + (iteration - warm) // 6
            assert (student == eff) if expected else (critic == iteration - eff - 1)
            student, critic = student + expected, critic + (not expected)
    alone = recipes.make(config("tf")).turns
    assert alone == Always()
    assert all(alone.player(i) == "student" and alone.counts(i) == {"student": i} for i in range(7))


def test_roles_have_their_sizes():
    """Causal student and teacher, bidirectional scores; `sizes` overrides the model for a role."""
    c = config("tf_scm_sf_dmd")
    c.sizes.teacher.update({"layers": 3})
    networks = recipes.make(c).networks
    assert networks["student"].chunks == parts.chunk_pattern(c) and networks["teacher"].chunks is not None
    assert networks["real"].chunks is None and networks["critic"].chunks is None
    assert recipes.student(config("bidirectional")).chunks is None
    assert networks["teacher"].config.layers == 3 and networks["student"].config.layers == 1
    assert recipes.student(c) == networks["student"]


# recipe: (whether it streams, distills and looks at negative prompts, which of its roles starts from what)
CAUSAL, CONSISTENCY, MATCHING = ("tf", "df"), ("tf_dcm", "tf_scm", "tf_dscm"), ("sf_dmd", "tf_scm_sf_dmd")
DECLARED = {
    "bidirectional": (False, False, False, {"student": ("bidirectional",)}),
    "tf": (True, False, False, {"student": ("bidirectional", *CAUSAL)}),
    "df": (True, False, False, {"student": ("bidirectional", *CAUSAL)}),
    **{
        name: (True, True, True, {"student": (*CAUSAL, *CONSISTENCY), "teacher": CAUSAL})
        for name in ("tf_dcm", "tf_scm", "tf_dscm")
    },
    "sf_dmd": (
        *(True, True, True),
        {
            "student": (*CAUSAL, *CONSISTENCY, *MATCHING),
            "real": ("bidirectional",),
            "critic": ("bidirectional", *MATCHING),
        },
    ),
    "tf_scm_sf_dmd": (
        *(True, True, True),
        {
            "student": (*CAUSAL, *CONSISTENCY, *MATCHING),
            "teacher": CAUSAL,
            "real": ("bidirectional",),
            "critic": ("bidirectional", *MATCHING),
        },
    ),
}


def test_what_recipes_declare():
    assert list(RECIPES) == list(DECLARED) and all(name == recipe.name for name, recipe in RECIPES.items())
    for name, (causal, distills, guided, starts) in DECLARED.items():
        recipe = RECIPES[name]
        assert (recipe.causal, recipe.distills, recipe.guided(config(name, objective={"prompt_dropout": 0.0}))) == (
            causal, distills, guided,
        ), name  # fmt: skip
        assert recipe.guided(config(name, objective={"prompt_dropout": 0.1}))
        assert {role: set(r.starts_from) for role, r in recipe.roles.items()} == {n: set(s) for n, s in starts.items()}
        assert all(start in RECIPES for role in recipe.roles.values() for start in role.starts_from)
        # Only a student may begin at random, and only a critic as another role, which then is one of the recipe's.
        assert {role for role, r in recipe.roles.items() if r.random} == {"student"}
        assert {role: r.like for role, r in recipe.roles.items() if r.like} == (
            {"critic": "real"} if "critic" in starts else {}
        )
        assert recipe.needs == {"latents"} and recipe.summary


def test_results_are_sampled_as_they_were_made_for():
    def own(name, **sections):
        c = config(name, sample={"ode_steps": 7, "guidance": 2.25}, **sections)
        return recipes.own_sampler(c)

    assert own("bidirectional") == (Whole("euler", 7, shift=3.0, sigma_max=1600.0), 2.25)
    assert own("tf") == own("df") == (Ode(7), 2.25)
    rollout = {"steps": (2, 1), "times": ((0.5,), ()), "noisy_context": True, "context_start": 1}
    few = Few(Schedule((2, 1), ((0.5,), ())), ContextRule(noisy=True, start=1))
    for name in (*CONSISTENCY, *MATCHING):
        assert own(name, rollout=rollout) == (few, 1.0), name


def test_the_students_context_is_noised_as_its_rollouts_are():
    """Of a student of one loss as chunk 0's, of one that also learns from rollouts chunk by chunk; if at all."""
    rollout = {"steps": (2, 1), "times": ((0.5,), ()), "noisy_context": True, "context_start": 1}
    c = config("tf_scm", rollout=rollout)
    assert options.context_noise(c) == ContextNoise((0.5,), 1)
    assert options.context_noise(c, by_chunk=True) == ContextNoise((0.5, 1.0, 1.0), 1)
    assert options.continuous_time(c).context_noise == options.discrete_time(c).context_noise == ContextNoise((0.5,), 1)
    c.rollout.noisy_context = False
    assert options.context_noise(c) == options.context_noise(c, by_chunk=True) == ContextNoise()


def test_mistakes_are_named():
    """Unknown names and keys, and a pattern that does not divide, before anything is computed."""
    c = config("tf").lock()
    with pytest.raises((AttributeError, KeyError), match="lerning_rate"):
        c.optim.lerning_rate = 1.0
    c.training = "tf_xcm"
    with pytest.raises(UserError, match="'tf_xcm' is not one of bidirectional, tf,"):
        recipes.make(c)
    with pytest.raises(ValueError, match="no variant 'sft'"):
        digits.get_config("sft")
    for section, part in (("codec", parts.codec), ("text", parts.text_encoder)):
        c = config("tf")
        c[section].name = "nothing"
        with pytest.raises(UserError, match=f"{section}.name 'nothing' is not one of"):
            part(c)
    c = config("tf", chunks={"first": 2, "size": 2})
    with pytest.raises(ValueError, match="3 latent frames do not split"):
        recipes.make(c)
    c = config("tf", objective={"times": {"name": "gauss"}})
    with pytest.raises((ValueError, TypeError)):
        recipes.make(c)
    with pytest.raises(ValueError, match=r"ema\.rate 0\.5 must lie between 0 and 0\.289"):
        recipes.make(config("tf", ema={"rate": 0.5}))
