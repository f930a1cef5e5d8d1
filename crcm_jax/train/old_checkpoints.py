"""Checkpoints of format 1, which knew two players by name: their trees as this version has them."""

from __future__ import annotations

from typing import Any, NamedTuple

NAMES = {
    "student.params": "params",
    "student.ema": "ema",
    "student.opt": "opt",
    "critic.params": "critic",
    "critic.opt": "critic_opt",
}
"""Trees by their present names → by those of format 1."""


class _Progress(NamedTuple):
    iteration: Any
    student_updates: Any
    critic_updates: Any


def wanted(trees: dict[str, Any]) -> dict[str, Any]:
    """What to read from a checkpoint of format 1 in place of `trees`, shapes by their present names.

    KeyError for a player or an average that format 1 did not have.
    """
    counters = dict(trees["counters"])
    updates, iteration = counters.pop("updates"), counters.pop("iteration")
    progress = _Progress(iteration, updates["student"], updates.get("critic", iteration))
    old = {NAMES[name]: tree for name, tree in trees.items() if name != "counters"}
    return old | {"counters": {**counters, "progress": progress}}


def converted(found: dict[str, Any], trees: dict[str, Any]) -> dict[str, Any]:
    """What `wanted` has read, by the names of `trees`."""
    counters = dict(found["counters"])
    progress = _Progress(*counters.pop("progress"))
    counts = {"student": progress.student_updates, "critic": progress.critic_updates}
    counters["updates"] = {name: counts[name] for name in trees["counters"]["updates"]}
    counters["iteration"] = progress.iteration
    return {name: found[NAMES[name]] for name in trees if name != "counters"} | {"counters": counters}
