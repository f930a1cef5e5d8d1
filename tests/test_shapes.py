"""The signatures that name axes are checked in this run, and no module that has such signatures is left out."""

from pathlib import Path

import jax.numpy as jnp
import jaxtyping
import pytest
from shape_checks import CHECKED

from crcm_jax import flow
from crcm_jax.chunks import ChunkPattern
from pallas_kernels.attention import attention

ROOT = Path(__file__).parents[1]


def test_arrays_that_do_not_fit_are_refused():
    x, t = jnp.zeros((2, 3, 4, 4, 1)), jnp.zeros((2, 3))
    flow.interpolate(x, x, t)
    flow.interpolate(x, x, t[:, :1])
    for wrong in ((x, x[:, :2], t), (x, x, t[:, :2]), (x, x.astype(int), t), (x, x, t[..., None])):
        with pytest.raises(jaxtyping.TypeCheckError):
            flow.interpolate(*wrong)
    with pytest.raises(jaxtyping.TypeCheckError):
        ChunkPattern(1, 1).index("three")
    q = jnp.zeros((1, 8, 4, 16))
    with pytest.raises(jaxtyping.TypeCheckError):
        attention(q, q, q[:, :4])


@pytest.mark.usefixtures("unchecked")
def test_what_is_not_checked_behaves_as_for_users():
    x = jnp.zeros((2, 3, 4, 4, 1))
    assert flow.interpolate(x, x[:, :1], 0.5).shape == x.shape


def test_every_module_that_names_axes_is_checked():
    naming = {
        ".".join(file.relative_to(ROOT).with_suffix("").parts)
        for folder in ("crcm_jax", "pallas_kernels")
        for file in (ROOT / folder).rglob("*.py")
        if "from jaxtyping import" in file.read_text()
    }
    assert len(naming) >= 5
    for module in naming:
        covered = any(f"{module}.".startswith(f"{name}.") for name in CHECKED)
        assert covered, f"add {module} to CHECKED in tests/shape_checks.py"
