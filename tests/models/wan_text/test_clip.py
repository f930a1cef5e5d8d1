"""CLIP's vision tower against transformers' class, and its preprocessing against torch, random, float32, on the CPU."""

import jax
import numpy as np
import pytest
import tiny

from crcm_jax.convert import engine, models
from crcm_jax.convert.arrays import TRANSFORMS
from crcm_jax.models.vision.clip import MEAN, STD, CLIPVision, CLIPVisionConfig, bicubic, preprocess

CONFIG = CLIPVisionConfig(dim=32, ffn_dim=48, heads=4, layers=3, image=12, patch=4)
BOUND = 1e-5
"""Relative to the largest value; sums in float32 in another order."""


def pair(c):
    """transformers' class with every parameter random, and the same parameters as ours by the converter's table."""
    torch = pytest.importorskip("torch", reason="the comparison needs torch (pip install -e .[parity])")
    transformers = pytest.importorskip("transformers", reason="needs transformers (pip install -e .[parity])")
    config = transformers.CLIPVisionConfig(
        hidden_size=c.dim, intermediate_size=c.ffn_dim, num_hidden_layers=c.layers, num_attention_heads=c.heads,
        image_size=c.image, patch_size=c.patch, hidden_act="gelu", layer_norm_eps=c.eps,
    )  # fmt: skip
    model = transformers.CLIPVisionModel(config).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            spread = 1 / p[0].numel() ** 0.5 if p.ndim > 1 else 0.3
            p.add_(spread * torch.randn_like(p))
    state = {f"vision_model.{name}": tensor.numpy() for name, tensor in model.state_dict().items()}
    params = jax.tree.map(
        lambda leaf: np.zeros(leaf.shape, np.float32), jax.eval_shape(CLIPVision(c).init, jax.random.key(0))
    )
    for (leaf, layer), place in engine.places(models.Model(models.CLIP, "", c), "diffusers").items():
        node = params
        for key in leaf.split("/")[:-1]:
            node = node[key]
        node = node[leaf.split("/")[-1]]
        node[... if layer is None else layer] = TRANSFORMS[place.transform].to_ours(state.pop(place.name))
    assert not state
    return torch, model, params


def difference(c, images):
    torch, model, params = pair(c)
    with torch.no_grad():
        pixels = torch.tensor(images).permute(0, 3, 1, 2)
        expected = model(pixels, output_hidden_states=True).hidden_states[-2].numpy()
    return params, expected, tiny.relative(CLIPVision(c)(params, images), expected)


def test_penultimate_state_is_that_of_transformers():
    images = tiny.normal(0, 2, 12, 12, 3)
    params, expected, error = difference(CONFIG, images)
    print(f"relative error {error:.1e}")
    assert expected.shape == (2, CONFIG.tokens, CONFIG.dim)
    assert error <= BOUND
    # The comparison covers every parameter that is read: changing any one of them breaks it. A key's bias changes no
    # softmax; the last layer and the norm after it are not read.
    unseen = ("norm_out", "layers/attention/k/bias")
    leaves, tree = jax.tree_util.tree_flatten_with_path(params)
    for i, (path, _) in enumerate(leaves):
        changed = [x * (1 + 0.3 * tiny.normal(i, *x.shape)) if i == j else x for j, (_, x) in enumerate(leaves)]
        moved = tiny.relative(CLIPVision(CONFIG)(jax.tree.unflatten(tree, changed), images), expected)
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        assert (moved > 10 * BOUND) == (not name.startswith(unseen)), name


def test_layers_of_real_size():
    """Width, heads and patches as published, one layer that is read and few patches."""
    c = CLIPVisionConfig.vit_h14(layers=2, image=28, projection=None)
    assert difference(c, tiny.normal(0, 1, 28, 28, 3))[2] <= BOUND


def test_published_size():
    c = CLIPVisionConfig.vit_h14()
    assert c.tokens == 257
    shapes = jax.eval_shape(CLIPVision(c).init, jax.random.key(0))
    # 632.08 M, the vision tower of ViT-H/14 with its projection.
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 632_076_800


@pytest.mark.parametrize("height, width", [(480, 832), (100, 60), (12, 12)])
def test_preprocessing_is_the_original(height, width):
    """Bicubic as torch interpolates, the whole picture squeezed into a square; then mean and deviation."""
    torch = pytest.importorskip("torch", reason="the comparison needs torch (pip install -e .[parity])")
    picture = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    x = torch.tensor(picture[None]).permute(0, 3, 1, 2).double() / 255
    x = torch.nn.functional.interpolate(x, (12, 12), mode="bicubic", align_corners=False).permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(preprocess(picture, CONFIG), (x - MEAN) / STD, atol=1e-5)


@pytest.mark.parametrize("height, width", [(480, 832), (100, 61), (12, 12)])
def test_cropping_is_that_of_transformers(height, width):
    transformers = pytest.importorskip("transformers", reason="needs transformers (pip install -e .[parity])")
    picture = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    theirs = transformers.CLIPImageProcessorPil(size={"shortest_edge": 12}, crop_size={"height": 12, "width": 12})
    expected = theirs(images=picture, return_tensors="np")["pixel_values"].transpose(0, 2, 3, 1)
    np.testing.assert_allclose(preprocess(picture, CONFIG, crop=True), expected, atol=1e-6)


def test_bicubic_by_hand():
    np.testing.assert_allclose(bicubic(7, 7), np.eye(7))
    # Twice as many: a quarter of a pixel beside each; a = -3/4 gives these weights, and they add up to one.
    np.testing.assert_allclose(
        bicubic(8, 16)[5, :6], [0, -0.10546875, 0.87890625, 0.26171875, -0.03515625, 0], atol=1e-12
    )
