"""Which collectives a compiled program runs, how often, and how many bytes each moves, from its HLO text."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}
_BYTES |= {"s64": 8, "u64": 8, "f64": 8}

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*{$")
_COLLECTIVE = re.compile(rf" = (.*?) ({'|'.join(KINDS)})(-start)?\(")
_SHAPE = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")
_CALLED = re.compile(r"\b(body|condition|calls|to_apply|\w+_computations?)=(\{[^}]*\}|%?[\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CONDITION = re.compile(r"\bcondition=%?([\w.\-]+)")
_CONSTANT = re.compile(r"%?([\w.\-]+) = s32\[\]\S* constant\((\d+)\)")
_BELOW = re.compile(r"ROOT .* compare\([^,]*?, (?:s32\[\]\S* )?%?([\w.\-]+)\), direction=LT")
# Groups of devices come as {{0,1},{2,3}}; as all numbers up to a product, in an array of a shape, its axes exchanged,
# cut into so many groups; or as the axes, or parts of axes (how much is before the part, its length), of a mesh.
_LISTED = re.compile(r"replica_groups=\{\{([\d,]+)\}")
_NUMBERED = re.compile(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESHED = re.compile(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}")
_AXIS = re.compile(r"'([^']+)'=(\d+)")
_PART = re.compile(r"'([^']+)'(?::\((\d+)\)(\d+))?")

Speed = Callable[[Sequence[int]], float]
"""Bytes/s at which a device can send to the others of a group, which are given by number."""


class Collective(NamedTuple):
    """One kind: instructions in the program, how often they run in a step, bytes of their results on one device over
    the step, bytes of the largest one, bytes that a device sends over the step, and seconds that takes."""

    kind: str
    instructions: int
    runs: int
    bytes: int
    largest: int
    sent: float
    seconds: float


class _Instruction(NamedTuple):
    kind: str
    bytes: int
    group: list[int]
    """The devices of the first group; all groups are alike."""


def collectives(text: str, devices: int, speed: Speed, counted: int = 1) -> list[Collective]:
    """The collectives of optimised HLO for so many devices, by kind, largest first.

    A loop's body counts as often as the loop says that it runs (a count to a constant, as scans have); `counted` times
    where it counts to a number known only when it runs; and once where its end is something else. Both branches of a
    conditional count. An all-to-all that XLA spells with others counts as what it is spelt with.
    Seconds are those of the bytes alone, one collective after another.
    """
    found, called, entry = _read(text, devices, counted)
    times = _runs(called, entry)
    totals: dict[str, Collective] = {}
    for name, instructions in found.items():
        runs = times.get(name, 0)
        for kind, size, group in instructions:
            old = totals.get(kind, Collective(kind, 0, 0, 0, 0, 0.0, 0.0))
            sent = runs * _sent(kind, size, len(group))
            totals[kind] = Collective(
                kind,
                old.instructions + 1,
                old.runs + runs,
                old.bytes + runs * size,
                max(old.largest, size),
                old.sent + sent,
                old.seconds + (sent / speed(group) if sent else 0.0),
            )
    return sorted(totals.values(), key=lambda c: -c.bytes)


def _sent(kind: str, size: int, n: int) -> float:
    """Bytes that each of n devices sends at least, where `size` is the bytes of the result on one of them."""
    if kind == "collective-permute":
        return size
    if kind == "reduce-scatter":
        return size * (n - 1)
    return (2 if kind == "all-reduce" else 1) * size * (n - 1) / n


def _read(text: str, devices: int, counted: int):
    """Collectives of each computation, the (computation, times) that each one calls, and the entry's name."""
    found: dict[str, list[_Instruction]] = {}
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
            kind, size, group = match[2], _result_bytes(match[1], started=bool(match[3])), _group(line, devices)
            if here.startswith("all-reduce-scatter"):  # how TPU programs spell it: of the sum each keeps its own part
                kind, size = "reduce-scatter", size // len(group)
            found[here].append(_Instruction(kind, size, group))
        constants |= {name: int(value) for name, value in _CONSTANT.findall(line)}
        below = _BELOW.search(line)
        if below:
            lengths[here] = constants.get(below[1], counted)
        trips, condition = _TRIPS.search(line), _CONDITION.search(line)
        # TPU programs do not note the count; a condition is printed before the loop that it ends.
        length = int(trips[1]) if trips else lengths.get(condition[1], 1) if condition else 1
        for role, names in _CALLED.findall(line):
            times = length if role == "body" else 1
            called[here] += [(name.strip().lstrip("%"), times) for name in names.strip("{}").split(",")]
    return found, called, entry


def _group(line: str, devices: int) -> list[int]:
    """The devices of an instruction's first group."""
    if found := _LISTED.search(line):
        return [int(n) for n in found[1].split(",")]
    if found := _NUMBERED.search(line):
        shape = [int(n) for n in found[3].split(",")]
        numbers = np.arange(math.prod(shape)).reshape(shape)
        if found[4]:
            numbers = numbers.transpose([int(n) for n in found[4].split(",")])
        return numbers.reshape(int(found[1]), int(found[2]))[0].tolist()
    if found := _MESHED.search(line):
        axes = {name: int(length) for name, length in _AXIS.findall(found[1])}
        group = np.zeros(1, int)
        for name, before, length in _PART.findall(found[2]):
            names = list(axes)
            stride = math.prod(axes[other] for other in names[names.index(name) + 1 :])
            stride *= axes[name] // (int(before) * int(length)) if before else 1
            group = (group[:, None] + stride * np.arange(int(length or axes[name]))).ravel()
        return group.tolist()
    return list(range(devices))


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
