"""The autoencoder against itself: streaming, causality, shapes, precisions. No other library is needed."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crcm_jax.models.vae.config import WanVAEConfig
from crcm_jax.models.vae.layers import convolve
from crcm_jax.models.vae.wan import WanVAE

SMALL = {
    "channels": 3,
    "encoder_dim": 4,
    "decoder_dim": 4,
    "mean": (0.1, -0.2, 0.3),
    "std": (1.5, 0.5, 2.0),
    "multipliers": (1, 2, 2),
    "temporal": (True, True),
    "blocks": 1,
    "dtype": "float32",
    "convolution": "volume",  # the quickest to compile; the comparison with diffusers takes the default
}
CONFIGS = {"2.1": WanVAEConfig(**SMALL), "2.2": WanVAEConfig(**SMALL, patch=2, residual=True)}


@functools.cache
def random_params(config):
    """Parameters of unit-variance layers, the one-dimensional ones too (fresh ones are all ones and zeros)."""
    rng = np.random.default_rng(0)

    def draw(leaf):
        if leaf.ndim == 1:
            return (1 + 0.3 * rng.standard_normal(leaf.shape)).astype(np.float32)
        return (rng.standard_normal(leaf.shape) / np.sqrt(np.prod(leaf.shape[:-1]))).astype(np.float32)

    return jax.tree.map(draw, jax.eval_shape(WanVAE(config).init, jax.random.key(0)))


def pixels(config, frames, seed=0):
    side = 2 * config.stride[1]
    return np.random.default_rng(seed).uniform(-1, 1, (1, frames, side, 2 * side, 3)).astype(np.float32)


def latents(config, frames, seed=0):
    # Small, so that few pixels are clipped.
    return 0.1 * np.random.default_rng(seed).standard_normal((1, frames, 2, 4, config.channels)).astype(np.float32)


def relative(a, b):
    return float(np.max(np.abs(np.asarray(a, np.float64) - b)) / np.max(np.abs(np.asarray(b, np.float64))))


@pytest.mark.parametrize("version", CONFIGS)
def test_streaming_decode_is_whole_decode(version):
    vae, params = WanVAE(CONFIGS[version]), random_params(CONFIGS[version])
    z = latents(vae.config, 5)
    whole = vae.decode(params, z)
    assert whole.shape == (1, 17, *pixels(vae.config, 1).shape[2:])
    assert np.mean(np.abs(whole) == 1) < 0.5
    for cuts in ([1, 3], [3]):
        chunks = np.split(z, cuts, 1)
        parts = list(vae.decode_stream(params, iter(chunks)))
        assert [p.shape[1] for p in parts] == [4 * c.shape[1] - 3 * (i == 0) for i, c in enumerate(chunks)]
        assert relative(np.concatenate(parts, 1), whole) <= 1e-5
    # A stream that forgot would differ: the comparison above sees the cache.
    assert relative(np.concatenate([parts[0], vae.decode(params, chunks[1])], 1), whole[:, :14]) > 1e-2


@pytest.mark.parametrize("version", CONFIGS)
def test_streaming_encode_is_whole_encode(version):
    vae, params = WanVAE(CONFIGS[version]), random_params(CONFIGS[version])
    video = pixels(vae.config, 13)
    whole = vae.encode(params, video)
    assert whole.shape == (1, *vae.latent_shape(*video.shape[1:4]))
    first, cache = vae.encode_chunk(params, video[:, :5])
    second, _ = vae.encode_chunk(params, video[:, 5:], cache)
    assert relative(np.concatenate([first, second], 1), whole) <= 1e-5
    assert relative(vae.encode(params, video[:, :1]), whole[:, :1]) <= 1e-5


@pytest.mark.parametrize("version", CONFIGS)
def test_causality_is_exact(version):
    vae, params = WanVAE(CONFIGS[version]), random_params(CONFIGS[version])
    z, video = latents(vae.config, 5), pixels(vae.config, 13)
    later = z.copy()
    later[:, 3:] += 1
    a, b = vae.decode(params, z), vae.decode(params, later)
    np.testing.assert_array_equal(a[:, :9], b[:, :9])
    assert np.abs(a[:, 9] - b[:, 9]).max() > 1e-3
    later = video.copy()
    later[:, 5:] *= -1
    a, b = vae.encode(params, video), vae.encode(params, later)
    np.testing.assert_array_equal(a[:, :2], b[:, :2])
    assert np.abs(a[:, 2] - b[:, 2]).max() > 1e-3


def test_the_cache_is_a_value_of_constant_shape():
    vae, params = WanVAE(CONFIGS["2.1"]), random_params(CONFIGS["2.1"])
    z = latents(vae.config, 1)
    cache = jax.eval_shape(vae.decode_chunk, params, z)[1]
    again = jax.eval_shape(vae.decode_chunk, params, z, cache)[1]
    assert jax.tree.map(lambda a: (a.shape, a.dtype), cache) == jax.tree.map(lambda a: (a.shape, a.dtype), again)


def test_the_step_does_not_change_the_result():
    vae, params = WanVAE(CONFIGS["2.1"]), random_params(CONFIGS["2.1"])
    longer = WanVAE(dataclasses.replace(vae.config, step=3))
    z = latents(vae.config, 5)
    assert relative(longer.decode(params, z[:, :4]), vae.decode(params, z)[:, :13]) <= 1e-5


def test_bfloat16_is_near_float32():
    vae, params = WanVAE(CONFIGS["2.1"]), random_params(CONFIGS["2.1"])
    low = WanVAE(dataclasses.replace(vae.config, dtype="bfloat16", convolution="fold"))
    z = latents(vae.config, 5)
    whole, rough = vae.decode(params, z), low.decode(params, z)
    assert rough.dtype == jnp.float32
    # Some twenty layers, each rounding to 2^-9; measured 0.011.
    error = np.sqrt(np.mean(np.square(whole - rough)) / np.mean(np.square(whole)))
    assert 1e-5 < error < 0.03


@pytest.mark.parametrize("time_stride, stride, padding", [(1, 1, ((1, 1), (1, 1))), (2, 2, ((0, 1), (0, 1)))])
def test_the_ways_to_convolve_agree(time_stride, stride, padding):
    rng = np.random.default_rng(0)
    x, kernel = rng.standard_normal((2, 5, 6, 8, 3)), rng.standard_normal((3, 3, 3, 3, 5)) / 9
    how = {"time_stride": time_stride, "stride": stride, "padding": padding}
    with jax.enable_x64(True):
        whole = np.asarray(convolve(jnp.asarray(x), jnp.asarray(kernel), method="volume", **how))
    for method in ("fold", "taps", "volume"):
        y = convolve(jnp.asarray(x, jnp.float32), jnp.asarray(kernel, jnp.float32), method=method, **how)
        assert relative(y, whole) <= 1e-6
    # Sixteen-bit channels are filled up to eights, and cut again; 81 products of factors rounded to 2^-9.
    for method in ("fold", "taps"):
        y = convolve(jnp.asarray(x, jnp.bfloat16), jnp.asarray(kernel, jnp.bfloat16), method=method, **how)
        assert y.shape == whole.shape
        assert relative(y, whole) <= 2e-2


def test_published_sizes():
    for config, total, decoder in (
        (WanVAEConfig.wan21(), 126_892_531, 73_300_000),
        (WanVAEConfig.wan22(), 704_688_668, None),
    ):
        shapes = jax.eval_shape(WanVAE(config).init, jax.random.key(0))
        count = lambda tree: sum(x.size for x in jax.tree.leaves(tree))  # noqa: E731
        assert count(shapes) == total
        if decoder:
            assert round(count(shapes["decoder"]) / decoder, 3) == 1
    assert WanVAE(WanVAEConfig.wan21()).latent_shape(81, 480, 832) == (21, 60, 104, 16)
    assert WanVAE(WanVAEConfig.wan22()).latent_shape(81, 480, 832) == (21, 30, 52, 48)


@pytest.mark.usefixtures("unchecked")
def test_wrong_shapes_are_one_sentence():
    vae, params = WanVAE(CONFIGS["2.1"]), random_params(CONFIGS["2.1"])
    with pytest.raises(ValueError, match="80 frames is not 1 \\+ 4k"):
        vae.latent_shape(80, 16, 16)
    with pytest.raises(ValueError, match="do not divide into latent pixels of 4×4"):
        vae.encode(params, np.zeros((1, 1, 6, 8, 3), np.float32))
    with pytest.raises(ValueError, match="height, width, 3\\]"):
        vae.decode(params, np.zeros((1, 1, 2, 2, 4), np.float32))
    with pytest.raises(ValueError, match="is not one of fold, taps, volume"):
        WanVAEConfig.wan21(convolution="fft")
    with pytest.raises(ValueError, match="16 numbers"):
        WanVAEConfig.wan21(mean=(0.0,))
