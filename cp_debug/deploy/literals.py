"""A Python file of settings, read without running it: assignments of literals, and the little arithmetic that settings
use. Everything else is refused with its line."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from cp_debug.errors import InputError

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


def read_literals(path: Path) -> dict[str, Any]:
    """The settings of a Python file by name; names that begin with ``_`` are left out.

    Admitted are constants, containers, ``dict(key=…)``, names assigned before, their items, sums and products of
    numbers, ``<<``, f-strings, ``str(…)`` and ``.strip()``. Raises InputError with file and line for anything else.
    """
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except (SyntaxError, ValueError) as error:
        raise InputError(f"{path}: not Python ({error})") from None
    reader = _Reader(path)
    for statement in tree.body:
        reader.take(statement)
    return {name: value for name, value in reader.values.items() if not name.startswith("_")}


class _Reader:
    def __init__(self, path: Path) -> None:
        self._path = path
        self.values: dict[str, Any] = {}

    def take(self, statement: ast.stmt) -> None:
        if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
            return  # a docstring
        if not (isinstance(statement, ast.Assign) and len(statement.targets) == 1):
            self._refuse(statement)
        target = statement.targets[0]
        if not isinstance(target, ast.Name):
            self._refuse(statement)
        if target.id == "_base_":
            self._refuse(statement, "inherits from other files; write the settings out")
        self.values[target.id] = self._value(statement.value)

    def _value(self, node: ast.expr) -> Any:
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
                text, given = self._value(of), [self._value(arg) for arg in args]
                if isinstance(text, str) and all(isinstance(arg, str) for arg in given) and len(given) < 2:
                    return getattr(text, name)(*given)
        self._refuse(node)

    def _refuse(self, node: ast.AST, why: str = "") -> NoReturn:
        line = getattr(node, "lineno", 0)
        what = ast.unparse(node).splitlines()[0]
        shown = what if len(what) <= 60 else f"{what[:57]}..."
        reason = why or "only literals are read from a configuration, nothing in it is executed"
        raise InputError(f"{self._path}, line {line}: {shown!r}: {reason}")
