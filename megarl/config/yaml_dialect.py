"""The YAML that configurations are written in: safe YAML 1.1 without its surprises.

`1e-6` is a number (YAML 1.1 reads text without the dot), only `true` and `false` are booleans (`on`,
`no` and their kin are text), a date is text, and a key written twice is an error, not a silent loss.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import Any

import yaml

_FLOAT = re.compile(
    r"^[-+]?(?:(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
)
_BOOL = re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$")
_REPLACED = ("tag:yaml.org,2002:float", "tag:yaml.org,2002:bool", "tag:yaml.org,2002:timestamp")


class Loader(yaml.SafeLoader):
    """Reads the dialect."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """Like the base's, but raises a YAML error for a repeated key."""
        seen: set[str] = set()
        for key, _ in node.value:
            name = str(key.value)
            if name in seen:
                raise yaml.constructor.ConstructorError(
                    problem=f"key {name} is given twice", problem_mark=key.start_mark
                )
            seen.add(name)
        return super().construct_mapping(node, deep)


class Dumper(yaml.SafeDumper):
    """Writes the dialect: quotes text that `Loader` would read as a number or a boolean."""

    def ignore_aliases(self, data: Any) -> bool:
        """Write equal values out each time; anchors only puzzle the reader of a resolved file."""
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    # PyYAML writes the Unicode line breaks raw into plain text and then reads them back as blanks.
    style = '"' if any(character in text for character in "\x85\u2028\u2029") else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style)


Dumper.add_representer(str, _represent_text)

for _class in (Loader, Dumper):
    _class.yaml_implicit_resolvers = {
        letter: [(tag, pattern) for tag, pattern in resolvers if tag not in _REPLACED]
        for letter, resolvers in _class.yaml_implicit_resolvers.items()
    }
    _class.add_implicit_resolver(_REPLACED[0], _FLOAT, list("-+0123456789."))
    _class.add_implicit_resolver(_REPLACED[1], _BOOL, list("tTfF"))
