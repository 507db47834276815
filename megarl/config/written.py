"""From what was written to values: the schema's type at a setting's place decides what its text means. Torch-free.

- A text setting is the text as it stands, whatever YAML would make of it: `name: 007`, `name=1e3`. An override's value,
  all that follows the first `=`, is not read as YAML at all. `null` alone means that there is none.
- A number is a plain decimal number, a switch `true` or `false`.
- A setting with a few words to choose from is one of them.
- Everything else is read by YAML's rules for tables and lists, and refused where it is no plain text, number or switch.

A comment may follow a value on its line, but not a text without quotes: whether ` #` belongs to the text is not known.
"""

from __future__ import annotations

import enum
import re
import types
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from pathlib import PurePath
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel

from megarl.config.algorithms import AlgorithmSettings
from megarl.config.algorithms.choice import settings_class
from megarl.config.yaml_dialect import Plain, Raw, in_yaml, read
from megarl.errors import Refusal

_WHOLE = re.compile(r"[-+]?(?:0|[1-9][0-9]*)")
_NUMBER = re.compile(r"[-+]?(?:(?:0|[1-9][0-9]*)(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]{1,4})?")
#: Whole numbers lie below this, which is what 64 bits hold.
_BOUND = 2**63
_SWITCHES = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
#: Other signs for nothing in YAML.
_NOTHING = ("~", "Null", "NULL")
_QUOTED = re.compile(r"""'[^']*'|"(?:[^"\\]|\\.)*\"""", re.DOTALL)

#: Signs that are written as escapes, and what stands for them in double quotes.
_ESCAPES = {"\a": "a", "\b": "b", "\t": "t", "\n": "n", "\v": "v", "\f": "f", "\r": "r", "\x1b": "e"}
#: Where double quotes have eaten the start of a word of LaTeX: signs that no prompt has (of \boxed, \frac), and others
#: before what is left of the commonest words (\text, \times, \theta, \neq, \nabla, \rightarrow).
_ESCAPED = re.compile(r"[\a\b\v\f\x1b]|\r(?=ight)|\t(?=(?:ext|imes|heta)\b)|\n(?=(?:eq|abla)\b)")


@dataclass(frozen=True, slots=True)
class Given:
    """An override's value, not read yet; `origin` is the whole argument."""

    text: str
    origin: str


def parse(text: str, origin: str) -> Raw | None:
    """Read YAML. `origin` is named in the `Refusal` for what is none."""
    try:
        return read(text)
    except yaml.reader.ReaderError as error:
        character = f"U+{error.character:04X}" if isinstance(error.character, int) else repr(error.character)
        problem, place = f"{character} is no character of a text", f" at character {error.position + 1}"
    except yaml.YAMLError as error:
        mark: Any = getattr(error, "problem_mark", None)
        problem: Any = getattr(error, "problem", None) or "unreadable"
        place = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
    fix = "correct it there; a text that begins with a sign or has ': ' or ' #' in it goes in quotes"
    if "escape" in problem:
        fix = "put the text in single quotes, in which a backslash is a backslash, or write two for one"
    raise Refusal(origin, f"must be valid YAML ({problem}{place})", fix)


def opened(value: Given) -> Raw | None:
    """An override's value read as YAML."""
    found = parse(value.text, f"the value of {value.origin!r}")
    if isinstance(found, Plain) and found.comment:
        raise Refusal(f"argument {value.origin!r}", "has a comment, which YAML leaves out", "give the value alone")
    return found


def settled(value: Any, annotation: Any, path: tuple[str, ...] = (), sentence: str = "") -> Any:
    """What `value`, as it was read, means for a setting of the type `annotation`. Raises `Refusal` as above.

    `path` is the setting's, from the top of the file, `sentence` the schema's about it. What the type cannot hold at
    all is left to the records' own validation.
    """
    if annotation is _Unknown:
        return _as_written(value)
    kinds = list(_kinds(annotation))
    place = _Place(path, sentence)
    if isinstance(value, Given):
        if any(_is_text(kind) for kind in kinds):
            return place.override_text(value, kinds)
        value = opened(value)
    if isinstance(value, Plain):
        return place.plain(value, kinds)
    if isinstance(value, str):
        return place.quoted(value, kinds)
    if isinstance(value, list):
        inner = _inner(kinds, len(value))
        return [settled(one, inner[i], (*path, str(i)), sentence) for i, one in enumerate(value)]
    if isinstance(value, dict):
        return {key: settled(one, kind, (*path, key), said) for key, one, kind, said in _fields(value, kinds)}
    return value


