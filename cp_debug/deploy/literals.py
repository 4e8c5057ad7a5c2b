"""A Python file of settings, read without running it.

Assignments of literals are read, and the little arithmetic that settings use; everything else is refused with its line.
Files that it names in ``_base_`` are read the same way and merged as mmengine does
(``mmengine.config.Config._merge_a_into_b``).
"""

from __future__ import annotations

import ast
import operator
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from cp_debug.errors import InputError
from cp_debug.files import resolved
from cp_debug.reading import plain, read_text

_ARITHMETIC: Mapping[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.LShift: operator.lshift,
}
_TEXT_METHODS = ("strip", "lstrip", "rstrip")
_LARGEST_SHIFT = 64
_LARGEST_VALUE = 20_000


def read_literals(path: Path) -> dict[str, Any]:
    """The settings of a Python file by name; names that begin with ``_`` are left out.

    Admitted are constants, containers, ``dict(key=…)``, names assigned before, their items, sums and products of
    numbers, ``<<``, f-strings, ``str(…)``, ``.strip()``, and of inherited settings ``{{_base_.name}}``. Raises
    InputError with file and line for anything else.
    """
    return plain(_read(path, ()), str(path), nulls=True)


def _read(path: Path, children: tuple[Path, ...]) -> dict[str, Any]:
    """Settings of a file; ``children`` are the files that inherit from it.

    Raises InputError for one that is its own heir.
    """
    if resolved(path) in children:
        raise InputError(f"{path}: inherits from itself")
    text = read_text(path, what="configuration")
    reader = _Reader(path, (*children, resolved(path)))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the parser, about what the file says
            tree = ast.parse(text, str(path))
        for statement in tree.body:
            reader.take(statement)
    except (SyntaxError, ValueError) as error:
        raise InputError(f"{path}: not Python ({error})") from None
    except (RecursionError, MemoryError):  # the parser says either
        raise InputError(f"{path}: nested too deep") from None
    settings = {name: value for name, value in reader.values.items() if not name.startswith("_")}
    return merge(reader.base, settings)


