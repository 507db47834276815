"""Checks calls of libraries against their signatures. The calls are read, never made, so no GPU is needed.

    python tests/vendor_calls.py    # writes tests/transformer_engine.json, in an environment of the GPU lock

Of a file, each import, call, `super().method(...)` and replaced attribute that leads into a library by a dotted name is
looked up there: the name must exist, and the call must fit its parameters. A variable that is given such a name is
followed; methods of other objects are not. Where the version of Transformer Engine is asked for, only what the
locked one takes counts.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from packaging.version import Version

#: Signatures of Transformer Engine, for where it is not installed, and the version that they are of.
TABLE = Path(__file__).with_name("transformer_engine.json")
TRANSFORMER_ENGINE = "transformer_engine"

#: A signature as a table holds it: parameters in order, with their kind and whether they have a default; "any" where
#: they cannot be told, None where there is no such name.
Known = list[list[Any]] | str | None


@dataclass(frozen=True)
class Use:
    """A dotted name of a library in line `line`, and how it is called. `guards`: the blocks around it, by their lines,
    that are left where a name is absent."""

    line: int
    name: str
    guards: tuple[int, ...] = ()
    call: ast.Call | None = None
    #: Keywords that reach the call in a dictionary.
    more: tuple[str, ...] = ()
    #: Whether the call has other arguments than those.
    open: bool = False
    #: Whether the first parameter is bound, as in `super().__init__(...)`.
    bound: bool = False


# --- signatures ------------------------------------------------------------------------------------------------------


def live(name: str) -> Known:
    """The signature of what a dotted name is in this environment."""
    parts = name.split(".")
    found: Any = None
    for cut in range(len(parts), 0, -1):
        try:
            if find_spec(".".join(parts[:cut])) is None:
                continue
        except ModuleNotFoundError:
            continue
        found = importlib.import_module(".".join(parts[:cut]))
        break
    else:
        return None
    for part in parts[cut:]:
        if not hasattr(found, part):
            return None
        found = getattr(found, part)
    try:
        signature = inspect.signature(found) if callable(found) else None
    except (TypeError, ValueError):
        signature = None
    if signature is None:
        return "any"
    return [[one.name, one.kind.name, one.default is not one.empty] for one in signature.parameters.values()]


@cache
def table() -> dict[str, Any]:
    return json.loads(TABLE.read_text(encoding="utf-8"))


def tabled(name: str) -> Known:
    """The same of Transformer Engine, by the table. Raises `KeyError` for a name that it has not been asked for."""
    return table()["signatures"][name]


def fault(use: Use, known: Known) -> str | None:
    """What is wrong with a use, None where nothing is."""
    if known is None:
        return None if use.guards else "does not exist"
    if use.call is None or isinstance(known, str):
        return None
    kinds = inspect.Parameter
    parameters = [
        kinds(name, getattr(kinds, kind), default=None if default else kinds.empty) for name, kind, default in known
    ]
    signature = inspect.Signature(parameters)
    places = [None] * (use.bound + sum(not isinstance(one, ast.Starred) for one in use.call.args))
    keywords = [one.arg for one in use.call.keywords if one.arg is not None]
    bind = signature.bind_partial if use.open else signature.bind
    try:
        bind(*places, **dict.fromkeys((*keywords, *use.more)))
    except TypeError as error:
        return str(error)
    return None


# --- uses ------------------------------------------------------------------------------------------------------------


class Reader(ast.NodeVisitor):
    """The uses of `libraries` in a file of package `package`, each given to `use`."""

    def __init__(self, libraries: Sequence[str], package: str, engine: Version, use: Callable[[Use], None]) -> None:
        self.libraries, self.package, self.engine, self.use = tuple(libraries), package, engine, use
        #: What names stand for, from the file's down to the innermost function's; None: something else.
        self.scopes: list[dict[str, str | None]] = [{}]
        #: Keywords that dictionaries of a function are seen to hold, from the file's down to the innermost function's.
        self.held: list[dict[str, list[str]]] = [{}]
        self.classes: list[ast.ClassDef] = []
        self.guards: tuple[int, ...] = ()

    # What names stand for.

    def dotted(self, node: ast.AST) -> str | None:
        """The library's name that an expression leads to, None where it leads elsewhere."""
        if isinstance(node, ast.Attribute):
            before = self.dotted(node.value)
            return None if before is None else f"{before}.{node.attr}"
        if isinstance(node, ast.Name):
            return next((scope[node.id] for scope in reversed(self.scopes) if node.id in scope), None)
        return None

    def _is_ours(self, name: str) -> bool:
        return name.split(".")[0] in self.libraries

    def _bind(self, target: ast.AST, name: str | None) -> None:
        if isinstance(target, ast.Name):
            self.scopes[-1][target.id] = name
        elif isinstance(target, ast.Tuple | ast.List):
            for one in target.elts:
                self._bind(one, None)

    def visit_Import(self, node: ast.Import) -> None:
        for one in node.names:
            if self._is_ours(one.name):
                self.use(Use(node.lineno, one.name, self.guards))
                self.scopes[-1][one.asname or one.name.split(".")[0]] = (
                    one.name if one.asname else one.name.split(".")[0]
                )

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        base = self.package.rsplit(".", node.level - 1)[0] if node.level > 1 else self.package
        module = ".".join(filter(None, (base if node.level else "", node.module)))
        if self._is_ours(module):
            for one in node.names:
                if one.name == "*":
                    continue
                self.use(Use(node.lineno, f"{module}.{one.name}", self.guards))
                self.scopes[-1][one.asname or one.name] = f"{module}.{one.name}"

    def visit_Assign(self, node: ast.Assign) -> None:
        self.generic_visit(node)
        for target in node.targets:
            self._assigned(target, node.value)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        self.generic_visit(node)
        if node.value is not None:
            self._assigned(node.target, node.value)

    def _assigned(self, target: ast.AST, value: ast.expr) -> None:
        self._bind(target, self.dotted(value))
        if isinstance(target, ast.Name):
            self.held[-1].pop(target.id, None)
            keys = _keys(value)
            if keys is not None:
                self.held[-1][target.id] = keys
        elif isinstance(target, ast.Subscript) and isinstance(target.value, ast.Name):
            if isinstance(target.slice, ast.Constant):
                self.held[-1].setdefault(target.value.id, []).append(str(target.slice.value))
        elif isinstance(target, ast.Attribute):
            replaced = self.dotted(target)
            if replaced is not None:
                self.use(Use(target.lineno, replaced, self.guards))

    def visit_For(self, node: ast.For) -> None:
        self._bind(node.target, None)
        self.generic_visit(node)

    # What is called.

    def visit_Call(self, node: ast.Call) -> None:
        self.generic_visit(node)
        name, bound = self.dotted(node.func), False
        if name is None:
            name, bound = self._of_base(node.func), True
        if name is None:
            return
        more: list[str] = []
        open_ended = any(isinstance(one, ast.Starred) for one in node.args)
        for one in node.keywords:
            if one.arg is None:
                held = self.held[-1].get(one.value.id) if isinstance(one.value, ast.Name) else _keys(one.value)
                more += held or []
                open_ended = True
        self.use(Use(node.lineno, name, self.guards, node, tuple(more), open_ended, bound))

    def _of_base(self, called: ast.expr) -> str | None:
        """The library's method behind `super().method`."""
        if (
            isinstance(called, ast.Attribute)
            and isinstance(called.value, ast.Call)
            and ast.unparse(called.value) == "super()"
            and self.classes
            and self.classes[-1].bases
        ):
            base = self.dotted(self.classes[-1].bases[0])
            return None if base is None else f"{base}.{called.attr}"
        return None

    # Where one stands.

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self.classes.append(node)
        for base in node.bases:
            name = self.dotted(base)
            if name is not None:
                self.use(Use(node.lineno, name, self.guards))
        self.generic_visit(node)
        self.classes.pop()
        self._bind(ast.Name(node.name), None)

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) -> None:
        arguments = node.args
        given = (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg)
        self.scopes.append({one.arg: None for one in given if one is not None})
        self.held.append({})
        self.generic_visit(node)
        self.held.pop()
        self.scopes.pop()

    visit_AsyncFunctionDef = visit_Lambda = visit_FunctionDef

    def visit_If(self, node: ast.If) -> None:
        taken = self._truth(node.test)
        self.visit(node.test)
        if taken is not False:
            self._all(node.body, node.lineno if "hasattr" in ast.unparse(node.test) else None)
        if taken is not True:
            self._all(node.orelse)

    def visit_Try(self, node: ast.Try) -> None:
        absent = any(_catches_absence(one) for one in node.handlers)
        self._all(node.body, node.lineno if absent else None)
        # What stands in for something absent is not what the library has.
        for one in node.handlers:
            if not absent:
                self.visit(one)
        self._all((*node.orelse, *node.finalbody))

    def _all(self, statements: Sequence[ast.stmt], guard: int | None = None) -> None:
        outer = self.guards
        self.guards = outer if guard is None else (*outer, guard)
        for one in statements:
            self.visit(one)
        self.guards = outer

    def _truth(self, test: ast.expr) -> bool | None:
        """What a question for the version of Transformer Engine comes to, None for another question."""
        if isinstance(test, ast.BoolOp):
            parts = [self._truth(one) for one in test.values]
            decisive = isinstance(test.op, ast.Or)
            if decisive in parts:
                return decisive
            return None if None in parts else not decisive
        if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
            inner = self._truth(test.operand)
            return None if inner is None else not inner
        if isinstance(test, ast.Name):
            return {"HAVE_TE": True, "TYPE_CHECKING": False}.get(test.id)
        if isinstance(test, ast.Call) and ast.unparse(test.func) == "is_te_min_version":
            least = Version(ast.literal_eval(test.args[0]))
            strict = any(one.arg == "check_equality" and not ast.literal_eval(one.value) for one in test.keywords)
            return self.engine > least if strict else self.engine >= least
        return None


