"""Citations of the specification resolve: the form is defined in docs/spec/README.md."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SPEC = ROOT / "docs" / "spec"
DOCUMENTS = {path.stem: path for path in SPEC.glob("*.md") if path.stem != "README"}

NUMBERS = r"\d+(?:\.\d+)*(?:, \d+(?:\.\d+)*)*"
CITATION = re.compile(rf"\bspec ([a-z]\w*) ({NUMBERS})(?![\w/]|\.\d)")
OWN = re.compile(r"§(\d+(?:\.\d+)*)")
NAMES = r"causal[-_]?rcm|causal[-_ ]forcing|wan ?2[._]?1|wan21|cosmos[- ]?3"
STALE = [
    # "spec 4.5", "spec: Wan2.1", "spec section 7.4", "specification, section 3", also over the end of a line.
    re.compile(rf"\bspec(?:ification)?(?:'s)?[:,]?\s+(?:# ?)?(?:sections?\b|\d|{NAMES})", re.I),
    # "Wan2.1 section 1.2", "Cosmos 3, section 6", whoever says so.
    re.compile(rf"\b(?:{NAMES}),? sections? \d", re.I),
    re.compile(r"§"),
]


def texts():
    """(path, text) of everything that people wrote, without this file."""
    folders = [path for path in ROOT.iterdir() if path.is_dir() and path.name not in ("out", "build", "dist")]
    inside = [path for folder in folders if folder.name[0] != "." for path in folder.rglob("*")]
    for path in [*ROOT.iterdir(), *inside]:
        if path.suffix in (".py", ".md", ".toml") and path.is_file() and path != Path(__file__):
            yield path, path.read_text()


def citations(text):
    """(document, section) of every citation."""
    return [(name, number) for name, numbers in CITATION.findall(text) for number in numbers.split(", ")]


def stale(text):
    """What looks like a citation of the specification and does not have the one form."""
    rest = CITATION.sub(lambda match: "" if match[1] in DOCUMENTS else match[0], text)
    return [match[0] for pattern in STALE for match in pattern.finditer(rest)]


def sections(text):
    """The numbers of headings, and of the entries of numbered lists below them: "4.4", "4.4.6"."""
    heading, found = "", set()
    for line in re.sub(r"```.*?```", "", text, flags=re.DOTALL).splitlines():
        if title := re.match(r"#+ (?:(\d+(?:\.\d+)*)\.?\s)?", line):
            heading = title[1] or ""
            found.add(heading)
        elif heading and (entry := re.match(r"(\d+)\. ", line)):
            found.add(f"{heading}.{entry[1]}")
    return found - {""}


def test_every_citation_names_a_section():
    known = {name: sections(path.read_text()) for name, path in DOCUMENTS.items()}
    found = [(path.relative_to(ROOT), *cited) for path, text in texts() for cited in citations(text)]
    assert [cited for cited in found if cited[2] not in known.get(cited[1], ())] == []
    assert len(found) > 90, "the walk through the repository has lost its way"
    places = {path.parts[0] for path, *_ in found}
    assert places >= {"crcm_jax", "pallas_kernels", "convert", "configs", "tests", "docs"}


def test_no_citation_of_another_form_is_left():
    found = [(path.relative_to(ROOT), form) for path, text in texts() for form in stale(text)]
    # § stands for a document's own sections.
    assert [(path, form) for path, form in found if not (form == "§" and ROOT / path in SPEC.iterdir())] == []


@pytest.mark.parametrize("name", DOCUMENTS)
def test_a_documents_own_references_resolve(name):
    text = DOCUMENTS[name].read_text()
    assert sorted(set(OWN.findall(text)) - sections(text)) == []
    headings = re.findall(r"^#+ (\d+(?:\.\d+)*)", text, re.M)
    assert len(headings) == len(set(headings))


def test_the_readme_lists_every_document():
    listed = re.findall(r"^\| \[(\w+)\]\((\w+)\.md\)", (SPEC / "README.md").read_text(), re.M)
    assert sorted(listed) == sorted((name, name) for name in DOCUMENTS)


def test_what_counts_as_a_citation():
    assert citations("(spec wan21 1.2, 1.3). spec causal_rcm 4.4.6, and") == [
        ("wan21", "1.2"), ("wan21", "1.3"), ("causal_rcm", "4.4.6"),
    ]  # fmt: skip
    text = "# T\n## 4. A\n9. one\n### 4.1 B\n12. x\n```\n3. no\n```\n## Without a number\n1. no\n"
    assert sections(text) == {"4", "4.9", "4.1", "4.1.12"}


@pytest.mark.parametrize(
    "text",
    [
        "(spec 4.5)", "spec: Causal-rCM section 6.2", "spec causal_rcm section 1.3", "spec: Wan2.1 1.2", "spec 10, 24",
        "§4", "Spec section 7.1", "spec Wan2.1;", "(spec\n    7.4)", "Cosmos 3 section 6.3", "spec wan21.",
    ],
)  # fmt: skip
def test_other_forms_are_seen(text):
    assert stale(text)
