"""Whole-or-nothing writing, the one home of it, and the names of files that systems leave beside a user's own."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path

from crcm_jax import interrupts
from crcm_jax.errors import UserError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FULL_IN_WORDS = re.compile(r"ENOSPC|EDQUOT|EFBIG|No space left on device|quota exceeded|File too large")
_LEFT_BY_SYSTEMS = {"thumbs.db", "desktop.ini", "__macosx", "@eadir"}


@contextlib.contextmanager
def atomic(path: str | Path, draft: str | None = None) -> Iterator[Path]:
    """Yields the path of a draft beside `path`, to be written as a file or as a folder; left without an exception, the
    draft is on the disk and has taken the place of `path`.

    Left by any exception, the draft is gone and what was at `path` is there still. The draft's name is hidden, unlike
    any other process's, and ends as `path` does, since libraries go by that; `draft` is another name for it, of a
    writer that no second one can meet: it writes over what a killed one has left. Missing folders are made. UserError,
    one sentence, where the system refuses, be it in the body.
    """
    # A link stays a link: what it leads to is written.
    place = Path(os.path.realpath(path))
    under_way = place.with_name(draft or f".{place.stem[:40]}.{uuid.uuid4().hex[:12]}.partial{place.suffix}")

    def clear() -> None:
        with contextlib.suppress(OSError):
            _remove(under_way)

    try:
        if place.is_dir() and any(place.iterdir()):
            raise UserError(f"{path} is a folder with something in it: name another place to write to")
        place.parent.mkdir(parents=True, exist_ok=True)
        _remove(under_way)
        # Libraries of other languages have poor words for a place that cannot be written.
        under_way.touch()
        under_way.unlink()
        interrupts.before_exit.append(clear)
        yield under_way
        _sync(under_way)
        os.replace(under_way, place)
    except Exception as error:
        if isinstance(error, UserError) or not (isinstance(error, OSError) or is_full(error)):
            raise
        kept = "what was there before is kept; " if place.is_file() else ""
        raise refusal(path, error, under_way, kept) from error
    finally:
        clear()
        if clear in interrupts.before_exit:
            interrupts.before_exit.remove(clear)


def write_bytes(path: str | Path, content: bytes) -> None:
    """Writes a file so that a reader, or a crash at any moment, sees the old content or the new and nothing between."""
    with atomic(path) as draft:
        draft.write_bytes(content)


def write_text(path: str | Path, text: str) -> None:
    """`write_bytes` of text in UTF-8, its line ends as they are."""
    write_bytes(path, text.encode("utf-8"))


def refusal(path: str | Path, error: Exception, draft: Path | None = None, kept: str = "") -> UserError:
    """The sentence for a place that cannot be written; `kept` says what is not lost. A draft's name says nothing."""
    words, other = (str(error).splitlines() or [type(error).__name__])[0][:200], None
    if isinstance(error, OSError):
        words, other = error.strerror or words, error.filename
    if isinstance(other, (str, bytes, os.PathLike)) and os.fsdecode(other) not in (str(path), str(draft)):
        words += f": {os.fsdecode(other)}"
    mend = "free some space" if is_full(error) else "write elsewhere, or mend that"
    return UserError(f"{path} cannot be written ({words}): {kept}{mend}")


def is_full(error: BaseException | None) -> bool:
    """Whether an exception, or what caused it, is a full disk, an exhausted quota or a limit on a file's size.

    Libraries that write from other languages say it in words."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _FULL:
            return True
        if _FULL_IN_WORDS.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def is_hidden(name: str | Path) -> bool:
    """Whether a path's last part is hidden or left by a system (`._clip.mp4`, `.DS_Store`, `Thumbs.db`): never data."""
    last = Path(name).name
    return last.startswith(".") or last.lower() in _LEFT_BY_SYSTEMS


def visible(paths: Iterable[Path]) -> list[Path]:
    """`paths` in order, without the hidden ones."""
    return sorted(path for path in paths if not is_hidden(path))


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)


def _sync(draft: Path) -> None:
    for path in [path for path in draft.rglob("*") if path.is_file()] if draft.is_dir() else [draft]:
        # A disk may find that it is full only now.
        with open(path, "rb") as file:
            os.fsync(file.fileno())