def _keys(value: ast.expr) -> list[str] | None:
    """The keys of a dictionary that is written out, None where it is none."""
    if isinstance(value, ast.Dict):
        return [str(key.value) for key in value.keys if isinstance(key, ast.Constant)]
    if isinstance(value, ast.Call) and ast.unparse(value.func) == "dict" and not value.args:
        return [one.arg for one in value.keywords if one.arg is not None]
    return None


def _catches_absence(handler: ast.ExceptHandler) -> bool:
    kinds = "Exception" if handler.type is None else ast.unparse(handler.type)
    return any(kind in kinds for kind in ("ImportError", "ModuleNotFoundError", "AttributeError", "Exception"))


def uses_in(root: Path, file: str, libraries: Sequence[str], engine: Version) -> list[Use]:
    """What `file` below `root` uses of `libraries`."""
    found: list[Use] = []
    package = ".".join(Path(file).parent.parts)
    Reader(libraries, package, engine, found.append).visit(ast.parse((root / file).read_text(encoding="utf-8")))
    return found


def python_files(root: Path, below: str) -> Iterator[str]:
    yield from sorted(str(one.relative_to(root)) for one in (root / below).rglob("*.py"))


def faults_of(
    root: Path, file: str, libraries: Sequence[str], engine: Version, known: Callable[[str], Known]
) -> list[str]:
    """What of `file` does not fit, by `known`, a sentence each."""
    uses = uses_in(root, file, libraries, engine)
    # A block that begins with what is absent is left there.
    left = {use.guards[-1] for use in uses if use.guards and use.call is None and known(use.name) is None}
    return [
        f"{file}:{use.line}: {use.name}: {said}"
        for use in uses
        if left.isdisjoint(use.guards) and (said := fault(use, known(use.name))) is not None
    ]


