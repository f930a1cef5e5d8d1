"""Files as disks, downloads and editors leave them: cut, flipped, lengthened, of another kind."""

from collections.abc import Iterator

import numpy as np

_HEADS = (
    b"PK\x03\x04",
    b"\x89PNG\r\n\x1a\n",
    b"version https://git-lfs.github.com/spec/v1\n",
    b"<!DOCTYPE html>",
    b"\xff\xfe",
)


def mutations(content: bytes, count: int, seed: int = 0) -> Iterator[bytes]:
    """`count` seeded mutations of `content`, every kind in turn."""
    rng = np.random.default_rng(seed)
    kinds = (_cut, _flipped, _lengthened, _of_another_kind, _overwritten, _without_a_piece, _flipped)
    for number in range(count):
        yield kinds[number % len(kinds)](content, rng)


def _cut(content: bytes, rng: np.random.Generator) -> bytes:
    return content[: rng.integers(0, max(len(content), 1))]


def _flipped(content: bytes, rng: np.random.Generator) -> bytes:
    altered = bytearray(content)
    # Headers lie at the front: half of the flips are there.
    reach = len(altered) if rng.random() < 0.5 else min(len(altered), 512)
    for at in rng.integers(0, reach, rng.choice([1, 1, 2, 8])):
        altered[at] ^= 1 << int(rng.integers(8))
    return bytes(altered)


def _lengthened(content: bytes, rng: np.random.Generator) -> bytes:
    more = rng.choice([1, 17, 600])
    return content + (bytes(more), rng.bytes(more), content[:more])[rng.integers(3)]


def _of_another_kind(content: bytes, rng: np.random.Generator) -> bytes:
    head = _HEADS[rng.integers(len(_HEADS))] if rng.random() < 0.5 else rng.bytes(rng.integers(1, 16))
    return head + content[len(head) :]


def _overwritten(content: bytes, rng: np.random.Generator) -> bytes:
    word = (b"\xff" * 4, bytes(8), b"\xff" * 8, b"\x7f\xff\xff\xff", b"9" * 12, b"[" * 30, b"null", b"-1")[
        rng.integers(8)
    ]
    at = rng.integers(0, max(len(content), 1))
    return content[:at] + word + content[at + len(word) :]


def _without_a_piece(content: bytes, rng: np.random.Generator) -> bytes:
    start, end = sorted(rng.integers(0, len(content) + 1, 2))
    return content[:start] + content[end:]
