"""README, the journal and docs/ lead somewhere, whether read in the repository or as a site."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
LINK = re.compile(r"\[[^\]]*\]\((?!\w+:)([^)#\s]*)(?:#([^)\s]*))?\)")


def anchors(page: Path) -> set[str]:
    """Of a page's headings, as GitHub and mkdocs make them of plain words."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_of_a_page_leads_to_a_file_and_a_heading(page):
    for target, anchor in LINK.findall(page.read_text(encoding="utf-8")):
        path = (page.parent / target).resolve() if target else page
        assert path.is_file(), f"{page.name} links to {target}, which is not there"
        assert not anchor or anchor in anchors(path), f"{page.name} links to {target}#{anchor}, which has no heading"


# Alone between backticks, with a folder's slash or a file's ending: `ops/<op>/naive.py`, `tests/ops/`.
PATH = re.compile(r"`([\w.<>/-]*(?:/|\.(?:py|md|ya?ml|toml|txt)))`")


@pytest.mark.parametrize("name", ["CONTRIBUTING.md", "docs/extending.md", "docs/architecture.md", "docs/fuzz.md"])
def test_every_folder_and_file_of_the_code_that_a_page_names_is_there(name):
    """As they are written, from the repository or the package; a file's name alone is that of a file somewhere."""
    files = {path.name for folder in ("hymba_lightning", "tests", "docs") for path in (ROOT / folder).rglob("*")}
    named = PATH.findall((ROOT / name).read_text(encoding="utf-8"))
    assert len(named) >= 2
    for path in named:
        pattern = re.sub(r"<\w+>", "*", path.rstrip("/"))
        found = any(next(root.glob(pattern), None) for root in (ROOT, ROOT / "hymba_lightning"))
        assert found or path in files, f"{name} names {path}"


def test_the_readme_is_read_in_a_minute():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_every_script_and_config_that_a_page_names_is_there():
    for page in PAGES:
        if page.name not in ("LOG.md", "CHANGELOG.md"):
            for name in re.findall(r"\b((?:scripts|configs|results)/[\w./-]*\w)", page.read_text(encoding="utf-8")):
                assert (ROOT / name).exists(), f"{page.name} names {name}"