def megatron_files() -> tuple[Path, list[str]]:
    """Where Megatron-core is installed, and its files that call Transformer Engine."""
    spec = find_spec("megatron.core")
    assert spec is not None and spec.origin is not None
    root = Path(spec.origin).parents[2]
    return root, [one for one in python_files(root, "megatron/core") if TRANSFORMER_ENGINE in (root / one).read_text()]


def written_out() -> dict[str, Any]:
    """The table, from the Transformer Engine that is installed: of all that megarl and Megatron-core use of it."""
    installed = version(TRANSFORMER_ENGINE)
    ours = Path(__file__).parents[1]
    root, files = megatron_files()
    callers = [(ours, one) for folder in ("megarl", "tests/gpu") for one in python_files(ours, folder)]
    callers += [(root, one) for one in files]
    names = {
        use.name for folder, file in callers for use in uses_in(folder, file, [TRANSFORMER_ENGINE], Version(installed))
    }
    signatures = {name: live(name) for name in sorted(names)}
    return {"version": installed, "signatures": signatures}


def main() -> None:
    """Write the table."""
    found = written_out()
    rows = ",\n".join(f"  {json.dumps(name)}: {json.dumps(known)}" for name, known in found.pop("signatures").items())
    head = "".join(f" {json.dumps(key)}: {json.dumps(value)},\n" for key, value in found.items())
    TABLE.write_text(f'{{\n{head} "signatures": {{\n{rows}\n }}\n}}\n', encoding="utf-8")


if __name__ == "__main__":
    main()
