"""Every file, module and link that the documentation names exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("jobs/**/*.md")])
FOLDERS = "rollout|batcher|models|conf|jobs|tests|docs"
#: Of a page that says how files were called before.
PAST = {"docs/CHANGELOG.md": {"rollout.loop", "rollout.models.pages"}}

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def module_exists(name: str) -> bool:
    """Return whether a dotted name is a module of the repository, or a name in one."""
    mapped = re.sub(r"^rollout\.(batcher|models|conf)\b", r"\1", name)
    for parts in (mapped.split("."), mapped.split(".")[:-1]):
        path = ROOT.joinpath(*parts)
        if path.with_suffix(".py").exists() or (path / "__init__.py").exists():
            return True
    return False


@pages
def test_files_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    named = set(re.findall(rf"(?<![\w./-])(?:{FOLDERS})/[\w./-]*\w/?", text))
    assert sorted(name for name in named if not (ROOT / name).exists()) == []


@pages
def test_modules_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    named = set(re.findall(r"python -m ((?:rollout|jobs|tests)[\w.]*\w)", text))
    named |= set(re.findall(r"`((?:rollout|jobs\.bench|jobs\.gpu|tests)\.[\w.]*\w)`", text))
    assert sorted(name for name in named if not module_exists(name) and name not in PAST.get(page.name, ())) == []


@pages
def test_links_lead_to_files_and_headings(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        name, _, heading = target.partition("#")
        if "://" in name:
            continue
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), f"{target} in {page}"
        if heading:
            titles = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
            assert heading in anchors, f"{target} in {page}"


def test_contents_name_every_page() -> None:
    docs = ROOT / "docs"
    text = (docs / "README.md").read_text(encoding="utf-8")
    pages = {page.relative_to(docs).as_posix() for page in [*docs.glob("*.md"), docs / "results" / "README.md"]}
    assert set(re.findall(r"\]\((?!\.\.)([^)#]+)\)", text)) == pages - {"README.md"}
