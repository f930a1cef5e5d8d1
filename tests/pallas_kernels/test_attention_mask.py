"""Mask descriptions: intervals against the predicates of spec causal_rcm 3.2, tile ranges, traced fields, bad input."""

import functools

import attention_oracle as oracle
import jax
import numpy as np
import pytest

from pallas_kernels.attention import BlockCausal, Cached, Captioned, Full, Intervals, TeacherForcing
from pallas_kernels.attention import mask as masks
from pallas_kernels.attention import rows as visibility
from pallas_kernels.attention.shapes import BY_ENTRY, SMALL, WAN


def expand(rows, queries, keys):
    if rows is None:
        return np.ones((queries, keys), bool)
    seen = np.asarray(visibility.membership(rows, np.arange(keys)))
    return seen if rows.ndim == 2 else seen[:, 0, 0]


@pytest.mark.parametrize("case", SMALL + BY_ENTRY, ids=lambda c: c.name)
def test_intervals_follow_the_predicate(case):
    visible = case.mask.visible(case.queries, case.own, case.context)
    for name, predicate in oracle.allowed(case).items():
        rows = getattr(visible, name)
        np.testing.assert_array_equal(expand(rows, case.queries, case.segments[name]), predicate)
        if rows is not None:
            lo1, hi1, lo2, hi2 = np.moveaxis(rows, -2, 0)
            assert rows.dtype == np.int32 and (lo1 <= hi1).all() and (hi1 <= lo2).all() and (lo2 <= hi2).all()
            assert hi2.max(initial=0) <= case.segments[name]
    pairs = {name: p.sum() / (len(p) if p.ndim == 3 else 1) for name, p in oracle.allowed(case).items()}
    assert case.pairs() == pairs


@pytest.mark.parametrize("window, sink", [(0, 0), (1, 0), (3, 0), (2, 1), (1, 2), (3, 2), (0, 2)])
@pytest.mark.parametrize("kind", [BlockCausal, TeacherForcing])
def test_window_and_sink(kind, window, sink):
    mask = kind(5, 7, window, sink)
    context = 40 if kind is TeacherForcing else None
    case = SMALL[0].__class__("", mask, 40, 40, context)
    visible = mask.visible(40, 40, context)
    for name, predicate in oracle.allowed(case).items():
        np.testing.assert_array_equal(expand(getattr(visible, name), 40, 40), predicate)


def test_keys_that_have_not_been_written_are_never_seen():
    """A sink reaches no further than the cache does, of each batch entry."""
    for mask, stops in (
        (Cached(4, sink=7), [4]),
        (Cached((4, 6), sink=(7, 2)), [4, 6]),
        (Cached((0, 6), sink=7), [0, 6]),
    ):
        seen = expand(mask.visible(3, 3, 10).context, 3, 10).reshape(-1, 3, 10)
        shown = [np.arange(10) < stop for stop in stops]
        np.testing.assert_array_equal(seen, np.broadcast_to(np.array(shown)[:, None], seen.shape))


