"""Around every library that reads a user's file: whatever it raises becomes one sentence that names the file."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

from crcm_jax.errors import UserError

_POINTERS = (b"version https://git-lfs.github.com/spec/", b"version https://hawser.github.com/spec/")
_ANNEX = re.compile(rb"(\.\./)*(\.git)?/?annex/objects/")
_LONGEST_POINTER = 1024


@contextlib.contextmanager
def reading(path: str | Path, what: str) -> Iterator[None]:
    """The body hands the file at `path` to a library that reads `what`, such as "a picture".

    UserError for a large-file pointer in the file's place, and for anything that the library raises, panics of
    libraries in other languages included: they are no `Exception`. Nothing but the library's calls belongs in the body.
    """
    refuse_pointer(path)
    try:
        yield
    except (UserError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        raise UserError(f"{path} cannot be read as {what} ({words(error, path)})") from error


def words(error: BaseException, path: str | Path = "") -> str:
    """An exception in a few words, on one line, without the file's name, which the sentence around has already."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    lines = str(error).strip().splitlines()
    text = lines[0].replace(f" '{path}'", "").replace(f" {path}", "") if lines else type(error).__name__
    return text if len(text) <= 200 else f"{text[:200]} …"


def pointer(start: bytes) -> str | None:
    """What a file that begins with `start` stands for, as the end of a sentence, if it is a large-file pointer."""
    if start.startswith(_POINTERS):
        size = re.search(rb"^size (\d{1,18})$", start, re.MULTILINE)
        kept = f"{int(size[1]):,} bytes" if size else "a file"
        return (
            f"is a large-file pointer: a few lines of text in place of {kept} that git keeps elsewhere; "
            "fetch the file itself with git lfs pull, or download it by itself"
        )
    if _ANNEX.match(start):
        return "is a large-file pointer of git-annex: fetch the file itself with git annex get"
    return None


def pointer_at(path: str | Path) -> str | None:
    """`pointer` of the file at `path`; None where there is none that can be read: its reader will say why."""
    try:
        with open(path, "rb") as file:
            return pointer(file.read(_LONGEST_POINTER))
    except OSError:
        return None


def refuse_pointer(path: str | Path) -> None:
    """UserError if a large-file pointer lies at `path`."""
    told = pointer_at(path)
    if told:
        raise UserError(f"{path} {told}")
