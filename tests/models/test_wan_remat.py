"""What each remat policy computes again, counted in the program; and that none changes a gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.ad_checkpoint import checkpoint_name

from crcm_jax.chunks import ChunkPattern
from crcm_jax.models.base import TeacherForcing
from crcm_jax.models.bound import Bound
from crcm_jax.models.wan.config import WanConfig
from crcm_jax.parallel.placement import Placement
from pallas_kernels.attention import chunked

FRAMES, BATCH, MARK = 3, 2, "attention ran"


def gradient(remat, placement=tiny.ONE_DEVICE):
    """The gradient of a teacher-forcing loss, and parameters."""
    network = tiny.wan(ChunkPattern(1, 2), attention="chunked", remat=remat, placement=placement)
    x, c = (tiny.latents(seed, BATCH, FRAMES) for seed in (1, 2))
    t, cond = np.full((BATCH, 1), 0.3, np.float32), tiny.condition(batch=BATCH)

    def loss(params):
        return jnp.mean(jnp.square(Bound(network, params).velocity(x, t, cond, TeacherForcing(c, 0 * t))))

    return jax.grad(loss), tiny.parameters(network)


# A layer of two streams calls attention four times: self and cross, for the context and for the target.
@pytest.mark.parametrize("placement", [tiny.ONE_DEVICE, tiny.CUT], ids=["one", "cut"])
@pytest.mark.parametrize(("remat", "calls"), [("none", 4), ("block", 8), ("attention", 4), ("offload", 4)])
def test_attention_runs_again_only_under_block(remat, calls, placement, monkeypatch):
    original = chunked.forward

    def marked(*args):
        out, lse = original(*args)
        return checkpoint_name(out, MARK), lse

    monkeypatch.setattr(chunked, "forward", marked)
    function, params = gradient(remat, placement)
    assert str(jax.make_jaxpr(function)(params)).count(f"name[name={MARK}]") == calls


def test_gathered_weights_are_never_kept():
    """Without remat a layer gathers its ten matrices again, as it does where everything is computed again."""
    fsdp = Placement(tiny.abstract_mesh(1, 2, 1, 1))

    def gathers_and_scatters(remat):
        function, params = gradient(remat, fsdp)
        return str(jax.make_jaxpr(function)(params)).count("linear_call[")

    assert gathers_and_scatters("none") == gathers_and_scatters("block")


def test_offloading_does_not_change_a_gradient():
    kept, offloaded = (tiny.jit(grad)(params) for grad, params in map(gradient, ("none", "offload")))
    # The same sums, perhaps fused otherwise.
    assert max(map(tiny.relative, jax.tree.leaves(offloaded), jax.tree.leaves(kept))) < 1e-5


def test_a_policy_without_a_name_is_refused():
    with pytest.raises(ValueError, match=r"model\.remat 'blocks' is not one of none, block, attention, offload"):
        WanConfig(dim=24, ffn_dim=32, heads=2, layers=2, remat="blocks")
