"""The transformer against diffusers' `WanTransformer3DModel`, random weights, in float32 on the CPU."""

import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crcm_jax.convert import engine
from crcm_jax.convert.arrays import TRANSFORMS
from crcm_jax.convert.tables import wan_transformer as tables
from crcm_jax.models.base import Condition
from crcm_jax.models.bound import Bound
from crcm_jax.models.wan.config import WanConfig
from crcm_jax.models.wan.prompt import EXTRA, prompt
from crcm_jax.models.wan.transformer import WanTransformer
from crcm_jax.saving.weights import save_params

REASON = "the comparison needs torch and diffusers (pip install -e .[parity])"
torch = pytest.importorskip("torch", reason=REASON)
diffusers = pytest.importorskip("diffusers", reason=REASON)

BOUND = 1e-5
"""Relative to the largest value."""

TINY = {"dim": 32, "ffn_dim": 48, "heads": 2, "layers": 2, "freq_dim": 32, "text_dim": 32}
IMAGE = {"in_channels": 36, "image_dim": 20}


def ours(**sizes):
    return WanConfig(**sizes, dtype="float32", round_time=False, remat="none")


def theirs(c):
    """The PyTorch model of a configuration, every one-dimensional parameter perturbed."""
    torch.manual_seed(0)
    image = {} if c.image_dim is None else {"image_dim": c.image_dim, "added_kv_proj_dim": c.dim}
    model = diffusers.WanTransformer3DModel(
        patch_size=c.patch, num_attention_heads=c.heads, attention_head_dim=c.head_dim, in_channels=c.in_channels,
        out_channels=c.out_channels, text_dim=c.text_dim, freq_dim=c.freq_dim, ffn_dim=c.ffn_dim, num_layers=c.layers,
        cross_attn_norm=True, qk_norm="rms_norm_across_heads", eps=c.eps, rope_max_seq_len=32, **image,
    ).eval()  # fmt: skip
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1:
                p.add_(0.2 * torch.randn_like(p))
    return model


def as_ours(c, state):
    """The PyTorch model's tensors as our tree: every one used once, every leaf filled."""
    state, params = {name: tensor.numpy() for name, tensor in state.items()}, {}
    for name, path, transform in tables.diffusers(c.image_dim is not None):
        to_ours = TRANSFORMS[transform].to_ours
        *parents, leaf = path.split(".")
        node = functools.reduce(lambda node, key: node.setdefault(key, {}), parents, params)
        if "{i}" in name:
            node[leaf] = np.stack([to_ours(state.pop(name.format(i=i))) for i in range(c.layers)])
        else:
            node[leaf] = to_ours(state.pop(name))
    assert not state
    shapes = jax.eval_shape(WanTransformer(c).init, jax.random.key(0))
    assert jax.tree.map(lambda a: a.shape, params) == jax.tree.map(lambda a: a.shape, shapes)
    return params


def inputs(c, frames=3, height=8, width=8, tokens=7):
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    x = draw(1, frames, height, width, c.in_channels)
    # The class cuts image tokens from text tokens at 512 from the end.
    text = draw(1, tokens if c.image_dim is None else 512, c.text_dim)
    return x, text, None if c.image_dim is None else draw(1, 257, c.image_dim)


@functools.cache
def compiled(c):
    network = WanTransformer(c)
    return jax.jit(lambda params, *arguments: Bound(network, params).velocity(*arguments))


def velocity(c, params, x, t, text, image):
    extra = c.in_channels - c.out_channels
    frames = {EXTRA: jnp.asarray(x[..., c.out_channels :])} if extra else {}
    cond = Condition(prompt(jnp.asarray(text), image), frames)
    x = jnp.asarray(x[..., : c.out_channels])
    return np.asarray(compiled(c)(params, x, jnp.full((1, 1), t, jnp.float32), cond))


def torch_velocity(model, x, t, text, image, dtype=torch.float32):
    image = {} if image is None else {"encoder_hidden_states_image": torch.tensor(image, dtype=dtype)}
    with torch.no_grad():
        out = model(
            torch.tensor(x, dtype=dtype).permute(0, 4, 1, 2, 3), torch.tensor([1000 * t], dtype=dtype),
            torch.tensor(text, dtype=dtype), **image, return_dict=False,
        )  # fmt: skip
    return out[0].permute(0, 2, 3, 4, 1).numpy()


