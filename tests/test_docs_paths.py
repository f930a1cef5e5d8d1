"""What README and docs name is there: files, modules that are run, targets of make. (docs/spec names others' files.)"""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *ROOT.glob("pallas_kernels/*/README.md")])

ELSEWHERE = {
    "wan/text2video.py",  # Wan2.1's own
    "crcm_jax/recipes/tf_guided.py",  # what docs/add_a_recipe.md adds
    "crcm_jax/cache/policies/ring.py",  # what docs/add_a_policy.md adds
}
FILE = re.compile(r"(?<![\w./…*-])(\w[\w./-]*\.py|docs/[\w./-]+\.md|[A-Z]+\.md)\b(?!/)")
MODULE = re.compile(r"\bpython3? -m ([\w.]+)")
TARGET = re.compile(r"\bmake ([a-z]+(?:-[a-z]+)*)\b(?=`|    |$)", re.MULTILINE)

SOURCES = [path for path in ROOT.rglob("*.py") if not {".venv", "out", "build"} & set(path.relative_to(ROOT).parts)]
NAMES = {path.name for path in SOURCES}
MAKES = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def there(name: str, page: Path) -> bool:
    """Whether a file is what a page calls it: from the top, from the package, from the page, or by its bare name."""
    roots = (ROOT, ROOT / "crcm_jax", page.parent)
    return name in ELSEWHERE or any((root / name).is_file() for root in roots) or name in NAMES


def missing(text: str, page: Path) -> list[str]:
    """What a page's text names that is not there."""
    files = [name for name in FILE.findall(text) if not there(name, page)]
    paths = {name: ROOT / name.replace(".", "/") for name in MODULE.findall(text)}
    known = [name for name, path in paths.items() if not (path.with_suffix(".py").is_file() or path.is_dir())]
    return files + known + [name for name in TARGET.findall(text) if name not in MAKES]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_names_is_there(page):
    assert missing(page.read_text(), page) == []


def test_what_is_not_there_is_seen():
    text = "`models/wan/remat.py`, `chunks.py`, `gone.py`; python -m benchmarks.speed\n    make tests    # once\n"
    assert missing(text, ROOT / "docs" / "x.md") == ["models/wan/remat.py", "gone.py", "benchmarks.speed", "tests"]
    named = [name for page in PAGES for name in FILE.findall(page.read_text())]
    assert len(named) > 60, "the walk through the pages has lost its way"
