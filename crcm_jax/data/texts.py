"""The house's one reader of text that people write: prompts, captions, lists, configurations of others.

UTF-8, or what a byte-order mark says (UTF-8, UTF-16, UTF-32); lines that end in LF, CR LF or CR. A line ends there and
nowhere else: a prompt may hold any other character that some programs take for a line's end.
"""

from __future__ import annotations

import codecs
from pathlib import Path

from crcm_jax.errors import UserError
from crcm_jax.saving import reading

# UTF-32's little-endian mark begins with UTF-16's.
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)


def read(path: str | Path) -> str:
    """A file's text, lines parted by LF. UserError, naming file and line, for what is no text in a known encoding."""
    try:
        content = Path(path).read_bytes()
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as text ({reading.words(error, path)})") from None
    return decode(content, path)


def decode(content: bytes, name: str | Path) -> str:
    """`read` of a file's bytes; `name` is how messages call it."""
    told = reading.pointer(content)
    if told:
        raise UserError(f"{name} {told}")
    mark, encoding = next(((m, e) for m, e in _MARKS if content.startswith(m)), (b"", "utf-8"))
    body = content[len(mark) :]
    try:
        text = body.decode(encoding)
    except UnicodeDecodeError as error:
        line = _lines_of(body[: error.start].decode(encoding, "replace"))
        as_what = f"is not {encoding.upper()} as its byte-order mark says" if mark else "is not UTF-8"
        raise UserError(f"line {line} of {name} {as_what}: save it as UTF-8") from None
    if "\0" in text:
        line = _lines_of(text[: text.index("\0")])
        raise UserError(f"line {line} of {name} holds a zero, as UTF-16 without its mark does: save it as UTF-8")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def lines(path: str | Path) -> list[str]:
    """The lines of `read` that are not blank, without the spaces around them."""
    return [line.strip() for line in read(path).split("\n") if line.strip()]


def _lines_of(text: str) -> int:
    return 1 + text.replace("\r\n", "\n").replace("\r", "\n").count("\n")
