"""Which collectives a compiled program runs, how often, and how many bytes each moves, from its HLO text."""

from __future__ import annotations

import math
import re
from typing import NamedTuple

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}
_BYTES |= {"s64": 8, "u64": 8, "f64": 8}

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*{$")
_COLLECTIVE = re.compile(rf" = (.*?) ({'|'.join(KINDS)})(-start)?\(")
_SHAPE = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")
_CALLED = re.compile(r"\b(body|condition|calls|to_apply|branch_computations|\w+_computation)=(\{[^}]*\}|%?[\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CONDITION = re.compile(r"\bcondition=%?([\w.\-]+)")
_CONSTANT = re.compile(r"%?([\w.\-]+) = s32\[\]\S* constant\((\d+)\)")
_BELOW = re.compile(r"ROOT .* compare\([^,]*?, (?:s32\[\]\S* )?%?([\w.\-]+)\), direction=LT")


class Collective(NamedTuple):
    """One kind: instructions in the program, how often they run in a step, bytes of their results on one device over
    the step, bytes of the largest one."""

    kind: str
    instructions: int
    runs: int
    bytes: int
    largest: int


def collectives(text: str) -> list[Collective]:
    """The collectives of optimised HLO, by kind, largest first.

    A loop's body counts as often as the loop says that it runs (a count to a constant, as scans have), and once where
    that depends on data. Both branches of a conditional count. An all-to-all or reduce-scatter that XLA spells with
    others counts as what it is spelt with.
    """
    found, called, entry = _read(text)
    times = _runs(called, entry)
    totals: dict[str, list[int]] = {}
    for name, instructions in found.items():
        for kind, size in instructions:
            total = totals.setdefault(kind, [0, 0, 0, 0])
            total[0] += 1
            total[1] += times.get(name, 0)
            total[2] += times.get(name, 0) * size
            total[3] = max(total[3], size)
    return sorted((Collective(kind, *total) for kind, total in totals.items()), key=lambda c: -c.bytes)


def _read(text: str):
    """Collectives of each computation, the (computation, times) that each one calls, and the entry's name."""
    found: dict[str, list[tuple[str, int]]] = {}
    called: dict[str, list[tuple[str, int]]] = {}
    lengths: dict[str, int] = {}
    constants: dict[str, int] = {}
    here = entry = ""
    for line in text.splitlines():
        head = _COMPUTATION.match(line)
        if head:
            here = head[2]
            entry = here if head[1] else entry
            found[here], called[here], constants = [], [], {}
            continue
        if not here:
            continue
        match = _COLLECTIVE.search(line)
        if match:
            found[here].append((match[2], _result_bytes(match[1], started=bool(match[3]))))
        constants |= {name: int(value) for name, value in _CONSTANT.findall(line)}
        below = _BELOW.search(line)
        if below and below[1] in constants:
            lengths[here] = constants[below[1]]
        trips, condition = _TRIPS.search(line), _CONDITION.search(line)
        # TPU programs do not note the count; a condition is printed before the loop that it ends.
        length = int(trips[1]) if trips else lengths.get(condition[1], 1) if condition else 1
        for role, names in _CALLED.findall(line):
            times = length if role == "body" else 1
            called[here] += [(name.strip().lstrip("%"), times) for name in names.strip("{}").split(",")]
    return found, called, entry


def _runs(called, entry: str) -> dict[str, int]:
    """How often each computation runs in one run of the entry; the call graph has no cycles."""
    order, seen = [], set()

    def visit(name):
        if name in seen or name not in called:
            return
        seen.add(name)
        for child, _ in called[name]:
            visit(child)
        order.append(name)

    visit(entry)
    runs = {entry: 1}
    for name in reversed(order):
        for child, times in called[name]:
            runs[child] = runs.get(child, 0) + runs.get(name, 0) * times
    return runs


def _result_bytes(shape: str, started: bool) -> int:
    """Bytes of an instruction's result; an asynchronous start's tuple holds its operands too, and half of it counts."""
    sizes = [
        math.prod(int(n) for n in dims.split(",") if n) * _BYTES[dtype]
        for dtype, dims in _SHAPE.findall(re.sub(r"\{[^}]*\}", "", shape))
        if dtype in _BYTES
    ]
    if not started or len(sizes) < 2:
        return sum(sizes)
    # (operands, results, sometimes flags): of an all-gather the results are larger, of a reduce-scatter the operands.
    pairs = [size for size in sizes if size > 4] or sizes
    return sum(pairs[len(pairs) // 2 :])
