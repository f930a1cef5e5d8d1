"""Lists that people write: prompts, and videos with their prompts. Read and validated whole, before anything is made.

A .jsonl file has an object a line, a .csv file a header that names its columns, parted by comma, semicolon or tab.
"""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

from crcm_jax.data import texts
from crcm_jax.errors import UserError

SUFFIXES = (".jsonl", ".csv")


def prompts(path: str | Path) -> list[str]:
    """The prompts of a text file, one a line, or of a .jsonl or .csv list, its field `prompt`. UserError if none."""
    path = Path(path)
    if path.suffix.lower() in SUFFIXES:
        found = [prompt for (prompt,) in entries(path, ("prompt",))]
    else:
        found = texts.lines(path)
    if not found:
        raise UserError(f"{path} holds no prompts: write one a line")
    return found


def entries(path: str | Path, fields: tuple[str, ...]) -> list[tuple[str, ...]]:
    """`fields` of every entry, all of them text. UserError, naming file and line, for an entry that lacks one of them,
    has something else in its place, or is cut otherwise than the header says."""
    path = Path(path)
    read = _csv if path.suffix.lower() == ".csv" else _jsonl
    return read(texts.read(path), path, fields)


def _jsonl(text: str, path: Path, fields: tuple[str, ...]) -> list[tuple[str, ...]]:
    found = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"line {number} of {path}"
        try:
            entry = json.loads(line, object_pairs_hook=list)
        except (ValueError, RecursionError):
            raise UserError(f"{where} is not JSON: write an object with {' and '.join(fields)}") from None
        # An object has become a list of pairs, whatever holds text for keys.
        if not line.lstrip().startswith("{"):
            raise UserError(f"{where} is not a JSON object: write one with {' and '.join(fields)}")
        names = [name for name, _ in entry]
        for name in fields:
            if names.count(name) > 1:
                raise UserError(f"{where} has {name} {names.count(name)} times: write it once")
        values = dict(entry)
        found.append(tuple(_text(values, name, where) for name in fields))
    return found


def _text(values: dict[str, Any], name: str, where: str) -> str:
    if name not in values:
        raise UserError(f"{where} has no {name}: write it in quotes, empty for none")
    value = values[name]
    if not isinstance(value, str):
        raise UserError(f"{where} has {json.dumps(value)[:60]} for {name}: write text, in quotes")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise UserError(f"{where} has half a character (a lone surrogate) in {name}: write it whole")
    return value


def _csv(text: str, path: Path, fields: tuple[str, ...]) -> list[tuple[str, ...]]:
    first = text.split("\n", 1)[0]
    delimiter = next((d for d in ",;\t" if set(fields) <= set(_header(first, d))), ",")
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    found: list[tuple[str, ...]] = []
    names: list[str] = []
    last = 0
    try:
        for row in reader:
            # A field in quotes may hold lines: the entry began on the one after the last.
            where, last = f"line {last + 1} of {path}", reader.line_num
            if not row:
                continue
            if not names:
                names = _columns([name.strip() for name in row], fields, where)
            elif len(row) != len(names):
                between = {",": "comma", ";": "semicolon", "\t": "tab"}[delimiter]
                mend = f"put a field that holds a {between} in quotes" if len(row) > len(names) else "fill it up"
                raise UserError(f"{where} has {len(row)} of {len(names)} fields: {mend}")
            else:
                found.append(tuple(row[names.index(name)] for name in fields))
    except csv.Error as error:
        raise UserError(f"line {last + 1} of {path} cannot be read as CSV ({error})") from None
    return found


def _header(line: str, delimiter: str) -> list[str]:
    try:
        return [name.strip() for name in next(csv.reader([line], delimiter=delimiter), [])]
    except csv.Error:
        return []


def _columns(names: list[str], fields: tuple[str, ...], where: str) -> list[str]:
    for name in fields:
        if names.count(name) != 1:
            has = "no column" if name not in names else f"{names.count(name)} columns"
            raise UserError(f"{where}, the header, has {has} {name}, only {', '.join(names)[:80]}: name each once")
    return names
