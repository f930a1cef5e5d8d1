"""The configurations that come with the program: `--config=digits:tf` names one where no file is named."""

from __future__ import annotations

from pathlib import Path

from crcm_jax import configs


def names() -> list[str]:
    """Names of the modules of `crcm_jax.configs`, each with a `get_config(variant)`."""
    return sorted(file.stem for file in Path(configs.__path__[0]).glob("*.py") if not file.stem.startswith("_"))


def shipped() -> str:
    """The end of a sentence about a configuration that is not there."""
    return f"name a Python file, or one of {', '.join(names())}"


def located(value: str) -> str:
    """What `--config` names, with the file of a shipped configuration in place of its name.

    A file of that name goes first; what names neither stays as it is.
    """
    name, colon, variant = value.partition(":")
    if Path(name).is_file() or name not in names():
        return value
    return f"{Path(configs.__path__[0]) / name}.py{colon}{variant}"
