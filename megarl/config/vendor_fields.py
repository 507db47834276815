"""Checks the tables `megatron:` and `vllm:` against those libraries' own dataclass fields.

The fields are read from the installed source with `ast`, because importing either library takes
seconds and a login node must be able to refuse a wrong name at once.
"""

from __future__ import annotations

import ast
import difflib
import importlib.util
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from megarl.config.vendor_owned import OWNED
from megarl.errors import Refusal


@dataclass(frozen=True, slots=True)
class VendorClass:
    """A dataclass of a library: where its source is (below the package's folder) and its name."""

    package: str
    file: str
    name: str


#: The classes behind each table of the configuration.
TABLES: dict[str, tuple[VendorClass, ...]] = {
    "megatron": (
        VendorClass("megatron", "core/transformer/transformer_config.py", "TransformerConfig"),
        VendorClass("megatron", "core/model_parallel_config.py", "ModelParallelConfig"),
        VendorClass("megatron", "core/optimizer/optimizer_config.py", "OptimizerConfig"),
        VendorClass(
            "megatron", "core/distributed/distributed_data_parallel_config.py", "DistributedDataParallelConfig"
        ),
    ),
    "vllm": (VendorClass("vllm", "engine/arg_utils.py", "EngineArgs"),),
}

#: Values that YAML can give for a plain annotation; an annotation with any other name in it is not checked.
_PLAIN: dict[str, tuple[type, ...]] = {
    "bool": (bool,), "int": (int,), "float": (int, float), "str": (str,), "None": (type(None),),
    "list": (list,), "dict": (dict,), "List": (list,), "Dict": (dict,),
}  # fmt: skip


def refusals(table: str, values: Mapping[str, Any]) -> Iterator[Refusal]:
    """What is wrong with the entries of the `megatron:` or `vllm:` table, in their order.

    Refused are names that the library does not have, names that megarl sets itself, and values of a
    type that the field cannot hold. Yields nothing for an empty table, without touching the library.
    """
    if not values:
        return
    owned = OWNED[table]
    fields = vendor_fields(table)
    for name, value in values.items():
        key = f"{table}.{name}"
        if name in owned:
            yield Refusal(key, "is set by megarl", owned[name])
        elif name not in fields or name.startswith("_"):
            yield Refusal(key, f"is not a field of {_class_names(table)}", _nearest(table, name, fields))
        elif not _fits(fields[name], value):
            rule = (
                f"must be of type {fields[name]}"
                if "Callable" not in fields[name]
                else "is a Python function, which YAML cannot give"
            )
            yield Refusal(f"{key}={value!r}", rule, f"correct or remove {key}")


@cache
def vendor_fields(table: str) -> dict[str, str]:
    """Field names and their annotations, as written, of all classes behind `table`.

    Raises `Refusal` where the library is not installed or its source is not as expected.
    """
    fields: dict[str, str] = {}
    for vendor_class in TABLES[table]:
        fields.update(_read_class(vendor_class))
    return fields


def _read_class(vendor_class: VendorClass) -> dict[str, str]:
    file = _package_folder(vendor_class.package) / vendor_class.file
    if file.is_file():
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and node.name == vendor_class.name:
                return {
                    line.target.id: ast.unparse(line.annotation)
                    for line in node.body
                    if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name)
                }
    raise Refusal(
        str(file), f"must define the dataclass {vendor_class.name}", "install a version named in requirements/"
    )


def _package_folder(package: str) -> Path:
    """The installed package's folder; `find_spec` of a top-level name imports nothing."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise Refusal(f"package {package}", "must be installed to check its options", "run launch/setup.sh")
    return Path(next(iter(spec.submodule_search_locations)))


def _class_names(table: str) -> str:
    names = [vendor_class.name for vendor_class in TABLES[table]]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"


def _nearest(table: str, name: str, fields: Mapping[str, str]) -> str:
    free = [field for field in fields if field not in OWNED[table] and not field.startswith("_")]
    near = difflib.get_close_matches(name, free, n=1, cutoff=0.7)
    return f"use {table}.{near[0]}" if near else f"remove {table}.{name}"


def _fits(annotation: str, value: Any) -> bool:
    """Whether `value` can be what the annotation says. Annotations with names we cannot judge accept all."""
    if "Callable" in annotation:
        return False
    return _matches(ast.parse(annotation, mode="eval").body, value)


def _matches(node: ast.expr, value: Any) -> bool:
    if isinstance(node, ast.BinOp):
        return _matches(node.left, value) or _matches(node.right, value)
    if isinstance(node, ast.Constant):
        return value is None if node.value is None else True
    if isinstance(node, ast.Name) and node.id in _PLAIN:
        # bool is an int to Python, but `num_layers: true` is a slip.
        return isinstance(value, _PLAIN[node.id]) and (node.id == "bool" or not isinstance(value, bool))
    if not (isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name)):
        return True
    inner = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
    if node.value.id == "Optional":
        return value is None or _matches(inner[0], value)
    if node.value.id == "Union":
        return any(_matches(part, value) for part in inner)
    if node.value.id == "Literal":
        return any(isinstance(part, ast.Constant) and part.value == value for part in inner)
    return isinstance(value, _PLAIN[node.value.id]) if node.value.id in _PLAIN else True
