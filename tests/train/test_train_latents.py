"""`crcm train` on Wan's own recipes, from latents: neither VAE nor text encoder is there to be read."""

import json

import jax
import latent_sets as sets
import ml_dtypes
import numpy as np
import pytest
import tiny as weights

from crcm_jax import __main__ as program
from crcm_jax import parts, recipes
from crcm_jax.configs.wan2_1 import get_config
from crcm_jax.data import tensor_file
from crcm_jax.errors import UsageError, UserError
from crcm_jax.saving.weights import load_params, save_params
from crcm_jax.train import encoders

LATENTS, TEXT = (3, 4, 4, 16), (6, 8)
"""Of 9 frames of 32×32 pixels."""

TINY = {
    "data.frames": 9, "data.height": 32, "data.width": 32, "data.batch_size": 2, "text.length": 6,
    "model.dim": 24, "model.ffn_dim": 16, "model.heads": 2, "model.layers": 1, "model.freq_dim": 8,
    "model.text_dim": 8, "model.dtype": "float32", "param_dtype": "float32", "train.log_every": 1,
}  # fmt: skip


@pytest.fixture(autouse=True)
def compiled_quickly():
    """At this size the time goes into compiling, not into running."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def tiny(training, folder, **changes):
    c = get_config(training)
    c.update_from_flattened_dict({**TINY, "data.path": str(folder), **changes})
    return c


def train(recipe, workdir, folder, *words):
    """Through the command line, as a user would."""
    keys = [f"--config.{key}={value}" for key, value in {**TINY, "data.path": folder}.items()]
    return program.dispatch(["train", f"--config=configs/wan2_1.py:{recipe}", f"--workdir={workdir}", *keys, *words])


def lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def folder(tmp_path):
    return sets.write(tmp_path / "set", count=6, shard=3, latents=LATENTS, text=TEXT)


def test_a_run_from_latents_learns_resumes_and_counts_what_is_damaged(folder, tmp_path):
    assert train("tf", tmp_path / "run", folder, "--config.train.steps=2") == 0
    before = lines(tmp_path / "run")
    assert [line["iteration"] for line in before] == [1, 2]
    assert all(np.isfinite(line["student/loss"]) and line["student/grad_norm"] > 0 for line in before)
    assert all(line["student/damaged_examples"] == 0 for line in before)
    start = recipes.student(tiny("tf", folder)).init(jax.random.key(0))
    learnt = load_params(tmp_path / "run", "params", expect=start)
    assert max(np.abs(a - b).max() for a, b in zip(jax.tree.leaves(start), jax.tree.leaves(learnt))) > 0
    # one of six is damaged, and the set moved, while the run rests: it goes on and says so
    moved = folder.rename(tmp_path / "elsewhere")
    sets.flip(moved / "shard_000001.tar", sets.example(4, latents=LATENTS, text=TEXT).text.tobytes())
    assert train("tf", tmp_path / "run", moved, "--config.train.steps=5") == 0
    after = lines(tmp_path / "run")
    assert after[:2] == before and len(after) == 5
    assert sum(line["student/damaged_examples"] for line in after) >= 1


def negative(c, encoder=None):
    """The negative prompt's embedding, as a run of `c` takes it."""
    found = encoders.negative_prompt(c, encoder, needed=recipes.of(c).guided(c))
    assert set(found.prompt) == {"text"} and not found.frames and found.given is None
    return found.prompt["text"]


def test_what_guidance_leads_away_from(folder, tmp_path):
    embedding = np.random.default_rng(0).standard_normal((5, 8)).astype(ml_dtypes.bfloat16)
    file = tmp_path / "negative.pt"
    for array in (embedding, embedding[None]):
        file.write_bytes(tensor_file.dumps(array))
        found = negative(tiny("tf_scm", folder, **{"init.uncond": str(file)}))
        assert found.shape == (1, 6, 8) and found.dtype == np.float32
        np.testing.assert_array_equal(found[0, :5], embedding.astype(np.float32))
        assert (found[0, 5:] == 0).all()
    # without dropped prompts the diffusion stages never look at it
    unseen = negative(tiny("df", folder))
    assert unseen.shape == (1, 6, 8) and not unseen.any()
    # a text file is encoded, by the run's encoder if it has one
    (tmp_path / "negative.txt").write_text("worst quality\n")
    c = tiny("tf_scm", folder, **{"init.uncond": str(tmp_path / "negative.txt")})
    asked = negative(c, lambda prompts: {"text": np.full((1, 6, 8), len(prompts[0]))})
    assert (asked == len("worst quality")).all()
    for changes, message in (
        ({"objective.prompt_dropout": 0.1}, r"training 'tf' needs --config\.init\.uncond.*crcm data embed"),
        ({"init.uncond": str(tmp_path / "nothing.pt")}, "there is no such file"),
        ({"init.uncond": str(file), "model.text_dim": 9}, r"of shape \[1, 5, 8\], needed is \[6, 9\]"),
        ({"init.uncond": str(tmp_path / "negative.txt")}, r"--config\.text\.weights is missing"),
    ):
        with pytest.raises(UserError, match=message):
            negative(tiny("tf", folder, **changes))


def test_pixels_get_the_codecs_weights(folder, tmp_path):
    c = tiny("tf", folder, **{"data.name": "tfds"})
    c.codec.update({"encoder_dim": 4, "decoder_dim": 4})
    vae = parts.codec(c)
    params = weights.parameters(vae)
    save_params(tmp_path / "vae.safetensors", params, {})
    c.init.codec = str(tmp_path / "vae.safetensors")
    found = encoders.codec_params(c, vae)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a.astype(b.dtype), b), params, found)
    c.init.codec = ""
    with pytest.raises(UsageError, match=r"--config\.init\.codec is missing"):
        encoders.codec_params(c, vae)
    assert encoders.codec_params(tiny("tf", folder), vae) is None
