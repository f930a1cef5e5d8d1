"""How latent frames form chunks (spec causal_rcm 3.1)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crcm_jax.chunks import ChunkPattern


@pytest.mark.parametrize(
    ("first", "size", "frames", "count"), [(1, 1, 21, 21), (3, 3, 21, 7), (1, 4, 21, 6), (2, 3, 8, 3)]
)
def test_chunks_tile_the_clip(first, size, frames, count):
    """Counted by hand; spans, starts, lengths and indices agree, also for a traced chunk."""
    pattern = ChunkPattern(first, size)
    assert pattern.count(frames) == count
    expected = [0] * first + [1 + (f - first) // size for f in range(first, frames)]
    np.testing.assert_array_equal(pattern.index(frames), expected)
    spans = pattern.spans(frames)
    assert [f for span in spans for f in range(frames)[span]] == list(range(frames))
    starts = jax.jit(lambda c: pattern.start(c))(jnp.arange(count))
    np.testing.assert_array_equal(starts, [span.start for span in spans])
    assert [pattern.length(c) for c in range(count)] == [span.stop - span.start for span in spans]


@pytest.mark.parametrize("frames", [0, 3, 20])
def test_a_clip_that_does_not_split_is_refused(frames):
    with pytest.raises(ValueError, match=r"use 4 \+ n·3 frames"):
        ChunkPattern(4, 3).count(frames)


def test_a_first_chunk_alone_is_a_clip():
    assert ChunkPattern(3, 3).count(3) == 1


@pytest.mark.parametrize("bad", [{"first": 0, "size": 1}, {"first": 1, "size": 0}, {"first": 0, "size": 0}])
def test_empty_chunks_are_refused(bad):
    """The reference accepts an empty block 0 (spec causal_rcm 12): it must not."""
    with pytest.raises(ValueError, match="at least one frame"):
        ChunkPattern(**bad)


def test_negative_limits_are_refused():
    with pytest.raises(ValueError, match="0 to switch one off"):
        ChunkPattern(1, 1, window=-1)
    with pytest.raises(ValueError, match="0 to switch one off"):
        ChunkPattern(1, 1, sink=-1)
