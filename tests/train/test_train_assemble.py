"""What a run starts from: weights by role, checked against their networks and their stage."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crcm_jax import recipes
from crcm_jax.configs.digits import get_config
from crcm_jax.errors import UsageError, UserError
from crcm_jax.models.base import Condition
from crcm_jax.train import assemble
from crcm_jax.train.checkpoint import save_params

SMALL = {"model.dim": 16, "model.ffn_dim": 16, "model.heads": 2, "model.layers": 1, "model.freq_dim": 8}


def config(training, **changes):
    c = get_config(training)
    c.update_from_flattened_dict(SMALL | changes)
    return c


def initial(c):
    uncond = Condition({"text": np.zeros((1, 12, 32), np.float32)})
    return assemble.initial(c, recipes.make(c), uncond)


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    """One weights-only checkpoint a training type, each with weights of its own."""
    folder = tmp_path_factory.mktemp("stages")
    for seed, training in enumerate(("bidirectional", "tf", "tf_scm")):
        params = recipes.student(config(training)).init(jax.random.key(seed))
        save_params(folder / training, params, {"training": training})
    return folder


def test_a_student_without_a_path_is_random_but_seeded():
    a, b, c = initial(config("tf")), initial(config("tf")), initial(config("tf", seed=1))
    leaves = [np.concatenate([np.ravel(x) for x in jax.tree.leaves(i.players["student"])]) for i in (a, b, c)]
    np.testing.assert_array_equal(leaves[0], leaves[1])
    assert np.abs(leaves[0] - leaves[2]).max() > 1e-3
    assert set(a.players) == {"student"} and a.frozen.params == {}
    assert a.frozen.uncond.prompt["text"].shape == (1, 12, 32)


def test_every_role_gets_its_own_weights(stages):
    paths = {"init.student": str(stages / "tf_scm"), "init.real": str(stages / "bidirectional")}
    start = initial(config("sf_dmd", **paths, param_dtype="bfloat16"))
    assert set(start.frozen.params) == {"real"} and set(start.players) == {"student", "critic"}
    student, critic, real = start.players["student"], start.players["critic"], start.frozen.params["real"]
    for tree in (student, critic, real):
        assert {leaf.dtype for leaf in jax.tree.leaves(tree)} == {jnp.dtype(jnp.bfloat16)}
    # the critic starts as the real score
    jax.tree.map(np.testing.assert_array_equal, critic, real)
    student, real = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(t)]) for t in (student, critic))
    assert np.abs(student.astype(np.float32) - real.astype(np.float32)).max() > 1e-3


@pytest.mark.parametrize(
    "training, changes, message",
    [
        ("tf_scm", {}, r"needs --config\.init\.teacher: the workdir of a run trained as tf or df"),
        ("sf_dmd", {}, r"needs --config\.init\.real: the workdir of a run trained as bidirectional"),
        ("tf_scm", {"init.teacher": "bidirectional"}, "another stage.*'bidirectional', needed here is tf or df"),
        ("tf_dcm", {"init.teacher": "tf_scm"}, "another stage.*'tf_scm'"),
        ("sf_dmd", {"init.real": "tf"}, "another stage.*'tf', needed here is bidirectional"),
        ("tf", {"init.student": "tf_scm"}, "another stage.*'tf_scm'"),
        ("bidirectional", {"init.student": "tf"}, "another stage.*'tf'"),
        ("sf_dmd", {"init.real": "bidirectional", "init.student": "bidirectional"}, "another stage.*'bidirectional'"),
        (
            "tf",
            {"init.student": "bidirectional", "model.dim": 32},
            r"another architecture: .* in this model",
        ),
        ("tf", {"init.student": "nothing"}, "no checkpoint at .*nothing"),
    ],
)
def test_what_does_not_fit_is_refused(stages, training, changes, message):
    paths = {key: str(stages / value) if key.startswith("init.") else value for key, value in changes.items()}
    with pytest.raises(UserError, match=message) as caught:
        initial(config(training, **paths))
    assert "\n" not in str(caught.value)


def test_a_wrong_configuration_is_told_before_the_workdir_is_made(tmp_path):
    wrong = config("tf", **{"chunks.first": 2, "chunks.size": 4})
    with pytest.raises(UsageError, match="9 latent frames do not split"):
        assemble.train(wrong, tmp_path / "run")
    with pytest.raises(UserError, match=r"needs --config\.init\.teacher"):
        assemble.train(config("tf_scm"), tmp_path / "run")
    assert not (tmp_path / "run").exists()
