"""README.md, CONTRIBUTING.md and docs/*.md as tests read them: their commands, links, anchors and code names."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))]

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
#: What a command that no test can run says of itself, in its line's comment.
_NEEDS = re.compile(r"needs (?:GPUs|a cluster|a network)")


@dataclass(frozen=True)
class Command:
    """One command of a page: its words without variables that are set for it, and the line's comment."""

    page: str
    line: int
    words: tuple[str, ...]
    comment: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}: {shlex.join(self.words)}"

    @property
    def needs(self) -> bool:
        """Whether it says that it needs what no test has."""
        return _NEEDS.search(self.comment) is not None


def commands(page: Path) -> Iterator[Command]:
    """Those of the page's bash blocks; several that && joins, one by one."""
    text = page.read_text(encoding="utf-8")
    for block in _FENCE.finditer(text):
        if block[1] == "bash":
            first = text.count("\n", 0, block.start(2)) + 1
            yield from _of_block(str(page.relative_to(ROOT)), first, block[2].splitlines())


def _of_block(page: str, first: int, lines: list[str]) -> Iterator[Command]:
    begun, begun_at = "", first
    for number, line in enumerate(lines, start=first):
        if not begun:
            begun_at = number
        code, comment = without_comment(line)
        begun += code
        if begun.endswith("\\"):
            begun = begun[:-1]
            continue
        for words in _apart(shlex.split(begun)):
            yield Command(page, begun_at, words, comment)
        begun = ""


def without_comment(line: str) -> tuple[str, str]:
    """A line of bash without its comment and blanks at the end, and the comment.

    >>> without_comment("echo '#' a#b  # c")
    ("echo '#' a#b", '# c')
    """
    quote = ""
    for place, character in enumerate(line):
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        elif character == "#" and (place == 0 or line[place - 1].isspace()):
            return line[:place].rstrip(), line[place:]
    return line.rstrip(), ""


def _apart(words: list[str]) -> Iterator[tuple[str, ...]]:
    part: list[str] = []
    for word in [*words, "&&"]:
        if word != "&&":
            part.append(word)
            continue
        while part and re.match(r"[A-Z_]+=", part[0]):
            part.pop(0)
        if part:
            yield tuple(part)
        part = []


def prose(page: Path) -> str:
    """A page without its blocks of code."""
    return _FENCE.sub("", page.read_text(encoding="utf-8"))


def links(page: Path) -> list[str]:
    """What the page links to, pictures included, in its order."""
    return _LINK.findall(prose(page))


@cache
def anchors(page: Path) -> frozenset[str]:
    """The names of the page's headings in links, as GitHub makes them."""
    found: list[str] = []
    for heading in re.findall(r"^#{1,6} +(.+)$", prose(page), re.MULTILINE):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").strip().lower()
        name = re.sub(r"[^\w\- ]", "", text).replace(" ", "-")
        again = sum(one == name or re.fullmatch(rf"{re.escape(name)}-\d+", one) is not None for one in found)
        found.append(f"{name}-{again}" if again else name)
    return frozenset(found)


def in_backticks(page: Path) -> list[str]:
    """The page's inline code."""
    return re.findall(r"`([^`\n]+)`", prose(page))
