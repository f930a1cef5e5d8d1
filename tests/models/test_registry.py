"""The registry against all that reads it: networks, configurations, the converter, and the promise to load fast."""

import subprocess
import sys

import jax
import pytest

from crcm_jax import parts, pipeline
from crcm_jax.chunks import ChunkPattern
from crcm_jax.cli import convert as convert_command
from crcm_jax.cli import data, sample
from crcm_jax.configs import wan2_1, wan_shapes
from crcm_jax.convert import models
from crcm_jax.errors import UserError
from crcm_jax.models import registry
from crcm_jax.models.text.umt5 import UMT5Config
from crcm_jax.models.wan.config import WanConfig


def weights_of(network):
    return sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(network.init, jax.random.key(0))))


@pytest.mark.parametrize("name", registry.RELEASES)
def test_every_release_is_a_whole_model(name, tmp_path):
    """Its network takes the latents of its codec and the text of its encoder; its size is the published one."""
    model = pipeline.load(name, weights=tmp_path)
    billions = {"wan2.1-t2v-1.3b": 1.42, "wan2.1-t2v-14b": 14.29, "wan2.1-i2v-14b": 16.39}[name]
    assert round(weights_of(model.network) / 1e9, 2) == billions
    assert model.latent_shape() == (21, 60, 104, model.network.config.out_channels)
    assert model.network.config.text_dim == parts.text_width(model.text) == UMT5Config.xxl().dim
    assert model.network.config.image_dim == (model.image and model.image["dim"])
    assert (model.clip.fps, model.side, model.text["length"]) == (16.0, 16, 512)
    streaming = model.streaming(ChunkPattern(1, 1))
    assert streaming.network.chunks == ChunkPattern(1, 1) and model.chunks is None


def test_configurations_have_the_published_sizes():
    for size, options in (("1.3b", {"remat": "attention"}), ("14b", {"remat": "block"})):
        found = parts.network(wan2_1.get_config("tf" if size == "1.3b" else "tf,14b"), "student", True).config
        assert found == WanConfig.published(size, **options)
        shapes = wan_shapes.get_config(f"tf_scm,1.3B,{size.upper()}")
        assert parts.network(shapes, "teacher", True).config == WanConfig.published(size)
        assert parts.network(shapes, "student", True).config == WanConfig.published("1.3b")
    # The canvas goes through Wan's own codec.
    assert parts.latent_shape(shapes) == parts.latent_shape(wan2_1.get_config("tf")) == (21, 60, 104, 16)
    assert parts.prompt_shape(shapes) == {"text": (512, 4096)}


def test_a_size_stands_for_its_fields():
    """What stands beside it comes first; a role's own size comes before the model's fields."""
    model = {"family": "wan", "size": "1.3b", "layers": 2, "dtype": "float32"}
    family, fields = registry.fields(model)
    assert (family.name, fields["dim"], fields["layers"], fields["dtype"]) == ("wan", 1536, 2, "float32")
    assert registry.fields(model, {"size": "14b"})[1] == {**registry.size("14b"), "dtype": "float32"}
    assert registry.fields({"dim": 24, "patch": [1, 2, 2]}, {"dim": 48})[1] == {"dim": 48, "patch": (1, 2, 2)}
    for wrong, message in (({"size": "2b"}, "model.size '2b' is not one of 1.3b"), ({"family": "x"}, "not one of wan")):
        with pytest.raises(UserError, match=message):
            registry.fields(wrong)


def test_the_converter_knows_the_same_models():
    assert set(models.KNOWN) == set(registry.PARTS) >= set(registry.RELEASES)
    for name, part in registry.PARTS.items():
        assert models.known(name).family.name == part.kind
    assert models.known("wan2.2-i2v-a14b").config == WanConfig.published("14b", in_channels=36)
    assert set(registry.FAMILIES["wan"].layouts) == set(models.TRANSFORMER.layouts)
    assert {layout for family in models.FAMILIES for layout in family.all_layouts} == set(registry.LAYOUTS)


def test_help_lists_what_there_is():
    texts = sample.parser().format_help(), data.parser()._subparsers._group_actions[0].choices["build"].format_help()
    for name in registry.RELEASES:
        assert all(name in text.replace("\n", "").replace(" ", "") for text in texts)
    text = convert_command.parser().format_help().replace("\n", "").replace(" ", "")
    assert all(name in text for name in registry.PARTS)


def test_no_command_line_waits_for_jax():
    names = "models.registry", "configs.wan2_1", "cli.train", "cli.sample", "cli.evaluate", "cli.data"
    code = ";".join(["import sys", *(f"import crcm_jax.{name}" for name in names)])
    done = subprocess.run([sys.executable, "-c", f"{code};sys.exit('jax' in sys.modules)"], check=False)
    assert done.returncode == 0


def test_texts_width_is_one_value():
    c = wan_shapes.digits.get_config("tf")
    c.text.dim = 64
    assert c.model.text_dim == 64 and parts.prompt_shape(c) == {"text": (12, 64)}
