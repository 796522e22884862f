"""The documents hold together: their links lead somewhere, and their lines have at most 120 characters.

The README names every command and every page. The map in WORKSPACE.md names only files that exist.

tests/commands/test_documented.py runs the commands that the documents show.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from jaxtml.commands.main import parser

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "jaxtml"
AT_THE_TOP = ("README.md", "WORKSPACE.md", "CONTRIBUTING.md", "SECURITY.md")
PAGES = sorted([*(ROOT / "docs").glob("*.md"), *(ROOT / name for name in AT_THE_TOP)])
LINK = re.compile(r"!?\[[^\]]*\]\(([^)#\s]+)?(#[^)\s]+)?\)")


def anchors(page: Path) -> set[str]:
    """The anchors that a forge gives the headings of a page."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {"#" + re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page):
    for target, anchor in LINK.findall(page.read_text()):
        if target.startswith(("http://", "https://")):
            continue
        linked = (page.parent / target).resolve() if target else page
        assert linked.exists(), f"{page.name} links to {target}, which does not exist"
        if anchor:
            assert anchor in anchors(linked), f"{page.name} links to {target}{anchor}, which has no such heading"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_lines_fit_120_columns(page):
    long = [line for line in page.read_text().splitlines() if len(line) > 120]
    assert not long, long[0]


def test_the_readme_fits_two_screens():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 100


def test_the_readme_names_every_command_and_every_page():
    text = (ROOT / "README.md").read_text()
    (choices,) = (action.choices for action in parser()._actions if action.dest == "command")
    assert choices is not None
    missing = [name for name in choices if f"`jaxtml {name} " not in text and f"`jaxtml {name}`" not in text]
    missing += [page.name for page in (ROOT / "docs").glob("*.md") if f"docs/{page.name}" not in text]
    assert not missing


def test_the_readme_shows_the_example_that_the_tests_run():
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert (ROOT / "examples" / "ten_lines.py").read_text().endswith(block)


def test_the_map_names_files_that_exist():
    rows = re.findall(r"^\| (`[^|]+) \|[^|]+\| (`[^|]+) \|$", (ROOT / "WORKSPACE.md").read_text(), re.MULTILINE)
    assert len(rows) > 15
    for folders, files in rows:
        places = [place for folder in re.findall(r"`([^`]+)`", folders) for place in (ROOT / folder, PACKAGE / folder)]
        for file in re.findall(r"`([^`]+)`", files):
            roots = [*places, PACKAGE]
            assert any((place / file).exists() for place in roots), f"the map names {file} in {folders}"