def text_of(value: Any) -> Any:
    """The text of a scalar, whatever way it was written; other values as they are."""
    return value.text if isinstance(value, Plain | Given) else value


class _Place:
    """A setting, by its path, and what is said about values that do not fit it."""

    def __init__(self, path: tuple[str, ...], sentence: str) -> None:
        self.key = ".".join(path)
        self._sentence = f" ({sentence.rstrip('.')})" if sentence else ""

    def override_text(self, value: Given, kinds: list[Any]) -> Any:
        text = value.text
        if text == "null":
            return None
        if text == "":
            raise Refusal(f"{self.key}=", "is empty", f"give {self.key} a text{self._sentence}, or null for none")
        if _QUOTED.fullmatch(text):
            rule = "is taken as it stands, and would keep its quotes"
            raise Refusal(f"{self.key}={text}", rule, "leave them out, or write a text with such quotes in the file")
        # A type that takes text or something else.
        found = _number(text, kinds) if any(kind in (int, float) for kind in kinds) else None
        return self._clean(text) if found is None else found

    def plain(self, value: Plain, kinds: list[Any]) -> Any:
        text = value.text
        is_text = any(_is_text(kind) for kind in kinds)
        if value.comment and text == "" and is_text:
            rule = "is empty, since what follows # is a comment to YAML"
            raise Refusal(self.key, rule, "put the text in quotes, or the comment on a line of its own")
        if text in ("", "null"):
            return None
        if text in _NOTHING and (is_text or Any in kinds):
            raise Refusal(f"{self.key}={text}", "is null to YAML", 'write null for none, or the text in quotes, "~"')
        if bool in kinds and text in _SWITCHES:
            return _SWITCHES[text]
        if (number := _number(text, kinds)) is not None:
            return self._bounded(text, number)
        if is_text:
            return self._uncut(value)
        if any(_is_word(kind) for kind in kinds):
            return text
        if bool in kinds:
            raise Refusal(f"{self.key}={text}", f"must be true or false{self._reading(text)}", "write true or false")
        if int in kinds or float in kinds:
            raise self._no_number(text, kinds)
        return self._untyped(value) if Any in kinds else text

    def quoted(self, text: str, kinds: list[Any]) -> Any:
        takes_text = any(_is_text(kind) or _is_word(kind) or kind is Any for kind in kinds)
        if not takes_text and (int in kinds or float in kinds or bool in kinds):
            must = "a plain decimal number" if int in kinds or float in kinds else "true or false"
            raise Refusal(f'{self.key}="{text}"', f"must be {must}, and is a text, in quotes", "leave out the quotes")
        return self._clean(text)

    def _untyped(self, value: Plain) -> Any:
        """A value of a table that takes any, such as `vllm`."""
        text = value.text
        if text in _SWITCHES:
            return _SWITCHES[text]
        if (number := _number(text, [int, float])) is not None:
            return self._bounded(text, number)
        if (reading := in_yaml(text)) is not None:
            fix = "write a plain decimal number, true or false, or the text in quotes"
            raise Refusal(f"{self.key}={text}", f"may be a text, and is {reading} to YAML", fix)
        return self._uncut(value)

    def _uncut(self, value: Plain) -> str:
        if value.comment:
            rule = "is a text followed by #, of which YAML makes a comment"
            fix = "put the text in quotes, with what belongs to it, or the comment on a line of its own"
            raise Refusal(f"{self.key}={value.text}", rule, fix)
        return self._clean(value.text)

    def _clean(self, text: str) -> str:
        if "\0" in text or any("\ud800" <= character <= "\udfff" for character in text):
            shown = text.encode("ascii", "backslashreplace").decode().replace("\0", "\\0")
            rule = "has characters that are in no text (NUL, or bytes that are not UTF-8)"
            raise Refusal(f"{self.key}={shown}", rule, "remove them")
        if (found := _ESCAPED.search(text)) is not None:
            sign = f"\\{_ESCAPES[found[0][0]]}"
            raise Refusal(
                f"{self.key}={text!r}",
                f"has the character U+{ord(found[0][0]):04X}, which YAML makes of {sign} in double quotes",
                f"put the text in single quotes, or write \\{sign}",
            )
        return text

    def _bounded(self, text: str, number: int | float) -> int | float:
        if (isinstance(number, int) and abs(number) >= _BOUND) or number in (float("inf"), -float("inf")):
            fix = f"give a smaller number{self._sentence}"
            raise Refusal(f"{self.key}={text}", "is beyond what 64 bits hold", fix)
        if number == 0 and re.search("[1-9]", re.split("[eE]", text)[0]):
            raise Refusal(
                f"{self.key}={text}", "is so small that 64 bits hold 0 in its place", "write 0, or a larger one"
            )
        return number

    def _no_number(self, text: str, kinds: list[Any]) -> Refusal:
        reading, found = self._reading(text), in_yaml(text)
        fix = "write decimal digits, without zeros in front, '_' or ':'"
        if found is None:
            fix = f"give {self.key} such a value{self._sentence}"
        elif found in ("true", "false", "inf", "-inf", "nan"):
            what = "finite" if float in kinds else "whole"
            none = ", or null for none" if type(None) in kinds else ""
            fix = f"give {self.key} a {what} number{none}{self._sentence}"
        return Refusal(f"{self.key}={text}", f"must be a plain decimal number{reading}", fix)

    def _reading(self, text: str) -> str:
        found = in_yaml(text)
        if found == text and text in _SWITCHES:
            return ", and is a switch"
        return "" if found is None else f", and YAML reads {text} as {found}"


