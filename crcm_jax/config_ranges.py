"""What each key of a configuration may be: one declaration, checked before anything is built.

Keys that are not declared, of configurations with keys of their own, may be anything.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from ml_collections import ConfigDict

from crcm_jax.errors import UsageError
from crcm_jax.ranges import Range, count


class Rule(Protocol):
    """What a value may be."""

    def words(self) -> str:
        """In words that finish "must be …"."""

    def holds(self, value: Any) -> bool: ...


@dataclasses.dataclass(frozen=True)
class Choice:
    """One of a few values."""

    among: tuple[Any, ...]

    def words(self) -> str:
        return "one of " + ", ".join(map(str, self.among))

    def holds(self, value: Any) -> bool:
        return any(type(value) is type(known) and value == known for known in self.among)


@dataclasses.dataclass(frozen=True)
class Text:
    """Any words, none too."""

    def words(self) -> str:
        return "text"

    def holds(self, value: Any) -> bool:
        return isinstance(value, str)


@dataclasses.dataclass(frozen=True)
class Optional:
    """What `rule` says, or nothing."""

    rule: Rule

    def words(self) -> str:
        return f"{self.rule.words()}, or None"

    def holds(self, value: Any) -> bool:
        return value is None or self.rule.holds(value)


@dataclasses.dataclass(frozen=True)
class Several:
    """A tuple of what `rule` says, of `length` entries, or of at least `at_least`."""

    rule: Rule
    length: int | None = None
    at_least: int = 1

    def words(self) -> str:
        amount = (
            f"{self.length}" if self.length is not None else f"at least {self.at_least}" if self.at_least else "any"
        )
        return f"a tuple of {amount}, each {self.rule.words()}"

    def holds(self, value: Any) -> bool:
        if not isinstance(value, (tuple, list)) or not all(map(self.rule.holds, value)):
            return False
        return len(value) == self.length if self.length is not None else len(value) >= self.at_least


FLAG = Choice((True, False))
_SEED = count(0, 2**32 - 1)
_ANY = Range()
_POSITIVE = Range(above=0, at_most=1e9)
_GUIDANCE = Range(at_least=0, at_most=1000)
_SIDE = count(1, 1 << 16)
_DECAY = Range(at_least=0, below=1)
_TRAINING = ("bidirectional", "tf", "df", "tf_dcm", "tf_scm", "tf_dscm", "sf_dmd", "tf_scm_sf_dmd")

RULES: dict[str, Rule] = {
    "seed": _SEED,
    "training": Choice(_TRAINING),
    "param_dtype": Choice(("float32", "bfloat16", "float16")),
    **dict.fromkeys(("chunks.first", "chunks.size"), count()),
    **dict.fromkeys(("chunks.window", "chunks.sink"), count(0)),
    "data.name": Choice(("digits", "tfds", "latents")),
    **dict.fromkeys(("data.batch_size", "data.examples", "data.frames", "data.digits", "data.stride"), count()),
    **dict.fromkeys(("data.height", "data.width"), _SIDE),
    "data.seed": _SEED,
    "data.digit_size": _POSITIVE,
    "data.speed": Several(Range(at_least=0, at_most=1e6), length=2),
    "data.straight": count(0),
    **dict.fromkeys(("data.threads", "data.prefetch", "data.workers"), count(0, 1024)),
    **dict.fromkeys(("data.path", "data.dataset", "data.data_dir", "data.video", "data.text"), Text()),
    "data.splits.*": Text(),
    "codec.name": Choice(("pixels", "wan_vae")),
    "codec.version": Choice(("2.1", "2.2")),
    **dict.fromkeys(("codec.patch", "codec.channels"), count()),
    "codec.mean": _ANY,
    "codec.std": _POSITIVE,
    "text.name": Choice(("words", "umt5")),
    **dict.fromkeys(("text.length", "text.dim"), count()),
    **dict.fromkeys(("text.weights", "text.tokenizer"), Text()),
    **dict.fromkeys(
        (f"model.{name}" for name in ("dim", "ffn_dim", "heads", "layers", "freq_dim", "text_dim")), count()
    ),
    **dict.fromkeys(("model.in_channels", "model.out_channels"), count()),
    "model.patch": Several(count(), length=3),
    "model.image_dim": Optional(count()),
    "model.eps": Range(above=0, at_most=1),
    "model.dtype": Choice(("float32", "bfloat16", "float16")),
    "model.round_time": FLAG,
    "model.remat": Choice(("none", "block", "attention", "offload")),
    "model.attention": Optional(Text()),
    **{f"mesh.{axis}": count() for axis in ("data", "fsdp", "context", "tensor")},
    "init.*": Text(),
    "times.name": Choice(("uniform_shift", "log_normal")),
    "times.mean": _ANY,
    "times.std": _POSITIVE,
    "times.s": _POSITIVE,
    "objective.scale": _POSITIVE,
    "objective.weighting": Choice(("none", "gaussian_bell")),
    "objective.strategy": Choice(("random", "same", "fopp")),
    "objective.prompt_dropout": Range(at_least=0, at_most=1),
    "objective.guidance": _GUIDANCE,
    **dict.fromkeys(("objective.levels", "objective.skip"), count()),
    "objective.time_shift": _POSITIVE,
    "objective.warmup": count(0),
    "objective.one_pass": FLAG,
    "rollout.steps": Several(count()),
    "rollout.times": Several(Several(Range(above=0, below=1), at_least=0)),
    "rollout.noisy_context": FLAG,
    "rollout.context_start": count(0),
    "dmd.guidance": _GUIDANCE,
    "dmd.scale": _POSITIVE,
    **dict.fromkeys(("dmd.replayed", "dmd.at_once", "dmd.gather_once"), FLAG),
    "dmd.student_update_freq": count(),
    "optim.lr": Range(at_least=0, at_most=100),
    **dict.fromkeys(("optim.b1", "optim.b2"), _DECAY),
    "optim.eps": Range(above=0, at_most=1),
    "optim.weight_decay": Range(at_least=0, at_most=100),
    "optim.warmup": count(0),
    "optim.grad_clip": Range(at_least=0, at_most=1e9),
    "optim.accumulate": count(),
    "ema.rate": Range(above=0, below=12**-0.5),
    **dict.fromkeys(("train.steps", "train.log_every", "train.keep"), count()),
    **dict.fromkeys(("train.save_every", "train.sample_every"), count(0)),
    **dict.fromkeys(("sample.ode_steps", "sample.prompts"), count()),
    "sample.guidance": _GUIDANCE,
}
"""By key. Sections that are alike share theirs, see `rule`."""

_SAME = (("critic_optim.", "optim."), ("objective.times.", "times."), ("dmd.times.", "times."))


def rule(key: str) -> Rule | None:
    """What the dotted `key` may be; None where nothing is declared."""
    for section, other in _SAME:
        if key.startswith(section):
            key = other + key.removeprefix(section)
    if key.startswith("sizes.") and key.count(".") == 2:
        key = "model." + key.rsplit(".", 1)[1]
    return RULES.get(key) or RULES.get(key.rsplit(".", 1)[0] + ".*")


def leaves(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every leaf of a ConfigDict or dict."""
    for key, value in config.items():
        if isinstance(value, (dict, ConfigDict)):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def check(config: Mapping[str, Any]) -> None:
    """UsageError, one sentence that names the key and its range, for the first value that is out of it."""
    for key, value in leaves(config):
        wanted = rule(key)
        if wanted is not None and not wanted.holds(value):
            raise UsageError(f"config.{key} is {value!r}, and must be {wanted.words()}")
