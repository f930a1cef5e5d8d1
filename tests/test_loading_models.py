"""`pipeline.load`: a run's checkpoint, converted weights and a published name; what is read when."""

import gc
import weakref

import jax
import numpy as np
import pytest
import tiny

from crcm_jax import pipeline, recipes
from crcm_jax.chunks import ChunkPattern
from crcm_jax.configs.digits import get_config
from crcm_jax.errors import UsageError, UserError
from crcm_jax.models import registry
from crcm_jax.models.family import Release
from crcm_jax.models.vae.wan import WanVAE
from crcm_jax.sampling import Few, Ode, Whole
from crcm_jax.saving.weights import save_params
from crcm_jax.train.identity import as_json

MODEL = {"dim": 24, "ffn_dim": 32, "heads": 2, "layers": 2, "freq_dim": 16, "text_dim": 16, "dtype": "float32"}
CODEC = {"name": "wan_vae", "encoder_dim": 8, "decoder_dim": 8, "multipliers": (1, 1, 1), "temporal": (True, True)}
CODEC |= {"blocks": 1, "dtype": "float32"}
ROW = Release(MODEL, CODEC, {"name": "umt5", "length": 12, "dim": 16}, frames=9, width=24, height=16)


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setitem(registry.RELEASES, "small", ROW)


def write(path, network, meta, seed=0):
    params = tiny.parameters(network, seed)
    save_params(path, params, meta)
    return params


def equal(a, b):
    return all(map(np.array_equal, *(jax.tree.leaves(tree) for tree in (a, b))))


def digits(folder, training="sf_dmd"):
    config = get_config(training)
    config.model.update({"dim": 16, "ffn_dim": 16, "heads": 2, "layers": 1})
    params = write(folder / "run.safetensors", recipes.student(config), {"config": as_json(config), "iteration": 7})
    return config, params


@pytest.mark.parametrize("training", ("sf_dmd", "tf", "bidirectional"))
def test_a_run_brings_everything(training, tmp_path):
    config, params = digits(tmp_path, training)
    model = pipeline.load(tmp_path / "run.safetensors")
    assert model.network == recipes.student(config) and equal(model.bound.params, params)
    assert model.parts == ("transformer",) and model.codec_params == {}
    assert model.text_encoder()(["a three moves up"])["text"].shape == (1, 12, 32)
    assert (model.clip.frames, model.clip.width, model.clip.fps, model.clip.channels) == (9, 16, 8.0, 1)
    assert model.meta["training"] == training and model.meta["iteration"] == 7
    solver, guidance = model.sampler
    kinds = {"sf_dmd": (Few, 1.0), "tf": (Ode, 2.5), "bidirectional": (Whole, 2.5)}
    assert (type(solver), guidance) == kinds[training]
    assert model.recipe.mismatch(solver) is None


def test_a_run_that_goes_on_lends_its_weights():
    config = get_config("tf_scm")
    params = {"any": np.ones(3)}
    model = pipeline.of_run(config, params)
    assert model.bound.params is params and model.bound.network == recipes.student(config)


def test_a_published_model_is_described_before_it_is_there(small, tmp_path):
    model = pipeline.load("small", weights=tmp_path / "w")
    assert model.parts == ("transformer", "vae", "text_encoder")
    assert (model.sampler, model.recipe, model.chunks) == (None, None, None)
    assert model.latent_shape() == (3, 4, 6, 16) and model.side == 8
    for wrong, message in (
        ({"frames": 10}, r"10 frames is not 1 \+ 4k"),
        ({"width": 20}, "--size=20x16 does not divide into patches of 8x8"),
    ):
        with pytest.raises(UserError, match=message):
            model.latent_shape(**wrong)
    with pytest.raises(UserError, match="3 latent frames do not split"):
        model.streaming(ChunkPattern(2, 2)).latent_shape()
    with pytest.raises(UserError, match="no folder of weights at"):
        model.require()
    (tmp_path / "w").mkdir()
    with pytest.raises(UserError, match=r"holds no vae\.safetensors: write it with crcm convert"):
        model.require("vae")
    with pytest.raises(UsageError, match="needs --weights=DIR"):
        pipeline.load("small")


def test_parts_are_read_when_they_are_asked_for(small, tmp_path):
    model = pipeline.load("small", weights=tmp_path)
    params = write(tmp_path / "vae.safetensors", WanVAE(model.codec.config), {})
    assert equal(model.codec_params["decoder"], params["decoder"])  # no transformer is there yet
    there = write(tmp_path / "transformer.safetensors", model.network, {})
    assert equal(model.bound.params, there) and model.bound is model.bound
    with pytest.raises(UserError, match=r"holds no text_encoder\.safetensors"):
        model.text_encoder()


def test_encoders_are_not_kept(tmp_path):
    digits(tmp_path)
    model = pipeline.load(tmp_path / "run.safetensors")
    encoder = weakref.ref(model.text_encoder())
    gc.collect()
    assert encoder() is None


def test_converted_weights_name_their_model(small, tmp_path):
    """What stands beside them completes them; what a run left in them is heard."""
    network = pipeline.load("small", weights=tmp_path).network
    params = write(tmp_path / "a.safetensors", network, {"name": "small", "model": MODEL})
    model = pipeline.load(tmp_path / "a.safetensors")
    assert equal(model.bound.params, params) and model.files["vae"] == tmp_path / "vae.safetensors"
    meta = {"name": "small", "training": "sf_dmd", "config": {"chunks": {"first": 1, "size": 2}}}
    write(tmp_path / "b.safetensors", network, meta)
    model = pipeline.load(tmp_path / "b.safetensors", weights=tmp_path / "other")
    assert (model.chunks, model.recipe.name) == (ChunkPattern(1, 2), "sf_dmd")
    assert model.files["vae"] == tmp_path / "other" / "vae.safetensors"


def test_what_is_wrong_is_one_sentence(small, tmp_path):
    config, params = digits(tmp_path)
    save_params(tmp_path / "bare.safetensors", params, {})
    config.text.update({"dim": 16})
    config.model.ffn_dim = 24  # says one thing and holds another
    save_params(tmp_path / "other.safetensors", params, {"config": as_json(config)})
    wide = as_json(config) | {"text": {"name": "words", "length": 12, "dim": 48}}
    save_params(tmp_path / "wide.safetensors", params, {"config": wide})
    for wrong, message in (
        (lambda: pipeline.load(tmp_path / "none"), "no checkpoint at"),
        (lambda: pipeline.load(tmp_path / "bare.safetensors"), "does not say how it was configured"),
        (lambda: pipeline.load(tmp_path / "other.safetensors").bound, "another architecture"),
        (lambda: pipeline.load(tmp_path / "wide.safetensors").text_encoder(), "text of 48 channels is not for"),
        (lambda: pipeline.load(tmp_path / "run.safetensors").image_encoder(), "sees no image"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            wrong()
        assert "\n" not in str(caught.value)


def test_samplers_and_recipes_that_do_not_belong_together():
    student, teacher = recipes.named("tf_scm"), recipes.named("tf")
    assert "to jump in few steps" in student.mismatch(Ode())
    assert "few steps make a blur" in teacher.mismatch(Few())
    assert (
        student.mismatch(Few()) is teacher.mismatch(Ode()) is recipes.named("bidirectional").mismatch(Whole()) is None
    )
