"""Called by mkdocs: the root's texts become pages of the site, and pages that mkdocs.yml does not name are listed too.

On the site README.md is the first page. Links are written as they work in the repository, and rewritten here.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
PAGES = {
    "README.md": "index.md",
    "LOG.md": "journal.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}


def on_config(config: Any) -> Any:
    """Puts pages without a place in the menu under its last heading."""
    named = set(re.findall(r"[\w-]+\.md", str(config.nav)))
    others = sorted(path.name for path in (ROOT / "docs").glob("*.md") if path.name not in named)
    if others:
        config.nav.append({"More": others})
    return config


def on_files(files: Files, config: Any) -> Files:
    """Adds the root's texts."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, **kwargs: Any) -> str:
    """Links between the root and docs/, as they are on the site. Files that are no pages are named without a link."""
    sources = {target: source for source, target in PAGES.items()}
    folder = "" if page.file.src_uri in sources else "docs"

    def relink(found: re.Match[str]) -> str:
        words, target, anchor = (group or "" for group in found.groups())
        path = posixpath.normpath(posixpath.join(folder, target))
        if path in PAGES:
            return f"[{words}]({PAGES[path]}{anchor})"
        if path.startswith("docs/"):
            return f"[{words}]({path.removeprefix('docs/')}{anchor})"
        return words if (ROOT / path).exists() else found[0]

    return re.sub(r"\[([^\]]*)\]\((?!\w+:|#)([^)#\s]+)(#[^)\s]*)?\)", relink, markdown)