def merge(base: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a file over those that it inherits, dictionary by dictionary.

    A dictionary with ``_delete_=True`` replaces the inherited one.
    """
    merged = dict(base)
    for name, value in settings.items():
        if isinstance(value, dict):
            inherited = merged.get(name)
            inherited_settings = inherited if isinstance(inherited, dict) and not value.get("_delete_", False) else {}
            value = merge(inherited_settings, {k: v for k, v in value.items() if k != "_delete_"})
        merged[name] = value
    return merged


class _Reader:
    def __init__(self, path: Path, lineage: tuple[Path, ...]) -> None:
        self._path, self._lineage = path, lineage
        self.values: dict[str, Any] = {}
        self._sizes: dict[int, int] = {}
        """Values in each container, those of containers in it included, by its identity."""
        self._kept: list[Any] = []
        self.base: dict[str, Any] = {}

    def take(self, statement: ast.stmt) -> None:
        """Execute one statement. Raises InputError for anything but an assignment to a name, or a docstring."""
        if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
            return  # a docstring
        if not (isinstance(statement, ast.Assign) and len(statement.targets) == 1):
            self._refuse(statement)
        target = statement.targets[0]
        if not isinstance(target, ast.Name):
            self._refuse(statement)
        value = self._value(statement.value)
        if target.id == "_base_":
            self._inherit(statement, [value] if isinstance(value, str) else value)
        else:
            self.values[target.id] = value

    def _inherit(self, statement: ast.stmt, files: Any) -> None:
        if not (isinstance(files, list) and all(isinstance(file, str) for file in files)):
            self._refuse(statement, "expected the names of files")
        for file in files:
            path = self._path.parent / file
            if not path.is_file():
                self._refuse(statement, f"there is no {path}")
            settings = _read(path, self._lineage)
            if twice := sorted(settings.keys() & self.base.keys()):
                self._refuse(statement, f"{twice[0]} is set by two of them")
            self.base |= settings

    def _value(self, node: ast.expr) -> Any:
        try:
            value = self._evaluated(node)
        except TypeError as error:  # a list as key
            self._refuse(node, str(error))
        if self._size(value) > _LARGEST_VALUE:
            self._refuse(node, f"unfolds to more than {_LARGEST_VALUE} values or characters")
        return value

    def _size(self, value: Any) -> int:
        """Values in it, or characters, or bits: what writing it out would take."""
        if isinstance(value, list | dict):
            if id(value) not in self._sizes:
                parts = value if isinstance(value, list) else (part for item in value.items() for part in item)
                self._sizes[id(value)] = 1 + sum(map(self._size, parts))
                self._kept.append(value)  # or its identity could become another's
            return self._sizes[id(value)]
        if isinstance(value, str | bytes):
            return max(1, len(value) // 16)
        return value.bit_length() // 16 if isinstance(value, int) else 1

    def _evaluated(self, node: ast.expr) -> Any:
        match node:
            case ast.Constant(value=value):
                return value
            case ast.List(elts=items) | ast.Tuple(elts=items):
                return [self._value(item) for item in items]
            case ast.Dict(keys=keys, values=values):
                return {
                    self._value(key or self._refuse(node)): self._value(value)
                    for key, value in zip(keys, values, strict=True)
                }
            case ast.Name(id=name):
                return self.values[name] if name in self.values else self._refuse(node, f"{name} is not assigned above")
            case ast.Set(elts=[ast.Set(elts=[inherited])]):  # {{_base_.name}}
                return self._value(inherited)
            case ast.Attribute(value=ast.Name(id="_base_"), attr=name):
                return self._item(node, self.base, name)
            case ast.Attribute(value=ast.Attribute() as of, attr=name):
                return self._item(node, self._value(of), name)
            case ast.Subscript(value=of, slice=index):
                return self._item(node, self._value(of), self._value(index))
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return -self._number(operand)
            case ast.BinOp():
                return self._arithmetic(node)
            case ast.JoinedStr(values=parts):
                return "".join(self._text(part) for part in parts)
            case ast.Call():
                return self._call(node)
        self._refuse(node)

    def _item(self, node: ast.expr, container: Any, index: Any) -> Any:
        try:
            return container[index]
        except (LookupError, TypeError):
            self._refuse(node, f"there is no item {index!r}")

    def _number(self, node: ast.expr) -> Any:
        value = self._value(node)
        return value if isinstance(value, int | float) else self._refuse(node, "expected a number")

    def _arithmetic(self, node: ast.BinOp) -> Any:
        compute = _ARITHMETIC.get(type(node.op)) or self._refuse(node)
        left, right = self._number(node.left), self._number(node.right)
        if isinstance(node.op, ast.LShift) and not (isinstance(right, int) and 0 <= right <= _LARGEST_SHIFT):
            self._refuse(node, f"expected a shift of 0 to {_LARGEST_SHIFT}")
        try:
            return compute(left, right)
        except (ArithmeticError, TypeError) as error:
            self._refuse(node, str(error))

    def _text(self, node: ast.expr) -> str:
        if isinstance(node, ast.FormattedValue):
            if node.format_spec is not None or node.conversion != -1:
                self._refuse(node)
            node = node.value
        return str(self._value(node))

    def _call(self, node: ast.Call) -> Any:
        match node:
            case ast.Call(func=ast.Name(id="dict"), args=[], keywords=keywords):
                return {word.arg or self._refuse(node): self._value(word.value) for word in keywords}
            case ast.Call(func=ast.Name(id="str"), args=[value], keywords=[]):
                return str(self._value(value))
            case ast.Call(func=ast.Attribute(value=of, attr=name), args=args, keywords=[]) if name in _TEXT_METHODS:
                text, arguments = self._value(of), [self._value(arg) for arg in args]
                if isinstance(text, str) and all(isinstance(arg, str) for arg in arguments) and len(arguments) < 2:
                    return getattr(text, name)(*arguments)
        self._refuse(node)

    def _refuse(self, node: ast.AST, why: str = "") -> NoReturn:
        line = getattr(node, "lineno", 0)
        source = ast.unparse(node).splitlines()[0]
        excerpt = source if len(source) <= 60 else f"{source[:57]}..."
        reason = why or "only literals are read from a configuration, nothing in it is executed"
        raise InputError(f"{self._path}, line {line}: {excerpt!r}: {reason}")
