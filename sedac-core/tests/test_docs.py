"""What the documents say of the repository: links lead somewhere, and the map of modules has them all."""

import fnmatch
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def anchors(page: Path) -> set[str]:
    """The names that GitHub gives a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


def test_the_map_of_modules_has_them_all():
    named = set(re.findall(r"`([\w*]+\.py)`", (ROOT / "docs/architecture.md").read_text()))
    modules = {path.name for path in (ROOT / "sedac-core/python/sedac_core").glob("*.py")} - {"__init__.py"}
    left = {module for module in modules if not any(fnmatch.fnmatch(module, name) for name in named)}
    assert not left, "docs/architecture.md has no room for these"
    assert all(fnmatch.filter(modules, name) for name in named), "docs/architecture.md names what is not there"