def _number(text: str, kinds: list[Any]) -> int | float | None:
    """The number that is written, as the first fitting of `kinds` has it; None where none is, or none is wanted."""
    if not (int in kinds or float in kinds) or len(text) > 4000:
        return None
    if _WHOLE.fullmatch(text):
        # A whole number stays one where a fraction is allowed: messages show it as it was written.
        return int(text) if int in kinds or len(text) < 16 else float(text)
    if _NUMBER.fullmatch(text) is None:
        return None
    if float not in kinds and (exact := Decimal(text)) == exact.to_integral_value() and abs(exact) < _BOUND:
        return int(exact)
    return float(text)


def _kinds(annotation: Any) -> Iterator[Any]:
    """The types that an annotation allows one by one, without their bounds; Any for what is none of ours."""
    origin = get_origin(annotation)
    if origin is Annotated:
        yield from _kinds(get_args(annotation)[0])
    elif origin in (Union, types.UnionType):
        for one in get_args(annotation):
            yield from _kinds(one)
    elif origin is Literal:
        for one in get_args(annotation):
            yield annotation if isinstance(one, str) else type(one)
    elif origin in (list, tuple, dict) or isinstance(annotation, type):
        yield annotation
    else:
        yield Any


def _is_text(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, str | PurePath) and not issubclass(kind, enum.Enum)


def _is_word(kind: Any) -> bool:
    return get_origin(kind) is Literal or (isinstance(kind, type) and issubclass(kind, enum.Enum))


def _inner(kinds: list[Any], length: int) -> list[Any]:
    """The types of a list's items."""
    for kind in kinds:
        arguments = get_args(kind)
        if get_origin(kind) is list or (get_origin(kind) is tuple and arguments[-1] is Ellipsis):
            return [arguments[0]] * length
        if get_origin(kind) is tuple:
            return [*arguments, *[Any] * length][:length]
    return [Any] * length


def _fields(table: dict[str, Any], kinds: list[Any]) -> Iterator[tuple[str, Any, Any, str]]:
    """Key, value, type and sentence of each entry."""
    record = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)
    if record is AlgorithmSettings and isinstance(name := text_of(table.get("name")), str):
        record = settings_class(name)
    inner = next((get_args(kind)[1] for kind in kinds if get_origin(kind) is dict), Any)
    for key, value in table.items():
        if record is None:
            yield key, value, inner, ""
        elif (field := record.model_fields.get(key)) is not None:
            yield key, value, field.annotation, field.description or ""
        else:
            yield key, value, _Unknown, ""


class _Unknown:
    """The type of a setting that there is not, which validation refuses: it takes what was written."""


def _as_written(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _as_written(one) for key, one in value.items()}
    return [_as_written(one) for one in value] if isinstance(value, list) else text_of(value)