def relative(a, b):
    return float(np.max(np.abs(np.asarray(a, np.float64) - b)) / np.max(np.abs(b)))


@pytest.mark.parametrize("t", [0.0, 0.5, 0.9371])
@pytest.mark.parametrize("form", ["t2v", "i2v"])
def test_velocity(form, t):
    c = ours(**TINY, **(IMAGE if form == "i2v" else {}))
    model = theirs(c)
    params = as_ours(c, model.state_dict())
    x, text, image = inputs(c)
    assert relative(velocity(c, params, x, t, text, image), torch_velocity(model, x, t, text, image)) <= BOUND


@pytest.mark.parametrize("form", ["t2v", "i2v"])
def test_every_parameter_counts(form):
    """Changing any one leaf breaks the agreement, so the comparison above covers each of them."""
    c = ours(**TINY, **(IMAGE if form == "i2v" else {}))
    params = as_ours(c, theirs(c).state_dict())
    x, text, image = inputs(c)
    whole = velocity(c, params, x, 0.5, text, image)
    leaves, tree = jax.tree_util.tree_flatten_with_path(params)
    for i, (path, leaf) in enumerate(leaves):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        # A constant added to all keys changes no softmax, and so does a key's bias, but for the norm after it.
        change = 1 + 0.3 * np.random.default_rng(i).standard_normal(leaf.shape).astype(np.float32)
        changed = jax.tree.unflatten(tree, [a * change if i == j else a for j, (_, a) in enumerate(leaves)])
        assert relative(velocity(c, changed, x, 0.5, text, image), whole) > 10 * BOUND, name


def test_exported_weights_in_the_class_of_pytorch(tmp_path):
    """Ours, random, through the converter into `from_pretrained`, and both networks' velocities."""
    c = ours(**TINY, **IMAGE)
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(WanTransformer(c).init, jax.random.key(0))
    draw = lambda leaf: (rng.standard_normal(leaf.shape) * 0.3).astype(np.float32)  # noqa: E731
    params = jax.tree.map(draw, shapes)
    save_params(tmp_path / "ours.safetensors", params, {"model": {"heads": c.heads}})
    engine.convert(tmp_path / "ours.safetensors", tmp_path / "folder", "diffusers", say=lambda line: None)
    model = diffusers.WanTransformer3DModel.from_pretrained(tmp_path / "folder").eval()
    x, text, image = inputs(c)
    assert relative(velocity(c, params, x, 0.5, text, image), torch_velocity(model, x, 0.5, text, image)) <= BOUND


@pytest.mark.parametrize("size", ["1.3b", "14b"])
def test_one_block_of_real_size(size):
    """Widths, heads and channel counts as published; one layer and few tokens. Measured 1.6e-6 for both."""
    if size == "14b" and not os.environ.get("CRCM_BIG_TESTS"):
        pytest.skip("5 GB and a minute: set CRCM_BIG_TESTS=1")
    make = {"1.3b": WanConfig.t2v_1_3b, "14b": WanConfig.t2v_14b}[size]
    c = make(layers=1, dtype="float32", round_time=False, remat="none")
    model = theirs(c)
    params = as_ours(c, model.state_dict())
    x, text, image = inputs(c, frames=2, height=4, width=4)
    assert relative(velocity(c, params, x, 0.9371, text, image), torch_velocity(model, x, 0.9371, text, image)) <= BOUND


def test_where_the_two_differ():
    """Both rotate by tables made in float64 and used in float32, so what is left is the time embedding.

    Its angles, up to 1000, are float32 products in both, which may differ by their last bit, 6e-5; everything else is
    sums in another order. Against the class in float64 both are off, for that reason.
    """
    c = ours(**TINY)
    model = theirs(c)
    params = as_ours(c, model.state_dict())
    x, text, image = inputs(c)
    exact = torch_velocity(model.double(), x, 0.9371, text, image, torch.float64)
    assert relative(velocity(c, params, x, 0.9371, text, image), exact) <= BOUND