@pytest.mark.parametrize("block_q, block_k", [(32, 16), (64, 64)])
@pytest.mark.parametrize("case", SMALL, ids=lambda c: c.name)
def test_tile_ranges_cover_what_is_seen_and_only_claim_what_all_see(case, block_q, block_k):
    visible = case.mask.visible(case.queries, case.own, case.context)
    for name, predicate in oracle.allowed(case).items():
        rows = getattr(visible, name)
        if rows is None:
            continue
        pad = -case.queries % block_q
        rows = np.pad(rows, ((0, 0), (0, pad)))
        some, every = visibility.tile_ranges(rows, block_q, block_k)
        assert isinstance(some, np.ndarray)
        traced = jax.jit(functools.partial(visibility.tile_ranges, block_q=block_q, block_k=block_k))(rows)
        jax.tree.map(np.testing.assert_array_equal, traced, (some, every))
        keys = case.segments[name]
        predicate = np.pad(predicate, ((0, pad), (0, -keys % block_k)))
        tiles = predicate.reshape(len(predicate) // block_q, block_q, -1, block_k).swapaxes(1, 2)
        for i, row_of_tiles in enumerate(tiles):
            first1, end1, first2, end2 = np.asarray(some)[:, i]
            assert first1 <= end1 and first2 <= end2 and (end1 <= first2 or first2 == end2)
            visited = {*range(first1, end1), *range(first2, end2)}
            assert {t for t, tile in enumerate(row_of_tiles) if tile.any()} <= visited
            first1, end1, first2, end2 = np.asarray(every)[:, i]
            for t in {*range(first1, end1), *range(first2, end2)}:
                assert t in visited and row_of_tiles[t].all()


def test_teacher_forcing_at_wan_size_visits_few_tiles_too_many():
    case = next(c for c in WAN if c.name == "tf_target_1")
    rows = case.mask.visible(case.queries, case.own, case.context).context
    rows = np.pad(rows, ((0, 0), (0, -case.queries % 128)))
    some, every = visibility.tile_ranges(rows, 128, 128)
    visited = (some[1] - some[0] + some[3] - some[2]).sum() * 128 * 128
    assert visited < 1.06 * case.pairs()["context"]
    assert (every[1] - every[0]).sum() > 0.8 * (some[1] - some[0]).sum()


def test_traced_fields_give_the_same_intervals():
    for offset in range(4):
        mask = BlockCausal(6, 6, offset=offset)
        want = mask.visible(6, 24, None).own
        got = jax.jit(lambda o: BlockCausal(6, 6, offset=o).visible(6, 24, None).own)(offset)
        np.testing.assert_array_equal(got, want)
        np.testing.assert_array_equal(jax.jit(lambda m: m.visible(6, 24, None).own)(mask), want)
    want = Cached(20, 7, 3).visible(4, 4, 30).context
    np.testing.assert_array_equal(jax.jit(lambda m: m.visible(4, 4, 30).context)(Cached(20, 7, 3)), want)
    traced_first = jax.jit(lambda o: BlockCausal(4, 6, offset=o).visible(10, 22, None).own)
    np.testing.assert_array_equal(traced_first(0), BlockCausal(4, 6).visible(10, 22, None).own)


def test_traced_values_of_entries_give_the_same_intervals():
    for mask, lengths in (
        (Cached((20, 7), 5, (5, 1)), (4, 6, 30)),
        (Captioned(TeacherForcing(5, 7), (3, 0, 9), 9), (19, 19, 28)),
        (Captioned(BlockCausal(5, 7), np.int32([3, 9]), 9), (19, 19, 9)),
    ):
        want = mask.visible(*lengths)
        assert isinstance(want.context, np.ndarray) and want.context.ndim == 3
        got = jax.jit(lambda m, lengths=lengths: m.visible(*lengths))(mask)
        jax.tree.map(np.testing.assert_array_equal, got, want)


def test_one_entry_is_shared_and_another_batch_is_refused():
    rows = Cached((20, 7)).visible(4, 4, 30).context
    assert visibility.of_batch(rows, 2) is rows
    np.testing.assert_array_equal(visibility.of_batch(rows[:1], 1), rows[0])
    with pytest.raises(ValueError, match="values for 2 batch entries and q has 3"):
        visibility.of_batch(rows, 3)


def test_what_differs_by_entry_is_told_for_those_who_cut_a_batch():
    ends = np.zeros((2, 1), np.int32), np.arange(7), np.ones((2, 7), np.int32), 5
    for mask, want in (
        (Cached((3, 4), 1, np.int32([0, 2])), [True, False, True]),
        (Captioned(BlockCausal(2, 2, offset=1), (1, 2), 4), [False, True]),
        (Intervals(own=(ends[:2], ends[2:]), context=((0, 3),)), [True, False, True, False, False, False]),
        (TeacherForcing(2, 2), []),
    ):
        values, structure, by_entry = masks.entries(mask, 2)
        assert by_entry == want
        jax.tree.map(np.testing.assert_array_equal, structure.unflatten(values), mask)
        if any(want):
            with pytest.raises(ValueError, match="values for 2 batch entries and q has 4"):
                masks.entries(mask, 4)


def test_static_masks_hash_and_compare():
    assert masks.is_static(Full()) and masks.is_static(TeacherForcing(3, 4)) and masks.is_static(Cached(3))
    assert hash(BlockCausal(3, 4)) == hash(BlockCausal(3, 4)) and BlockCausal(3, 4) != BlockCausal(3, 5)
    assert not masks.is_static(Intervals(own=((0, np.arange(3)),)))
    captioned = Captioned(TeacherForcing(3, 4), (1, 2), 3)
    assert masks.is_static(captioned) and hash(captioned) == hash(Captioned(TeacherForcing(3, 4), (1, 2), 3))


@pytest.mark.parametrize(
    "mask, lengths, message",
    [
        (BlockCausal(0, 4), (8, 8, None), "at least 1"),
        (BlockCausal(4, 4, window=-1), (8, 8, None), "0 to switch one off"),
        (BlockCausal(4, 4), (10, 10, None), "whole chunks"),
        (BlockCausal(4, 4, offset=1), (6, 12, None), "whole number of chunks"),
        (BlockCausal(4, 4, offset=2), (8, 12, None), "give keys up to the end"),
        (BlockCausal(4, 4, offset=-1), (8, 12, None), "counts the chunks before"),
        (BlockCausal(4, 4), (8, 8, 8), "drop context"),
        (TeacherForcing(4, 4), (8, 8, None), "pass context"),
        (TeacherForcing(4, 4), (8, 12, 8), "must match q"),
        (TeacherForcing(4, 4), (12, 12, 4), "clean stream"),
        (Cached(4), (8, 8, None), "pass it as context"),
        (Cached(9), (8, 8, 8), "does not lie in"),
        (Intervals(context=()), (8, 8, None), "pass context"),
        (Intervals(own=((0, 1),) * 3), (8, 8, None), "at most two"),
        (Intervals(own=((np.zeros(3, int), 1),)), (8, 8, None), "one a query"),
        (Intervals(own=((np.zeros((2, 3), int), 1),)), (8, 8, None), r"shape \(2, 3\): use \[8\].*one a batch entry"),
        (
            Intervals(own=((np.zeros((2, 8), int), np.ones((3, 1), int)),)),
            (8, 8, None),
            "for 2 and for 3 batch entries",
        ),
        (Cached((3, 9)), (8, 8, 8), "does not lie in"),
        (Cached((3, 4), sink=np.int32([1, 2, 3])), (8, 8, 8), "for 2 and for 3 batch entries"),
        (Cached(np.zeros((2, 1), int)), (8, 8, 8), r"Cached.stop has shape \(2, 1\)"),
        (BlockCausal(4, 4, offset=np.int32([0, 1])), (8, 12, None), "one for the whole batch"),
        (Captioned(Cached(3), 2, 4), (8, 8, 8), "cannot hold Cached"),
        (Captioned(Full(), 2, 4), (8, 8, None), "pass context"),
        (Captioned(Full(), 2, 9), (8, 8, 8), "whole buffer"),
        (Captioned(Full(), (2, 5), 4), (8, 8, 8), "do not lie in a buffer of 4"),
        (Captioned(TeacherForcing(2, 2, window=2, sink=1), 2, 4), (8, 8, 12), "window or sink, not both"),
        (Captioned(BlockCausal(2, 2), 2, 4), (8, 8, 12), "drop context"),
    ],
)
def test_masks_that_do_not_fit(mask, lengths, message):
    with pytest.raises(ValueError, match=message):
        mask.visible(*lengths)
