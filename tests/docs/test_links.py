"""Links of all pages lead somewhere, and files they speak of are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.docs.pages import PAGES, ROOT, anchors, prose

TOPS = ("benchmarks", "cluster", "docker", "docs", "examples", "k8s", "kernels", "meteora_dist", "scripts", "tests")


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_links(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"https?://", link):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), f"{page}: {link}"
        if anchor:
            assert anchor in anchors(target.resolve().relative_to(ROOT.resolve())), f"{page}: {link}"


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_files_of_the_repository(page: Path) -> None:
    for path in re.findall(rf"`((?:{'|'.join(TOPS)})/[\w./-]*[\w/])`", prose(page)):
        found = (ROOT / path).exists() or any((ROOT / Path(path).parent).glob(f"{Path(path).name}*"))
        assert found, f"{page}: {path}"


def test_every_page_of_docs_is_in_its_index() -> None:
    index = (ROOT / "docs" / "README.md").read_text()
    for page in PAGES:
        if page.parent == Path("docs") and page.name != "README.md":
            assert f"({page.name}" in index, page


def test_anchors_are_githubs(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A title, with `code`\n## Same\n### Same\n```\n# not one\n```\n## GET /v1/models/{name}\n")
    assert anchors(page) == {"a-title-with-code", "same", "same-1", "get-v1modelsname"}


def test_the_readme_is_short_and_its_numbers_are_those_of_the_pages() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 120
    rows = re.findall(r"^\| (.*) \| (.*) \| ([0-9a-f]{7}), \[\w+\]\(([\w/.-]+)", text, re.MULTILINE)
    assert len(rows) >= 4
    for what, numbers, commit, page in rows:
        there = (ROOT / page).read_text()
        assert commit in there, (what, commit)
        for number in re.findall(r"\d+\.\d+|\d+ of \d+|\d+\.\d times", numbers):
            assert number in there, (what, number)
