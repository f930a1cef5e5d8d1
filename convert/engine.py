"""One conversion: compare names and shapes, then move tensor by tensor, then put the result in its place.

Between any two layouts the way leads through ours: a foreign tensor fills a slot, one layer's slice of one of our
leaves, and every layout says what lies in each slot. Elements are never touched, so any round trip is bit for bit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Container, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from crcm_jax.convert import arrays, models, outputs
from crcm_jax.convert.arrays import TRANSFORMS, Spec, shape_after
from crcm_jax.convert.models import STACKED, Model
from crcm_jax.convert.sources import Source, open_source
from crcm_jax.errors import UserError

LAYOUTS = ("native", "diffusers", "rcm", "ours")

Slot = tuple[str, int | None]
"""(our leaf, layer or None)."""


class Place(NamedTuple):
    """Where a layout keeps a slot: part `part` of `parts` equal ones of a tensor's first axis, and the transform from
    there to ours."""

    name: str
    part: int
    parts: int
    transform: str

    def rows(self, spec: Spec) -> tuple[int, int] | None:
        """(first, end) along the first axis of the tensor of `spec`; None for all."""
        if self.parts == 1:
            return None
        rows = spec.shape[0] // self.parts
        return self.part * rows, (self.part + 1) * rows


@dataclasses.dataclass(frozen=True)
class Report:
    """What a source holds against what its model needs."""

    source: Source
    model: Model
    layout: str
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    misshapen: tuple[str, ...]
    passed_over: tuple[str, ...]

    @property
    def fits(self) -> bool:
        return not (self.missing or self.unexpected or self.misshapen)

    def lines(self) -> Iterator[str]:
        """For people."""
        specs = self.source.specs
        total, dtypes = sum(spec.nbytes for spec in specs.values()), sorted({spec.dtype for spec in specs.values()})
        yield f"{self.source.path}: {self.source.kind}, {self.layout} layout of {self.model.name}"
        yield f"  {len(specs)} tensors, {total / 1e9:.3f} GB, {', '.join(dtypes)}"
        for note in self.source.notes:
            yield f"  {note}"
        if self.passed_over:
            yield f"  passed over, in no network: {_some(self.passed_over)}"
        for label in ("missing", "unexpected", "misshapen"):
            names = getattr(self, label)
            yield f"  {label}: {len(names)}" + (f", {_some(names)}" if names else "")


def _some(names: tuple[str, ...], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f" … and {len(names) - most} more" if len(names) > most else "")


def places(model: Model, layout: str) -> dict[Slot, Place]:
    """Every slot of a model, and where a layout keeps it."""
    layered = {leaf for pattern, leaf, _ in model.family.table("native", model.config) if "{i}" in pattern}
    found: dict[Slot, Place] = {}
    for pattern, leaf, transform in model.family.table(layout, model.config):
        name, part, parts = models.in_parts(pattern)
        for i in range(model.layers) if leaf in layered else (None,):
            if transform == STACKED and i is not None:
                found[leaf, i] = Place(name, i, model.layers, transform)
            else:
                found[leaf, i] = Place(name.replace("{i}", str(i)), part, parts, transform)
    return found


def slot_shape(model: Model, slot: Slot) -> tuple[int, ...]:
    """The shape of a slot's elements in our layout."""
    shape = model.leaves[slot[0]]
    return shape if slot[1] is None else shape[1:]


def tensor_shape(model: Model, slot: Slot, place: Place) -> tuple[int, ...]:
    """The shape of the tensor that holds a slot in the layout of `place`."""
    shape = shape_after(TRANSFORMS[place.transform].to_theirs, slot_shape(model, slot))
    assert shape, f"{place.transform} does not fit {slot[0]}"
    first, *rest = shape
    return (first * place.parts, *rest)


def compare(source: Source, model: Model, layout: str) -> Report:
    """Checks every name and shape; moves aliases and unused tensors of `source` out of the way."""
    family, kept = model.family, places(model, layout)
    aliases = {
        alias.replace("{i}", str(i)): name.replace("{i}", str(i))
        for alias, name in family.aliases.items()
        for i in (range(model.layers) if "{i}" in alias else (0,))
    }
    aliases = {alias: name for alias, name in aliases.items() if alias in source.specs}
    passed_over = [alias for alias, name in aliases.items() if name in source.specs]
    for alias in passed_over:
        name = aliases.pop(alias)
        if not _equal(source, alias, name):
            raise UserError(f"{source.path}: {alias} and {name} are one tensor with two contents")
    source.rename(aliases)
    passed_over += filter(family.passes_over, source.specs)
    needed = {place.name: tensor_shape(model, slot, place) for slot, place in kept.items()}
    misshapen = [
        f"{name} is {list(source.specs[name].shape)}, needed {list(shape)}"
        for name, shape in needed.items()
        if name in source.specs and source.specs[name].shape != shape
    ]
    missing = [name for name in needed if name not in source.specs]
    unexpected = [name for name in source.specs if name not in needed and name not in passed_over]
    return Report(source, model, layout, *map(tuple, (missing, unexpected, misshapen, passed_over)))


