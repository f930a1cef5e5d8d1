"""No function takes more than eight parameters without a reason; nobody asks what is declared elsewhere."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MOST = 8

REASONS = {
    "crcm_jax/evaluate/report.py:write_report": "each is a part of the page",
    "crcm_jax/models/wan/layers.py:__init__": "a layer's sizes, and how it computes",
    "crcm_jax/cli/_data_makers.py:__init__": "each is an option of the command",
    "crcm_jax/sampling/stream.py:stream": "each is a choice of one clip, by keyword",
    "crcm_jax/sampling/session.py:_step": "a compiled program's inputs: some are static, and one is given away",
    "pallas_kernels/attention/api.py:attention": "three arrays, and options by keyword",
    "pallas_kernels/attention/mosaic_gpu/": "Pallas passes each array and each scratch to a kernel by itself",
    "pallas_kernels/attention/mosaic_tpu/": "Pallas passes each array and each scratch to a kernel by itself",
}
"""Function, or a folder of kernels → why it takes more."""

FILES = [
    path.relative_to(ROOT)
    for folder in ("crcm_jax", "convert", "pallas_kernels")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if not any((ROOT / parent).is_symlink() for parent in path.relative_to(ROOT).parents if parent.parts)
]


def crowded(path: Path) -> list[str]:
    """Functions of a file with too many parameters, `file:name`."""
    found = []
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            names = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
            if len([name for name in names if name not in ("self", "cls")]) > MOST:
                found.append(f"{path}:{node.name}")
    return found


@pytest.mark.parametrize("path", FILES, ids=str)
def test_parameters_are_few(path):
    unexplained = [name for name in crowded(path) if not any(name.startswith(reason) for reason in REASONS)]
    assert not unexplained, f"more than {MOST} parameters, and no reason: {unexplained}"


def test_every_reason_is_needed():
    names = [name for path in FILES for name in crowded(path)]
    assert all(any(name.startswith(reason) for name in names) for reason in REASONS)


ASKED = re.compile(
    r"(config\.)?training (==|!=|in|not in) [(\"'\[]"
    r"|isinstance\([^)]*(network|solver)\b"
    r"|hasattr\((network|codec|solver)"
)


@pytest.mark.parametrize("path", [path for path in FILES if path.parts[0] == "crcm_jax"], ids=str)
def test_what_is_declared_is_not_asked_again(path):
    """Recipes are not told apart by name, nor networks and solvers by class."""
    assert not ASKED.search((ROOT / path).read_text(encoding="utf-8"))
