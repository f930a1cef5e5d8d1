"""Damaged examples are left out of training, named and counted, and never end a run by themselves."""

from __future__ import annotations

import math
import operator
import sys
from typing import Any

from crcm_jax.data.example import DamagedExample
from crcm_jax.errors import UserError

LIMIT = 10
"""So many damaged examples in a row, at places far apart, end the run: then the set as a whole is damaged or gone."""


_NAMED_AT_MOST = 100  # so that a log stays readable


class Skipping:
    """A source in which another example takes the place of a damaged one.

    Which one depends on the index alone: batches are the same whatever the number of processes, and after a restart. It
    lies far away, so that a shard that is damaged as a whole does not end the run. `source[i]` gains `damaged`, the
    number of examples that were passed over for it; each is named once on stderr.
    """

    def __init__(self, source: Any):
        self._source = source
        self._named: set[int] = set()
        stride = max(1, int(len(source) * (math.sqrt(5) - 1) / 2))
        # With no common divisor every example is reached.
        while math.gcd(stride, len(source)) > 1:
            stride += 1
        self._stride = stride

    def __len__(self) -> int:
        return len(self._source)

    def __repr__(self) -> str:
        return f"Skipping({self._source!r})"

    def __getitem__(self, index: int) -> dict[str, Any]:
        """UserError after `LIMIT` damaged examples."""
        at = operator.index(index)
        for passed_over in range(LIMIT):
            try:
                return {**self._source[at], "damaged": passed_over}
            except DamagedExample as error:
                last = error
                if at not in self._named and len(self._named) < _NAMED_AT_MOST:
                    self._named.add(at)
                    more = "; more are not named" if len(self._named) == _NAMED_AT_MOST else ""
                    print(f"crcm: left out: {error}; {len(self._named)} so far{more}", file=sys.stderr, flush=True)
            at = (at + self._stride) % len(self)
        raise UserError(f"{LIMIT} examples in a row are damaged, the last one: {last}; look with crcm data check")
