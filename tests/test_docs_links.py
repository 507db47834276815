"""What README.md and the pages of docs/ point at is there: links, anchors, files, names in files; and the index."""

from __future__ import annotations

import doctest
import re
from pathlib import Path

import docs_case
import pytest
from docs_case import DOCS, PAGES, ROOT

#: A path of the repository in inline code, perhaps with a name that the file defines: `megarl/train/loop.py:run_step`.
_PATH = re.compile(
    r"(?:megarl|tools|tests|launch|slurm|configs|docs|requirements)/[\w./*<>-]+?\.\w+(?::[\w.]+)?(?![\w./])"
)
#: What a page says of files that a reader makes.
_PLACEHOLDERS = re.compile(r"CONFIG|<|\*")


def page(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", PAGES, ids=page)
def test_links_lead_somewhere(path: Path) -> None:
    wrong = []
    for link in docs_case.links(path):
        if re.match(r"https?://", link):
            continue
        place, _, anchor = link.partition("#")
        target = (path.parent / place).resolve() if place else path
        if not target.exists() or (anchor and anchor not in docs_case.anchors(target)):
            wrong.append(link)
    assert not wrong, f"{page(path)} links to what is not there: {wrong}"


@pytest.mark.parametrize("path", PAGES, ids=page)
def test_files_and_names_in_code_exist(path: Path) -> None:
    wrong = []
    for code in docs_case.in_backticks(path):
        for found in _PATH.findall(code):
            place, _, name = found.partition(":")
            if _PLACEHOLDERS.search(place):
                continue
            files = [ROOT / place, ROOT / "megarl" / place]
            file = next((one for one in files if one.is_file()), None)
            if file is None or (name and not name.isdigit() and not _defines(file, name)):
                wrong.append(found)
    assert not wrong, f"{page(path)} names what is not there: {wrong}"


def _defines(file: Path, name: str) -> bool:
    """Whether a file defines a class, function or constant, or in a class one."""
    text = file.read_text(encoding="utf-8")
    return all(
        re.search(rf"^\s*(?:class|def|async def) {part}\b|^\s*{part}\b\s*[:=]", text, re.MULTILINE)
        for part in name.split(".")
    )


def test_every_page_is_in_the_index_once() -> None:
    listed = [link.partition("#")[0] for link in docs_case.links(DOCS / "README.md")]
    pages = sorted(one for one in listed if one.endswith(".md") and "/" not in one)
    assert pages == sorted(path.name for path in DOCS.glob("*.md") if path.name != "README.md")


def test_the_reader_reads(tmp_path: Path) -> None:
    file = tmp_path / "page.md"
    file.write_text("# One `record`\n## Layouts\n```bash\n# comment\n```\n## Layouts\n")
    assert docs_case.anchors(file) == {"one-record", "layouts", "layouts-1"}
    assert doctest.testmod(docs_case).attempted > 0 == doctest.testmod(docs_case).failed
