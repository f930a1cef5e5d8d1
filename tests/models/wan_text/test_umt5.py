"""UMT5 by itself, and against transformers' `UMT5EncoderModel`, tiny and random, in float32 on the CPU."""

import jax
import numpy as np
import pytest

from crcm_jax.convert.tables import umt5 as tables
from crcm_jax.models.text.umt5 import UMT5Config, UMT5Encoder, relative_buckets

CONFIG = UMT5Config(
    vocabulary=64, dim=32, heads=4, head_dim=8, ffn_dim=48, layers=3, buckets=8, max_distance=16, dtype="float32"
)
LENGTHS = (40, 5, 17)
BOUND = 1e-5
"""Relative to the largest value. Measured 6.0e-7, as `test_parity` prints."""


def batch(length=40):
    ids = np.random.default_rng(0).integers(0, CONFIG.vocabulary, (len(LENGTHS), length))
    return ids, np.arange(length)[None] < np.array(LENGTHS)[:, None]


def relative(a, b):
    return float(np.max(np.abs(np.asarray(a) - b)) / np.max(np.abs(b)))


@pytest.fixture(scope="module")
def pair():
    torch = pytest.importorskip("torch", reason="the comparison needs torch (pip install -e .[parity])")
    transformers = pytest.importorskip("transformers", reason="needs transformers (pip install -e .[parity])")
    torch.manual_seed(0)
    model = transformers.UMT5EncoderModel(
        transformers.UMT5Config(
            vocab_size=CONFIG.vocabulary,
            d_model=CONFIG.dim,
            d_kv=CONFIG.head_dim,
            d_ff=CONFIG.ffn_dim,
            num_layers=CONFIG.layers,
            num_heads=CONFIG.heads,
            relative_attention_num_buckets=CONFIG.buckets,
            relative_attention_max_distance=CONFIG.max_distance,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
        )
    ).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 1 or "relative" in name:
                p.add_(0.2 * torch.randn_like(p))
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    for alias in tables.TRANSFORMERS_ALIASES:
        state.pop(alias)
    params = {}
    for theirs, ours, layout in tables.TRANSFORMERS:
        *path, leaf = ours.split(".")
        node = params
        for key in path:
            node = node.setdefault(key, {})
        names = [theirs.format(i=i) for i in range(CONFIG.layers)] if "{i}" in theirs else [theirs]
        values = [state.pop(n).T if layout == "linear" else state.pop(n) for n in names]
        node[leaf] = np.stack(values) if "{i}" in theirs else values[0]
    assert not state
    shapes = jax.eval_shape(UMT5Encoder(CONFIG).init, jax.random.key(0))
    assert jax.tree.map(lambda a: a.shape, params) == jax.tree.map(lambda a: a.shape, shapes)
    return torch, model, params


def test_parity(pair):
    torch, model, params = pair
    ids, mask = batch()
    with torch.no_grad():
        found = model(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask).long()).last_hidden_state.numpy()
    ours = np.asarray(UMT5Encoder(CONFIG)(params, ids, mask))
    error = relative(ours, found * mask[..., None])
    print(f"relative error {error:.1e}")
    assert error <= BOUND
    assert not ours[~mask].any()


def test_every_parameter_counts(pair):
    """Changing any one leaf breaks the agreement, so the comparison covers each of them."""
    *_, params = pair
    encode, (ids, mask) = UMT5Encoder(CONFIG), batch()
    whole = encode(params, ids, mask)
    leaves, tree = jax.tree_util.tree_flatten_with_path(params)
    for i, (path, _) in enumerate(leaves):
        # Not a constant added: a position table takes any constant without a change.
        change = np.random.default_rng(i).standard_normal(leaves[i][1].shape)
        changed = jax.tree.unflatten(tree, [x * (1 + 0.3 * change) if i == j else x for j, (_, x) in enumerate(leaves)])
        assert relative(encode(changed, ids, mask), whole) > 10 * BOUND, jax.tree_util.keystr(path)


@pytest.mark.parametrize("buckets, furthest", [(8, 16), (32, 128)])
def test_relative_buckets(pair, buckets, furthest):
    torch, model, _ = pair
    attention = model.encoder.block[0].layer[0].SelfAttention
    kept = attention.relative_attention_num_buckets, attention.relative_attention_max_distance
    attention.relative_attention_num_buckets, attention.relative_attention_max_distance = buckets, furthest
    offset = torch.arange(512)[None] - torch.arange(512)[:, None]
    expected = attention._relative_position_bucket(offset).numpy()
    attention.relative_attention_num_buckets, attention.relative_attention_max_distance = kept
    np.testing.assert_array_equal(relative_buckets(512, buckets, furthest), expected)


def test_padding_does_not_matter():
    encode = UMT5Encoder(CONFIG)
    draw = lambda leaf: np.random.default_rng(leaf.size).standard_normal(leaf.shape).astype(np.float32) / 4  # noqa: E731
    params = jax.tree.map(draw, jax.eval_shape(encode.init, jax.random.key(0)))
    ids, mask = batch()
    other = np.where(mask, ids, 7)
    np.testing.assert_array_equal(encode(params, ids, mask), encode(params, other, mask))
    short = encode(params, ids[1:2, :5], mask[1:2, :5])
    assert relative(encode(params, ids, mask)[1:2, :5], short) <= BOUND


def test_buckets_by_hand():
    # Distances 0…7 exactly, then log-spaced rows up to 128 tokens; keys after the query 16 rows further on.
    row = relative_buckets(300, 32, 128)
    assert row[0, :9].tolist() == [0, 17, 18, 19, 20, 21, 22, 23, 24]
    assert row[8, 0] == 8 and row[15, 0] == 9 and row[16, 0] == 10 and row[127, 0] == 15 and row[299, 0] == 15


def test_published_size():
    shapes = jax.eval_shape(UMT5Encoder(UMT5Config.xxl()).init, jax.random.key(0))
    assert sum(x.size for x in jax.tree.leaves(shapes)) == 5_680_910_336


def test_tables_name_the_same_leaves():
    assert {e[1:] for e in tables.NATIVE} == {e[1:] for e in tables.TRANSFORMERS}
    assert len({e[0] for e in tables.NATIVE}) == len(tables.NATIVE)
