"""The pages that say how to add a recipe, a network and a cache policy: their code runs, and is short."""

import re
from pathlib import Path
from unittest import mock

import pytest

from crcm_jax.cache import POLICIES
from crcm_jax.recipes import RECIPES

DOCS = Path(__file__).parents[1] / "docs"
PAGES = ("add_a_recipe", "add_a_network", "add_a_policy")
LONGEST = 60
"""Lines of a page's first block, which is the thing itself; what follows shows it at work."""


def blocks(page: str) -> list[tuple[int, str]]:
    """(line, code) of every fenced block of Python in a page, as it stands there."""
    text = (DOCS / f"{page}.md").read_text()
    fenced = re.finditer(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [(text[: block.start(1)].count("\n"), block[1]) for block in fenced]


@pytest.mark.parametrize("page", PAGES)
def test_the_code_runs(page):
    """In the order of the page, in one namespace; what it registers is gone afterwards."""
    names = {"__name__": page}
    with mock.patch.dict(RECIPES), mock.patch.dict(POLICIES):
        for line, code in blocks(page):
            # Empty lines in front, so that an error names the line of the page.
            exec(compile("\n" * line + code, str(DOCS / f"{page}.md"), "exec"), names)


@pytest.mark.parametrize("page", PAGES)
def test_the_code_is_short(page):
    first, *rest = blocks(page)
    assert first[1].count("\n") <= LONGEST and rest, "the thing, then its use"
    assert all(len(line) <= 120 for _, code in blocks(page) for line in code.splitlines())
