"""The autoencoder against diffusers' `AutoencoderKLWan`, tiny and random, in float32 on the CPU."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crcm_jax.convert.tables import wan_vae as tables
from crcm_jax.models.vae.config import WanVAEConfig
from crcm_jax.models.vae.wan import WanVAE
from crcm_jax.models.wan.image import condition_latents, size_of

torch = pytest.importorskip("torch", reason="the comparison needs torch (pip install -e .[parity])")
diffusers = pytest.importorskip("diffusers", reason="the comparison needs diffusers (pip install -e .[parity])")

STATISTICS = {"mean": (0.1, 0.2, -0.3, 0.4), "std": (1.0, 2.0, 0.5, 1.5)}
OURS = {
    "2.1": WanVAEConfig(channels=4, encoder_dim=8, decoder_dim=8, blocks=1, dtype="float32", **STATISTICS),
    "2.2": WanVAEConfig(
        channels=4, encoder_dim=8, decoder_dim=16, blocks=1, dtype="float32", patch=2, residual=True, **STATISTICS
    ),
}
THEIRS = {
    "2.1": {},
    "2.2": {
        "decoder_base_dim": 16,
        "is_residual": True,
        "in_channels": 12,
        "out_channels": 12,
        "patch_size": 2,
        "scale_factor_spatial": 16,
    },
}
LAYOUTS = {
    "same": lambda a: a,
    "conv2d": lambda a: a.transpose(2, 3, 1, 0),
    "conv3d": lambda a: a.transpose(2, 3, 4, 1, 0),
    "gamma2d": lambda a: a[:, 0, 0],
    "gamma3d": lambda a: a[:, 0, 0, 0],
}
BOUND = 1e-4
"""Relative to the largest value. Measured 2e-6; float32 sums of some thousand products in another order."""


def torch_model(version):
    torch.manual_seed(0)
    model = diffusers.AutoencoderKLWan(
        base_dim=8, z_dim=4, num_res_blocks=1, temperal_downsample=[False, True, True],
        latents_mean=STATISTICS["mean"], latents_std=STATISTICS["std"], **THEIRS[version],
    ).eval()  # fmt: skip
    with torch.no_grad():
        for p in model.parameters():
            if p.numel() == max(p.shape):  # biases and norm scales, which start as zeros and ones
                p.add_(0.2 * torch.randn_like(p))
    return model


def torch_params(version, model):
    """The model's tensors as our tree, every one used once and every leaf filled."""
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    params = {}
    for theirs, ours, layout in tables.diffusers(OURS[version]):
        *path, leaf = ours.split(".")
        node = params
        for key in path:
            node = node.setdefault(key, {})
        node[leaf] = LAYOUTS[layout](state.pop(theirs))
    assert not state
    shapes = jax.eval_shape(WanVAE(OURS[version]).init, jax.random.key(0))
    assert jax.tree.map(lambda a: a.shape, params) == jax.tree.map(lambda a: a.shape, shapes)
    return params


@pytest.fixture(scope="module", params=list(OURS))
def pair(request):
    model = torch_model(request.param)
    return model, WanVAE(OURS[request.param]), torch_params(request.param, model)


def sample(frames):
    return np.random.default_rng(frames).uniform(-1, 1, (1, frames, 32, 48, 3)).astype(np.float32)


def torch_encode(model, video):
    with torch.no_grad():
        z = model.encode(torch.tensor(video).permute(0, 4, 1, 2, 3)).latent_dist.mode()
    return (z.permute(0, 2, 3, 4, 1).numpy() - STATISTICS["mean"]) / STATISTICS["std"]


def torch_decode(model, latents):
    z = torch.tensor(latents * STATISTICS["std"] + STATISTICS["mean"], dtype=torch.float32)
    with torch.no_grad():
        return model.decode(z.permute(0, 4, 1, 2, 3)).sample.permute(0, 2, 3, 4, 1).numpy()


def relative(a, b):
    return float(np.max(np.abs(np.asarray(a) - b)) / np.max(np.abs(b)))


@pytest.mark.parametrize("frames", [1, 9])
def test_encode_and_decode(pair, frames):
    model, vae, params = pair
    video = sample(frames)
    z = torch_encode(model, video)
    assert relative(vae.encode(params, video), z) <= BOUND
    # Twice the latents, for pixels of some size; most stay off the clipping at ±1.
    expected = torch_decode(model, 2 * z)
    assert np.mean(np.abs(expected) < 1) > 0.9
    assert relative(vae.decode(params, (2 * z).astype(np.float32)), expected) <= BOUND


def test_every_parameter_counts(pair):
    """Changing any one leaf breaks the agreement, so the comparison above covers each of them."""
    model, vae, params = pair
    video = sample(5)  # the fewest frames that reach every convolution over time
    z = torch_encode(model, video).astype(np.float32)
    encoded, decoded = vae.encode(params, video), vae.decode(params, z)
    leaves, tree = jax.tree_util.tree_flatten_with_path(params)
    for i, (path, leaf) in enumerate(leaves):
        changed = jax.tree.unflatten(tree, [x * 1.2 + 0.05 if i == j else x for j, (_, x) in enumerate(leaves)])
        if path[0].key == "encoder":
            error = relative(vae.encode(changed, video), encoded)
        else:
            error = relative(vae.decode(changed, z), decoded)
        assert error > 10 * BOUND, f"{jax.tree_util.keystr(path)} {leaf.shape}: {error}"


def test_what_image_to_video_is_told_of_its_first_frame(pair):
    """Mask and latents, against the pipeline's own `prepare_latents`."""
    model, ours, params = pair
    if ours.config.residual:
        pytest.skip("image-to-video models of this form have the autoencoder of Wan2.1")
    image = np.random.default_rng(3).uniform(-1, 1, (1, 1, 16, 24, 3)).astype(np.float32)
    pipeline = SimpleNamespace(
        vae=model,
        config=SimpleNamespace(expand_timesteps=False),
        vae_scale_factor_temporal=4,
        vae_scale_factor_spatial=8,
    )
    with torch.no_grad():
        latents, expected = diffusers.WanImageToVideoPipeline.prepare_latents(
            pipeline, torch.tensor(image[:, 0]).permute(0, 3, 1, 2), 1, 4, 16, 24, 9, torch.float32,
            torch.device("cpu"), latents=torch.zeros(1, 4, 3, 2, 3),
        )  # fmt: skip
    found = condition_latents(ours, params, jnp.asarray(image), 9)
    assert latents.shape[1] == 4 and found.shape == (1, 3, 2, 3, 4 + 4)
    expected = expected.permute(0, 2, 3, 4, 1).numpy()
    np.testing.assert_array_equal(found[..., :4], expected[..., :4])
    assert float(np.max(np.abs(found[..., 4:] - expected[..., 4:])) / np.max(np.abs(expected))) <= BOUND


def test_clips_take_their_image_s_proportions():
    """As the original works them out: the largest multiples of a patch within the area."""
    assert size_of(832, 480, 832 * 480, 16) == (832, 480)
    assert size_of(480, 832, 832 * 480, 16) == (480, 832)
    assert size_of(1000, 1000, 832 * 480, 16) == (624, 624)  # 631.9
    assert size_of(1920, 1080, 1280 * 720, 16) == (1280, 720)
    assert size_of(4000, 3, 832 * 480, 16) == (23072, 16)
