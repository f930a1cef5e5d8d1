"""The transformer against diffusers' `WanTransformer3DModel`, random weights, in float32 on the CPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convert.arrays import TRANSFORMS
from convert.tables import wan_transformer as tables
from crcm_jax.models.base import Condition
from crcm_jax.models.wan.config import WanConfig
from crcm_jax.models.wan.transformer import WanTransformer

REASON = "the comparison needs torch and diffusers (pip install -e .[parity])"
torch = pytest.importorskip("torch", reason=REASON)
diffusers = pytest.importorskip("diffusers", reason=REASON)

BOUND = 1e-5
"""Relative to the largest value."""

TINY = {"dim": 24, "ffn_dim": 48, "heads": 2, "layers": 2, "freq_dim": 32, "text_dim": 32}
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


def velocity(c, params, x, t, text, image):
    extra = c.in_channels - c.out_channels
    latents = None if not extra else jnp.asarray(x[..., c.out_channels :])
    cond = Condition(jnp.asarray(text), image, latents)
    x = jnp.asarray(x[..., : c.out_channels])
    return np.asarray(jax.jit(WanTransformer(c).velocity)(params, x, jnp.full((1, 1), t, jnp.float32), cond))


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
