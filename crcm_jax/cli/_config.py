"""A configuration from the words of a command line: a file, a variant, and --config.KEY=VALUE for any key."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from crcm_jax.cli import _configs
from crcm_jax.errors import UsageError
from crcm_jax.parallel import axes

if TYPE_CHECKING:
    # Not at once: `crcm --help` shows every command and needs none of it.
    from ml_collections import ConfigDict

_PREFIX = "--config."

OTHER_NAMES = {
    "optim.lr": ("learning_rate", "learningrate", "rate"),
    "optim.b1": ("beta1", "adam_beta1", "beta_1", "momentum"),
    "optim.b2": ("beta2", "adam_beta2", "beta_2"),
    "optim.eps": ("epsilon", "adam_epsilon", "adam_eps"),
    "optim.weight_decay": ("wd", "decay", "adam_weight_decay"),
    "optim.warmup": ("warmup_steps", "lr_warmup_steps", "num_warmup_steps"),
    "optim.grad_clip": ("max_grad_norm", "clip_grad", "grad_norm", "gradient_clip", "clip"),
    "optim.accumulate": ("gradient_accumulation_steps", "grad_accum", "accumulation", "accum", "accumulation_steps"),
    "data.batch_size": ("batch", "bs", "batchsize", "train_batch_size", "global_batch_size"),
    "data.workers": ("num_workers", "dataloader_num_workers"),
    "data.path": ("data_path", "dataset_path", "data_root", "train_data_dir"),
    "data.frames": ("num_frames", "n_frames", "clip_length"),
    "model.layers": ("num_layers", "n_layers", "depth"),
    "model.heads": ("num_heads", "n_heads", "num_attention_heads"),
    "model.dim": ("hidden_size", "hidden_dim", "width", "embed_dim"),
    "model.remat": ("gradient_checkpointing", "checkpointing", "activation_checkpointing"),
    "ema.rate": ("ema_decay", "ema_rate", "decay_rate"),
    "train.steps": ("max_steps", "max_train_steps", "num_steps", "iterations", "total_steps", "epochs", "max_iters"),
    "train.save_every": ("checkpointing_steps", "save_interval", "save_steps", "save_freq"),
    "train.log_every": ("logging_steps", "log_interval", "log_freq"),
    "param_dtype": ("precision", "mixed_precision", "weight_dtype"),
    "objective.guidance": ("cfg", "cfg_scale", "guidance_scale"),
    "dmd.student_update_freq": ("dfake_gen_update_ratio", "update_ratio", "critic_steps"),
}
"""What other projects call a key, for those who write that from habit."""


def mesh(text: str) -> dict[str, int]:
    """The type of `--mesh`: lengths by axis, as `parallel.axes.parse` reads them."""
    try:
        return axes.parse(text or "nothing")
    except UsageError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


class Axes(argparse.Action):
    """Gathers what several `--mesh` say of different axes."""

    def __call__(self, parser, namespace, values, option_string=None):
        namespace.mesh = {**(namespace.mesh or {}), **values}


def file(text: str) -> str:
    """The type of `--config`: FILE.py or FILE.py:VARIANT, or a shipped configuration by its name."""
    text = _configs.located(text)
    path = text.split(":")[0]
    if not Path(path).is_file():
        raise argparse.ArgumentTypeError(f"there is no configuration file {path}: {_configs.shipped()}")
    return text


def split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """(the words that set keys, each --config.KEY=VALUE or a bare switch; all others)."""
    keys: list[str] = []
    others: list[str] = []
    words = iter(range(len(argv)))
    for i in words:
        word = argv[i]
        if not word.startswith((_PREFIX, "--noconfig.")):
            others.append(word)
            continue
        # With a space in place of =.
        if "=" not in word and i + 1 < len(argv) and not argv[i + 1].startswith("--"):
            word = f"{word}={argv[next(words)]}"
        keys.append(word)
    return keys, others


def load(
    name: str, words: Sequence[str], axes: Mapping[str, int] | None = None, *, new_axes: bool = False
) -> ConfigDict:
    """The locked configuration of FILE.py:VARIANT with keys set by `words` and the mesh by `axes`, checked.

    new_axes: whether `axes` may set what the configuration's mesh does not have. UsageError, one sentence, for keys
    that do not exist, values of another type or out of their range, and files that cannot be read as a configuration.
    """
    from crcm_jax import config_ranges

    # The plain configuration first: what it lacks can then be told from what is wrong with a value.
    plain = _parse(name, [])
    for word in words:
        _check_key(word.split(".", 1)[1].split("=", 1)[0], plain)
    config = _parse(name, words)
    if axes:
        there = dict(config.get("mesh") or {})
        lacking = [axis for axis in axes if axis not in there]
        if lacking and not new_axes:
            raise UsageError(f"{name} has no config.mesh.{lacking[0]}, which --mesh sets")
        with config.unlocked():
            config.mesh = {**there, **axes}
    config_ranges.check(config)
    return config


def _parse(name: str, words: Sequence[str]) -> ConfigDict:
    from absl import flags
    from ml_collections import ConfigDict, config_flags

    values = flags.FlagValues()
    command = ["crcm", f"--config={name}", *words]
    config_flags.DEFINE_config_file(
        "config", None, "configuration", flag_values=values, lock_config=True, sys_argv=command
    )
    try:
        values(command)
    except Exception as error:
        # Whatever the file may raise. A failure inside it arrives as its traceback; the last line says what happened.
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        raise UsageError(reason.removeprefix("ValueError: ")) from error
    if not isinstance(values.config, ConfigDict):
        raise UsageError(f"{name}: get_config gives a {type(values.config).__name__} and not a ConfigDict")
    return values.config


def _keys(config: ConfigDict, prefix: str = "") -> Iterator[str]:
    from ml_collections import ConfigDict

    for key, value in config.items():
        yield f"{prefix}{key}"
        if isinstance(value, ConfigDict):
            yield from _keys(value, f"{prefix}{key}.")


def _check_key(key: str, config: ConfigDict) -> None:
    known = list(_keys(config))
    if key.split("[")[0] not in known:
        near = nearest(key, known)
        raise UsageError(
            f"the configuration has no key config.{key}" + (f": did you mean config.{near}?" if near else "")
        )


def nearest(key: str, known: Sequence[str]) -> str | None:
    """Which of the `known` keys was meant by `key`, if any comes near.

    By its last word first, in its own section if that has it: a forgotten or misspelt section matters less.
    """
    section, _, word = key.rpartition(".")
    word = word.lower().replace("-", "_")
    for name, others in OTHER_NAMES.items():
        if word in others and name in known:
            own = f"{section}.{name.rpartition('.')[2]}"
            return own if own in known else name
    words: dict[str, list[str]] = {}
    for name in known:
        words.setdefault(name.rpartition(".")[2], []).append(name)
    if near := difflib.get_close_matches(word, words, 1, cutoff=0.75):
        return difflib.get_close_matches(key, words[near[0]], 1, cutoff=0.0)[0]
    return next(iter(difflib.get_close_matches(key, known, 1, cutoff=0.75)), None)


def key_for(option: str) -> str | None:
    """The option that sets a key, where `option` is one that only lacks its --config., such as --optim.lr or --lr."""
    from crcm_jax.config_ranges import RULES

    near = nearest(option.removeprefix("--").removeprefix("config."), list(RULES))
    return near and f"{_PREFIX}{near}"
