"""What a cache's policies let a chunk see, frame by frame."""

import jax
import numpy as np
import pytest

from crcm_jax.cache import FULL
from crcm_jax.chunks import ChunkPattern

PATTERNS = [
    ChunkPattern(*numbers)
    for numbers in ((1, 1), (3, 3), (1, 4), (1, 2, 2), (1, 2, 2, 1), (1, 1, 1, 2), (2, 3, 3, 2), (1, 2, 9, 1))
]


@pytest.mark.parametrize("chunks", PATTERNS, ids=str)
def test_a_full_cache_shows_the_window_and_the_sink_once(chunks):
    """Earlier frames of chunks c − K + 1 … c and of the sink's (spec causal_rcm 3.2), in two intervals that do not
    overlap; with a traced number as with a known one."""
    frames = chunks.start(6)
    assert FULL.slots(chunks, frames) == frames and FULL.limit(chunks, frames) == 6
    index = chunks.index(frames)
    traced = jax.jit(lambda chunk: FULL.see(chunks, chunk, frames))
    for chunk in range(6):
        seen = FULL.see(chunks, chunk, frames)
        near = (index > chunk - chunks.window) | (index < chunks.sink) if chunks.window else index >= 0
        shown = [*range(seen.sink), *range(seen.start, seen.stop)]
        assert shown == np.flatnonzero(near & (index < chunk)).tolist()
        assert seen.now == FULL.slot(chunks, chunk, frames) == chunks.start(chunk)
        assert tuple(map(int, traced(chunk))) == tuple(seen)
