"""The configurations that come with the program: `--config=digits:tf` names one where no file is named."""

from __future__ import annotations

from pathlib import Path

from crcm_jax import configs

_OPTION = "--config="


def names() -> list[str]:
    """Names of the modules of `crcm_jax.configs`, each with a `get_config(variant)`."""
    return sorted(file.stem for file in Path(configs.__path__[0]).glob("*.py") if not file.stem.startswith("_"))


def shipped() -> str:
    """The end of a sentence about a configuration that is not there."""
    return f"name a Python file, or one of {', '.join(names())}"


def located(argv: list[str]) -> list[str]:
    """The words of a command line with the file of a shipped configuration in place of its name.

    A file of that name goes first; a word that names neither stays as it is.
    """
    return [_OPTION + _file(word.removeprefix(_OPTION)) if word.startswith(_OPTION) else word for word in argv]


def _file(value: str) -> str:
    name, colon, variant = value.partition(":")
    if Path(name).is_file() or name not in names():
        return value
    return f"{Path(configs.__path__[0]) / name}.py{colon}{variant}"
