"""The documents name what exists: tests, files behind links, headings behind anchors."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/results/*.md")]
)
FILES = list(ROOT.glob("tests/**/test_*.py"))
TESTS = [path.read_text() for path in FILES]
FUNCTIONS = {name for text in TESTS for name in re.findall(r"^def (test_\w+)", text, re.MULTILINE)}


def anchors(path: Path) -> set[str]:
    """The anchors of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_tests_and_links_exist(path):
    text = path.read_text()
    for name, parameter in re.findall(r"\b(test_\w+)(?:\[([^\]]+)\])?(?!\w*\.py)", text):
        assert name in FUNCTIONS or name in {file.stem for file in FILES}, name
        if parameter:
            assert any(
                f"def {name}(" in source and f'"{parameter}"' in source for source in TESTS
            ), parameter
    for name in re.findall(r"tests/[\w/]+\.py", text):
        assert (ROOT / name).is_file(), name
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"https?:|mailto:", target):
            file, _, anchor = target.partition("#")
            linked = (path.parent / file).resolve() if file else path
            assert linked.exists(), target
            assert not anchor or anchor in anchors(linked), target


def test_the_documents_name_tests():
    named = set(re.findall(r"\btest_\w+", (ROOT / "docs" / "semantics.md").read_text()))
    assert len(named & FUNCTIONS) > 20
