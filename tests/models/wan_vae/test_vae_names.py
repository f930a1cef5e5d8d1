"""The tables of foreign tensor names."""

import re

import jax
import numpy as np
import pytest

from crcm_jax.convert.tables import wan_vae as tables
from crcm_jax.models.vae.config import WanVAEConfig
from crcm_jax.models.vae.wan import WanVAE


@pytest.mark.parametrize("config", [WanVAEConfig.wan21(), WanVAEConfig.wan22()], ids=["2.1", "2.2"])
def test_every_leaf_is_named_once(config):
    shapes = jax.eval_shape(WanVAE(config).init, jax.random.key(0))
    leaves = {".".join(k.key for k in path): x for path, x in jax.tree_util.tree_leaves_with_path(shapes)}
    ranks = {"conv2d": 4, "conv3d": 5, "gamma2d": 1, "gamma3d": 1, "same": 1}
    for table in (tables.native(config), tables.diffusers(config)):
        assert sorted(ours for _, ours, _ in table) == sorted(leaves)
        assert all(leaves[ours].ndim == ranks[layout] for _, ours, layout in table)


def test_native_names_convert_as_diffusers_converts_them():
    """Against diffusers' own renaming of the native 2.1 checkpoint (it has none for 2.2)."""
    reason = "the comparison needs diffusers and torch (pip install -e .[parity])"
    pytest.importorskip("torch", reason=reason)
    files = pytest.importorskip("diffusers.loaders.single_file_utils", reason=reason)
    native = [name for name, *_ in tables.native(WanVAEConfig.wan21())]
    ours = {name: path for name, path, _ in tables.native(WanVAEConfig.wan21())}
    renamed = files.convert_wan_vae_to_diffusers({name: np.array(i) for i, name in enumerate(native)})
    expected = {path: name for name, path, _ in tables.diffusers(WanVAEConfig.wan21())}
    assert {native[i]: name for name, i in renamed.items()} == {name: expected[ours[name]] for name in native}


def test_native_and_diffusers_names_lead_to_the_same_leaves():
    """As many tensors as the published checkpoints have; spot checks of names and shapes known from them."""
    for config in (WanVAEConfig.wan21(), WanVAEConfig.wan22()):
        native, other = tables.native(config), tables.diffusers(config)
        assert {e[1:] for e in native} == {e[1:] for e in other}
        assert len({e[0] for e in native}) == len(native) == len(other) == (196 if config.residual else 194)
    first = {ours: native for native, ours, _ in tables.native(WanVAEConfig.wan21())}
    assert first["encoder.stage2.resample.time_conv.kernel"] == "encoder.downsamples.8.time_conv.weight"
    assert first["encoder.stage1.block0.shortcut.bias"] == "encoder.downsamples.3.shortcut.bias"
    assert first["decoder.stage1.block0.shortcut.kernel"] == "decoder.upsamples.4.shortcut.weight"
    assert first["decoder.stage3.block2.norm2.scale"] == "decoder.upsamples.14.residual.3.gamma"
    assert first["decoder.stage2.resample.conv.kernel"] == "decoder.upsamples.11.resample.1.weight"
    second = {ours: native for native, ours, _ in tables.native(WanVAEConfig.wan22())}
    assert second["encoder.stage1.block0.shortcut.kernel"] == "encoder.downsamples.1.downsamples.0.shortcut.weight"
    assert second["encoder.stage2.resample.time_conv.bias"] == "encoder.downsamples.2.downsamples.2.time_conv.bias"
    assert second["decoder.stage0.resample.time_conv.kernel"] == "decoder.upsamples.0.upsamples.3.time_conv.weight"
    assert second["decoder.stage3.block0.shortcut.bias"] == "decoder.upsamples.3.upsamples.0.shortcut.bias"
    assert not any(re.search(r"[{}]", e[0] + e[1]) for e in tables.native(WanVAEConfig.wan22()))