def _equal(source: Source, first: str, second: str) -> bool:
    return source.specs[first] == source.specs[second] and np.array_equal(
        source.read(first, None), source.read(second, None)
    )


def inspect(
    path: str | Path, *, model: str | None = None, which: str | None = None, heads: int | None = None
) -> Report:
    """Opens a source and compares it with its model; nothing is converted. UserError if it cannot be read."""
    source = open_source(path, which)
    said = {**source.config, **(source.meta.get("model") or {})}
    role = {"params": "student", "ema": "student"}.get(which or "ema", which)
    said |= (source.meta.get("config") or {}).get("sizes", {}).get(role, {})
    if heads is not None:
        said["heads"] = heads
    found, layout = models.identify(source.specs, said, model)
    return compare(source, found, layout)


def convert(
    path: str | Path, to: str | Path, layout: str, *, model: str | None = None, which: str | None = None,
    heads: int | None = None, dtype: str | None = None, say: Callable[[str], None] = print,
) -> Report:  # fmt: skip
    """Writes the weights at `path` to `to` in `layout`, whole or not at all.

    model, which, heads: see `crcm convert --help`. dtype: "F32", "BF16" … to round floating-point elements to; default
    as they are. `say` gets the report. UserError if anything is missing, unexpected, of another shape or not finite,
    if the source is damaged, or if `to` exists.
    """
    output = outputs.choose(Path(to), layout)
    report = inspect(path, model=model, which=which, heads=heads)
    for line in report.lines():
        say(line)
    if not report.fits:
        raise UserError(f"{path} does not fit {report.model.name}: see missing, unexpected and misshapen above")
    source, model = report.source, report.model
    before, after = places(model, report.layout), places(model, layout)
    usable = arrays.WIDE if layout == "ours" else arrays.FLOATS
    specs = _target_specs(source, model, before, after, dtype, usable)
    with outputs.draft(output, specs, model, layout, source) as draft:
        strange = _move(source, before, after, specs, draft)
        if strange:
            raise UserError(
                f"{path}: {len(strange)} tensors hold NaN or infinity ({_some(tuple(strange))}), and a model with them "
                "makes black clips: get the weights again, or from an earlier checkpoint"
            )
    say(f"{to}: {layout} layout, {len(specs)} tensors")
    return report


def _target_specs(
    source: Source, model: Model, before, after, dtype: str | None, usable: Container[str]
) -> dict[str, Spec]:
    """Types and shapes of the tensors to write; a leaf that stacks layers needs them to be of one type.

    UserError for types that are not `usable` in the target and are not to be cast, and for those that cannot be.
    """
    specs: dict[str, Spec] = {}
    for slot, place in after.items():
        name, origin = place.name, before[slot].name
        kind = source.specs[origin].dtype
        if kind not in arrays.FLOATS:
            raise UserError(
                f"{source.path}: {origin} is of type {kind}, no floating-point one: quantised weights cannot be "
                "converted; get them as bfloat16, float16 or float32"
            )
        if dtype is None and kind not in usable:
            raise UserError(
                f"{source.path}: {origin} is of type {kind}, which no network here computes with: give "
                "--dtype=bfloat16 (or float16, float32) to widen it"
            )
        kind = dtype or kind
        if name in specs and specs[name].dtype != kind:
            raise UserError(
                f"the layers of {name} are of types {specs[name].dtype} and {kind}: give --dtype to make them one"
            )
        specs[name] = Spec(kind, tensor_shape(model, slot, place))
    return specs


def _move(source: Source, before, after, specs, draft: Any) -> list[str]:
    """Moves every slot; the foreign names of those that hold NaN or infinity."""
    strange = []
    for slot, to in after.items():
        origin, spec = before[slot], specs[to.name]
        held = source.specs[origin.name]
        dtype, rows = held.dtype, origin.rows(held)
        array = TRANSFORMS[origin.transform].to_ours(source.read(origin.name, rows))
        array = TRANSFORMS[to.transform].to_theirs(array)
        offset = to.part * (spec.nbytes // to.parts)
        fine = True
        for block in arrays.blocks(array):
            number = not arrays.unusual(block, dtype)
            block = arrays.cast(block, dtype, spec.dtype)
            if number and arrays.unusual(block, spec.dtype):
                raise UserError(
                    f"{source.path}: {origin.name} holds numbers that are too large for {spec.dtype}: give "
                    "--dtype=bfloat16 or float32"
                )
            fine = fine and number
            draft.write(to.name, block, offset)
            offset += block.nbytes
        if not fine:
            strange.append(origin.name if rows is None else f"{origin.name}[{rows[0]}:{rows[1]}]")
    return strange
