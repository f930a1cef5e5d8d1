"""Every command × every option × values that no one means: an exit code and one sentence, and nothing is written."""

import argparse
import sys

import jax
import numpy as np
import pytest
import small_release

from crcm_jax import __main__ as program
from crcm_jax import config_ranges
from crcm_jax.cli import aot, convert, data, demo, evaluate, sample, train
from crcm_jax.configs import digits

VALUES = ("", "0", "-1", "nan", "inf", "1e30", "word", "ein Ordner/mit Ümläuten.xyz", "missing.txt", "folder")
"""The last is one that is there."""

BASES = {
    "sample": ["--model=small", "--weights=folder", "--prompt=a", "--size=16x24", "--frames=9", "--out=clip.gif"],
    "sample checkpoint": ["--checkpoint=missing", "--prompt=a", "--steps=2", "--out=clip.gif"],
    "evaluate": ["--checkpoint=missing", "--steps=2", "--out=metrics.json"],
    "convert": ["--from=junk.safetensors", "--to=new.safetensors", "--layout=ours"],
    "data build": ["--videos=videos", "--model=small", "--weights=folder", "--out=set", "--frames=9", "--size=24x16"],
    "data build prompts": ["--prompts=prompts.txt", "--model=small", "--weights=folder", "--out=set", "--size=24x16"],
    "data check": [],
    "data convert": ["--from=missing", "--to=set", "--format=tar"],
    "data embed": ["--model=small", "--weights=folder", "--prompt=a", "--out=n.pt"],
    "train": ["--config=c.py:tf", "--workdir=run"],
    "aot": ["--config=c.py:tf", "--topology=h100:1"],
    "demo": ["--workdir=run"],
}
"""A command line that lacks nothing but what it would read."""

STUBBED = {"train": train, "aot": aot, "demo": demo}
"""Commands whose work, for what passes, is left out: it would be done."""


def parser_of(name: str) -> argparse.ArgumentParser:
    command, *rest = name.split()
    p = {"sample": sample, "evaluate": evaluate, "convert": convert, "data": data, **STUBBED}[command].parser()
    if command == "data":
        p = next(a for a in p._actions if isinstance(a, argparse._SubParsersAction)).choices[rest[0]]
    return p


def words_of(name: str) -> list[str]:
    command, *rest = name.split()
    return [command, *(rest[:1] if command == "data" else [])]


CASES = [
    (name, action.option_strings[-1] if action.option_strings else "")
    for name in BASES
    for action in parser_of(name)._actions
    if not isinstance(action, argparse._HelpAction)
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with what the command lines name, from which every command is run."""
    folder = tmp_path_factory.mktemp("fuzz")
    for name in ("folder", "videos"):
        (folder / name).mkdir()
    (folder / "junk.safetensors").write_bytes(b"no weights")
    (folder / "videos" / "a.mp4").write_bytes(b"no video")
    (folder / "videos" / "a.txt").write_text("a cat")
    (folder / "prompts.txt").write_text("a cat\n")
    (folder / "c.py").write_text("from configs.digits import get_config\n")
    return folder


@pytest.fixture
def ready(monkeypatch, place):
    monkeypatch.chdir(place)
    small_release.register(monkeypatch)
    # Only counted, and always the same.
    shapes = {"w": jax.ShapeDtypeStruct((9,), np.float32)}
    monkeypatch.setattr(jax, "eval_shape", lambda *_: shapes)
    monkeypatch.setattr(aot, "_ENVIRONMENT", {})
    for module in STUBBED.values():
        monkeypatch.setattr(module, "run", lambda *_: 0)


def run(monkeypatch, capsys, words: list[str]) -> tuple[int, str]:
    """(exit code, what was said of it)."""
    monkeypatch.setattr(sys, "argv", ["crcm", *words])
    code = program._run()
    told = capsys.readouterr().err
    lines = [line for line in told.splitlines() if line.startswith("crcm: ")]
    assert "Traceback" not in told and code in (0, 1, 2), (words, told)
    # Notes on the way there do not end in an error; the last line does.
    assert bool(code) <= bool(lines), (words, code, told)
    return code, lines[-1] if lines else ""


def contents(folder) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


@pytest.mark.parametrize("name, option", CASES)
def test_every_option_takes_anything(monkeypatch, capsys, ready, place, name, option):
    before = contents(place)
    base = [word for word in BASES[name] if not option or word.split("=")[0] != option]
    actions = parser_of(name)._actions
    kind = next(a for a in actions if (option in a.option_strings if option else not a.option_strings))
    for value in VALUES:
        word = f"{option}={value}" if option else value
        code, said = run(monkeypatch, capsys, [*words_of(name), *base, word])
        numeric = getattr(kind.type, "__module__", "") == "crcm_jax.cli._numbers"
        if kind.nargs == 0 or kind.choices or (numeric and value in VALUES[:1] + VALUES[2:]):
            legal = (kind.choices and value in kind.choices) or (numeric and value == "0")
            assert code == 2 or legal, (name, word, code, said)
        assert contents(place) == before, (name, word)


@pytest.mark.parametrize("key", [key for key, _ in config_ranges.leaves(digits.get_config("tf"))])
def test_every_key_takes_anything(monkeypatch, capsys, ready, place, key):
    before = contents(place)
    for value in VALUES:
        words = [*BASES["train"], f"--config.{key}={value}"]
        code, said = run(monkeypatch, capsys, ["train", *words])
        rule = config_ranges.rule(key)
        if value in ("nan", "inf", "word", "-1") and getattr(rule, "at_least", None) is not None:
            # Text's width is one value under two keys.
            names = (key, "model.text_dim") if key == "text.dim" else (key,)
            assert code == 2 and any(name in said for name in names), (key, value, code, said)
        assert code in (0, 2), (key, value, said)
    assert contents(place) == before


@pytest.mark.parametrize("value", VALUES)
def test_topologies_and_commands_and_words_out_of_place(monkeypatch, capsys, place, value):
    monkeypatch.chdir(place)
    monkeypatch.setattr(aot, "_ENVIRONMENT", {})
    before = contents(place)
    assert run(monkeypatch, capsys, ["aot", "--config=c.py:tf", f"--topology={value}"])[0] in (1, 2)
    assert run(monkeypatch, capsys, ["aot", "--config=c.py:tf", f"--topology=h100:{value}"])[0] == 2
    assert run(monkeypatch, capsys, [value])[0] == 2
    for name in BASES:
        if name != "data check":
            assert run(monkeypatch, capsys, [*words_of(name), *BASES[name], value])[0] == 2
        assert run(monkeypatch, capsys, [*words_of(name), *BASES[name], f"--nonsense={value}"])[0] == 2
    assert contents(place) == before
