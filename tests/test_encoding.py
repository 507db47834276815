"""What megarl reads and writes as text is UTF-8, whatever the locale of whoever starts it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCES = [ROOT / "setup.py", *sorted((ROOT / "megarl").rglob("*.py")), *sorted((ROOT / "tools").rglob("*.py"))]


def opens_text_in_the_locales_encoding(call: ast.Call) -> bool:
    """Whether a call reads or writes text and does not say in which encoding."""
    keywords = {keyword.arg: keyword.value for keyword in call.keywords}
    if "encoding" in keywords:
        return False
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    if name in ("read_text", "write_text"):
        return True
    if name in ("open", "fdopen"):
        # A descriptor, a socket or a folder may be opened too: os.open and the like have no mode that is a text.
        position = 0 if isinstance(call.func, ast.Attribute) and name == "open" else 1
        given = call.args[position] if len(call.args) > position else keywords.get("mode")
        if given is None:
            return isinstance(call.func, ast.Name)
        mode = given.value if isinstance(given, ast.Constant) else None
        return isinstance(mode, str) and set(mode) <= set("rwax+t") and "b" not in mode
    if name in ("NamedTemporaryFile", "TemporaryFile", "SpooledTemporaryFile"):
        mode = call.args[0] if call.args else keywords.get("mode")
        return isinstance(mode, ast.Constant) and "b" not in str(mode.value)
    asked = (keywords.get(word) for word in ("text", "universal_newlines"))
    return any(isinstance(value, ast.Constant) and value.value is True for value in asked)


def offences(source: str) -> Iterator[int]:
    """The lines with such a call."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and opens_text_in_the_locales_encoding(node):
            yield node.lineno


def test_the_rule_finds_what_it_is_for():
    bad = "open(p)", "open(p, 'w')", "p.open('a')", "os.fdopen(1, 'w')", "p.read_text()", "p.write_text(t)"
    bad += ("run(c, text=True)", "NamedTemporaryFile('w')")
    good = "open(p, 'rb')", "open(p, encoding='utf-8')", "os.open(p, os.O_RDONLY)", "session.recorder.open(3)"
    good += (
        "p.open('rb')",
        "p.read_text(encoding='utf-8')",
        "Item(text='a')",
        "run(c, encoding='utf-8')",
        "TemporaryFile()",
    )
    assert [call for call in (*bad, *good) if list(offences(call))] == list(bad)


def test_every_text_has_its_encoding():
    found = [
        f"{file.relative_to(ROOT)}:{line}" for file in SOURCES for line in offences(file.read_text(encoding="utf-8"))
    ]
    assert found == []
