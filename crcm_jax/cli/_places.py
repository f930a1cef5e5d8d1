"""Places that a command will write to, tried while the command line is read: nothing is made, nothing is changed.

Missing folders are made later, by whoever writes there, with all their parents.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path


def new_file(text: str) -> Path:
    """The type of an option that names a file to be written: a path at which one can be made or replaced."""
    path = _path(text)
    if text.endswith(("/", os.sep)) or (_exists(path) and path.is_dir()):
        raise argparse.ArgumentTypeError(f"{text} is a folder: name a file")
    if path.exists() and not os.access(path, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text} must not be written: name another file, or allow it (chmod u+w)")
    _try(text, path.parent)
    return path


def new_folder(text: str) -> Path:
    """The type of an option that names a folder to be made or filled."""
    path = _path(text)
    if "://" in text:
        raise argparse.ArgumentTypeError(f"{text} is no folder: mount the bucket and name a folder in it")
    if _exists(path) and not path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a file: name a folder")
    _try(text, path)
    return path


def new_place(text: str) -> Path:
    """The type of an option that names a new file or folder, as other options say."""
    path = _path(text)
    _exists(path)
    _try(text, path.parent)
    return path


def given(text: str) -> str:
    """The type of an option that names what is to be read: anything but nothing."""
    if not text.strip():
        raise argparse.ArgumentTypeError("it is empty: name something, or leave the option out")
    if text.startswith("--"):
        # argparse takes an unknown option for a file where there is a space in it.
        raise argparse.ArgumentTypeError(f"there is no option {text.split('=')[0]}")
    return text


def _path(text: str) -> Path:
    return Path(given(text))


def _exists(path: Path) -> bool:
    """Whether something is there; a name that no file can have is refused here."""
    try:
        path.lstat()
        return True
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"{path} cannot be a name: {_reason(error)}") from None


def _try(text: str, folder: Path) -> None:
    """Tries to write a file without a name into the first folder on the way up that is there."""
    while not _exists(folder):
        folder = folder.parent
    if not folder.is_dir():
        raise argparse.ArgumentTypeError(f"{text} cannot be written: {folder} is no folder")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text} cannot be written: {folder}: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    return (getattr(error, "strerror", None) or str(error)).lower()
