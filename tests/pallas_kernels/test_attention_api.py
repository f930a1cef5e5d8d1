"""Input checks, the choice of a backend, and standing alone."""

import ast
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels.attention import BlockCausal, Cached, Full, api, attention


def ones(*shape, dtype=jnp.float32):
    return jnp.ones(shape, dtype)


Q, K = ones(1, 8, 4, 16), ones(1, 6, 2, 16)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((Q[0], K, K, None), "^q: has shape"),
        ((Q, K.astype(jnp.bfloat16), K, None), "^k: has dtype bfloat16 and q has float32"),
        ((Q, K, K.astype(int), None), "^v: has dtype int"),
        ((Q, K, K[:, :5], None), "^v: has 5 tokens"),
        ((Q, ones(2, 6, 2, 16), K, None), "^k: has batch 2"),
        ((Q, ones(1, 6, 2, 8), K, None), "^k: has head dim 8"),
        ((Q, ones(1, 6, 3, 16), ones(1, 6, 3, 16), None), "^k: has 3 heads, which do not divide"),
        ((Q, K, ones(1, 6, 4, 16), None), "^v: has 4 heads"),
        ((Q, K, K, (K,)), r"^context: pass a pair"),
        ((Q, K, K, (K[:, :0], K[:, :0])), "pass context=None"),
        ((Q, K, K, (K, K[:, :2])), r"^context\[1\]: has 2 tokens"),
        ((Q, K, K, (ones(1, 6, 1, 16), K)), r"^context\[0\]: has 1 heads"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_bad_arrays(arguments, message):
    q, k, v, context = arguments
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda: attention(q, k, v, context=context))


@pytest.mark.usefixtures("unchecked")
def test_bad_choices():
    with pytest.raises(ValueError, match=r"^implementation: 'flash' is unknown"):
        attention(Q, K, K, implementation="flash")
    with pytest.raises(ValueError, match=r"^mask: ndarray is no mask"):
        attention(Q, K, K, mask=np.ones((8, 6)))
    with pytest.raises(ValueError, match=r"^mask: has values for 3 batch entries and q has 1"):
        attention(Q, K, K, context=(K, K), mask=Cached((1, 2, 3)))
    with pytest.raises(ValueError, match=r"^mask: BlockCausal"):
        attention(Q, K, K, context=(K, K), mask=BlockCausal(2, 2))


def test_an_explicit_choice_that_cannot_be_served_says_why():
    with pytest.raises(ValueError, match=r"mosaic_gpu cannot serve this call: q has dtype float32"):
        attention(Q, K, K, implementation="mosaic_gpu")
    q, k = Q.astype(jnp.bfloat16), K.astype(jnp.bfloat16)
    with pytest.raises(ValueError, match=r"mosaic_gpu cannot serve this call: head dim 16 is none of"):
        attention(q, k, k, implementation="mosaic_gpu")


def test_the_default_goes_by_size_on_a_cpu(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    small = api.Segment(K, K, None)
    large = jax.ShapeDtypeStruct((1, 32760, 12, 128), jnp.bfloat16)
    assert api._choose(None, Q, (small,), 1.0) == "reference"
    assert api._choose(None, large, (api.Segment(large, large, None),), 1.0) == "chunked"


def test_grouped_heads_default_scale_and_context():
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((1, 8, 4, 16), (1, 6, 2, 16), (1, 6, 2, 16)))

    @jax.jit
    def four_ways():
        repeated = attention(q, jnp.repeat(k, 2, 2), jnp.repeat(v, 2, 2))
        split = attention(q, k[:, :2], v[:, :2], context=(k[:, 2:], v[:, 2:]), mask=Full())
        return repeated, attention(q, k, v), attention(q, k, v, scale=0.25), split

    repeated, *others = four_ways()
    for other in others:
        np.testing.assert_allclose(other, repeated, rtol=1e-5, atol=1e-6)


def test_the_package_stands_alone():
    allowed = {"jax", "jaxtyping", "numpy", "pallas_kernels"}
    standard = set(__import__("sys").stdlib_module_names)
    root = pathlib.Path(pallas_kernels.__file__).parent
    for path in root.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                top = name.split(".")[0]
                optional = path.name == "bench.py" and top == "torch"
                assert top in allowed | standard or optional, f"{path} imports {name}"
