"""Families and published models by name: the one home of their facts, which loads without JAX.

Configurations, the converter, the command line, benchmarks and `pipeline.load` read it. A new family is one file like
`models/wan/family.py`, and its name in `_MODULES` here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from crcm_jax.errors import UsageError, UserError
from crcm_jax.models import published
from crcm_jax.models.family import Family, Fields, Part, Release
from crcm_jax.models.wan import family as wan

_MODULES = (wan,)

FAMILIES: dict[str, Family] = {module.FAMILY.name: module.FAMILY for module in _MODULES}

RELEASES: dict[str, Release] = {name: release for module in _MODULES for name, release in module.RELEASES.items()}
"""Whole models, by the names that `--model` of `crcm sample` and `crcm data` takes."""

PARTS: dict[str, Part] = {
    **{name: part for module in _MODULES for name, part in module.PARTS.items()},
    **published.PARTS,
}
"""Single networks, by the names that `--model` of `crcm convert` takes."""

LAYOUTS = tuple(dict.fromkeys([*(layout for family in FAMILIES.values() for layout in family.layouts), "ours"]))
"""All that `crcm convert --layout` takes."""

DEFAULT_FAMILY = "wan"
"""Of a `config.model` that names none."""


def release(name: str) -> Release:
    """UsageError for a name that is not in `RELEASES`."""
    if name not in RELEASES:
        raise UsageError(f"--model={name} is not one of {', '.join(RELEASES)}")
    return RELEASES[name]


def family(name: str) -> Family:
    """UserError for a name that is not in `FAMILIES`."""
    if name not in FAMILIES:
        raise UserError(f"model.family {name!r} is not one of {', '.join(FAMILIES)}")
    return FAMILIES[name]


def size(name: str, of: str = DEFAULT_FAMILY) -> dict[str, Any]:
    """The fields of a published size of family `of`; UserError for an unknown one."""
    return family(of).size(name)


def fields(model: Mapping[str, Any], change: Mapping[str, Any] | None = None) -> tuple[Family, Fields]:
    """(family, fields of the network) of a `config.model`, and of a role that `change`s it (`config.sizes.<role>`).

    Either may name a published `size`; what stands beside it comes before what the size says. A `change` to another
    family starts anew. UserError for an unknown family or size.
    """
    model, change = dict(model), dict(change or {})
    of = model.pop("family", None) or DEFAULT_FAMILY
    other = change.pop("family", None) or of
    found = {} if other != of else _whole(model, of)
    found |= _whole(change, other)
    return family(other), {key: tuple(v) if isinstance(v, (list, tuple)) else v for key, v in found.items()}


def _whole(section: dict[str, Any], of: str) -> dict[str, Any]:
    named = section.pop("size", None)
    return {**(size(named, of) if named else {}), **section}
