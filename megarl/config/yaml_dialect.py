"""The YAML that configurations are written in: text is what stands there, and nothing is guessed.

YAML 1.1 makes numbers of `010`, `1:30` and `0x1F`, truth of `no`, nothing of `~`, and drops what follows ` #`. Here a
scalar without quotes stays the text that was written until the schema says what is wanted at its place
(`megarl.config.written`). A key written twice is an error, and there are no tags, no anchors of single values and no
merge keys: where a text begins with one of their signs, it has to be in quotes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import yaml

#: Most values of one file: names for repeated parts (`&name`, `*name`) can make billions of a few lines.
MOST_VALUES = 100_000
_COMMENT = re.compile(r"[ \t]*#")
_FLOAT = re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?")


@dataclass(frozen=True, slots=True)
class Plain:
    """A scalar as it was written without quotes, and whether a comment follows on its line."""

    text: str
    comment: bool = False

    def __str__(self) -> str:
        return self.text


#: What is read: a table with texts as keys, a list, a scalar without quotes, or a text from quotes or a block.
Raw = dict[str, "Raw"] | list["Raw"] | Plain | str


class _Composer(yaml.SafeLoader):
    """Reads a document into nodes; refuses the signs that would take something of a text away."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()
        if isinstance(event, yaml.ScalarEvent) and event.anchor is not None:
            raise yaml.MarkedYAMLError(
                problem=f"&{event.anchor} names a value, as a text in quotes would not", problem_mark=event.start_mark
            )
        if getattr(event, "tag", None) is not None:
            raise yaml.MarkedYAMLError(
                problem=f"{event.tag} is a tag, as a text in quotes would not be", problem_mark=event.start_mark
            )
        return super().compose_node(parent, index)


def read(text: str) -> Raw | None:
    """The one document of `text`; None where there is nothing but comments. Raises `yaml.YAMLError`."""
    try:
        node = yaml.compose(text, _Composer)
        return None if node is None else _Builder(text).build(node)
    except RecursionError:
        raise yaml.MarkedYAMLError(problem="tables and lists are nested too deeply") from None
    except ValueError:
        raise yaml.MarkedYAMLError(problem="an escape in double quotes names no character") from None


class _Builder:
    def __init__(self, text: str) -> None:
        self._text = text
        self._values = 0

    def build(self, node: yaml.Node) -> Raw:
        self._values += 1
        if self._values > MOST_VALUES:
            raise yaml.MarkedYAMLError(problem=f"there are more than {MOST_VALUES} values")
        if isinstance(node, yaml.ScalarNode):
            return Plain(node.value, self._comment_follows(node)) if node.style is None else node.value
        if isinstance(node, yaml.SequenceNode):
            return [self.build(one) for one in node.value]
        assert isinstance(node, yaml.MappingNode)
        table: dict[str, Raw] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(problem="a key must be a text", problem_mark=key.start_mark)
            if key.value in table:
                raise yaml.MarkedYAMLError(problem=f"key {key.value} is given twice", problem_mark=key.start_mark)
            table[key.value] = self.build(value)
        return table

    def _comment_follows(self, node: yaml.ScalarNode) -> bool:
        return _COMMENT.match(self._text, node.end_mark.index) is not None


def in_yaml(text: str) -> Any:
    """What YAML 1.1 makes of a text without quotes, where that is not the text; else None."""
    loader = yaml.SafeLoader("")
    tag = loader.resolve(yaml.ScalarNode, text, (True, False))
    if tag == "tag:yaml.org,2002:str":
        return None
    try:
        value = loader.construct_object(yaml.ScalarNode(tag, text))
    except (yaml.YAMLError, ValueError, OverflowError):
        return tag.rpartition(":")[2]
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return str(value)


class Dumper(yaml.SafeDumper):
    """Writes text in quotes wherever this dialect or YAML 1.1 would read something else."""

    def ignore_aliases(self, data: Any) -> bool:
        """Write equal values out each time; anchors only puzzle the reader of a resolved file."""
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    # PyYAML writes the Unicode line breaks raw into plain text and then reads them back as blanks.
    style = '"' if any(character in text for character in "\x85\u2028\u2029") else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style)


Dumper.add_representer(str, _represent_text)
# YAML 1.1 has no `1e-6`, which PyYAML writes as a float and would leave without quotes as a text.
Dumper.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(f"^{_FLOAT.pattern}$"), list("-+0123456789."))
