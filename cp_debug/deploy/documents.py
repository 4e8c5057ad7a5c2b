"""Files of settings as plain documents: YAML, TOML, JSON, and Python, which is read without running it.

In a Python file assignments of literals are read, and the little arithmetic that settings use; everything else is
refused with its line. Files that it names in ``_base_`` are read the same way and merged as mmengine does
(``mmengine.config.Config._merge_a_into_b``).
"""

from __future__ import annotations

import ast
import operator
import os
import re
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from cp_debug.errors import Damage, InputError
from cp_debug.files import resolved
from cp_debug.reading import LONGEST_NUMBER, MOST, parse_json, plain, read_text, readable

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_OF_FILE = re.compile(r"\{\{\s*(?P<name>fileDirname|fileBasenameNoExtension|fileBasename|fileExtname)\s*\}\}")
_OF_ENVIRONMENT = re.compile(r"\{\{['\"]?\s*\$(?P<name>\w+)\s*(?::\s*(?P<default>[^\s}]*?))?\s*['\"]?\}\}")
SUFFIXES = (".yaml", ".yml", ".toml", ".json")


def settings_text(path: Path, what: str = "configuration") -> str:
    """The text of a file of settings, in which mmengine's variables in double braces have their values.

    They are ``{{ fileDirname }}``, ``fileBasename``, ``fileBasenameNoExtension``, ``fileExtname``, and
    ``{{$NAME:default}}`` of the environment. Raises InputError as ``read_text`` does, and for a variable that the
    environment lacks and that has no default.
    """
    text = read_text(path, what=what)
    whole = path.expanduser().absolute()
    values = {
        "fileDirname": str(whole.parent),
        "fileBasename": whole.name,
        "fileBasenameNoExtension": whole.stem,
        "fileExtname": whole.suffix,
    }

    def of_environment(found: re.Match[str]) -> str:
        value = os.environ.get(found["name"]) or found["default"]
        if not value:
            raise InputError(f"{path}: {found[0]}: the environment has no {found['name']}, and no default is given")
        return value

    text = _OF_FILE.sub(lambda found: values[found["name"]], text)
    return _OF_ENVIRONMENT.sub(of_environment, text)


def read_document(path: Path, what: str = "configuration") -> Any:
    """The document in a YAML, TOML or JSON file, of text, numbers, lists and tables; ``what`` names it in messages.

    Raises InputError, which names the file, for anything else, and for a key that stands twice in one table.
    """
    text = settings_text(path, what)
    if path.suffix == ".json":
        return plain(parse_json(text, str(path), unique=True), str(path))
    kind = "TOML" if path.suffix == ".toml" else "YAML"
    with readable(path, kind):  # PyYAML lets through what dates, numbers and keys raise that are none
        document = tomllib.loads(text) if kind == "TOML" else _yaml(text)
    return plain(document, str(path))


def _yaml(text: str) -> Any:
    """Plain YAML in which a date is the text that it looks like, and no key of a table stands twice."""
    import yaml

    try:
        return _load(text)
    except yaml.MarkedYAMLError as error:
        raise Damage(" ".join(str(error).replace('"<unicode string>", ', "").split())[:300]) from None


def _load(text: str) -> Any:
    import yaml

    class Loader(yaml.SafeLoader):
        def compose_mapping_node(self, anchor: Any) -> Any:
            node = super().compose_mapping_node(anchor)
            keys = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
            seen: set[str] = set()
            for key in keys:
                if key.value in seen:
                    raise yaml.MarkedYAMLError(problem=f"{key.value!r} is set twice", problem_mark=key.start_mark)
                seen.add(key.value)
            return node

    Loader.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    return yaml.load(text, Loader)  # a SafeLoader


_ARITHMETIC: Mapping[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.LShift: operator.lshift,
    ast.Pow: operator.pow,
}
_TEXT_METHODS = ("strip", "lstrip", "rstrip")
_BAD_KEY = "a list or a dictionary cannot be a key"
_LARGEST_SHIFT, _LARGEST_BASE = 64, 20_000
_MOST_CALLS = 1000


@dataclass(frozen=True)
class Dialect:
    """Python files of one tool. enums: class that a file may import → member → value. keys: names of its settings."""

    enums: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    keys: frozenset[str] = frozenset()


def read_settings(path: Path, dialect: Dialect = Dialect()) -> Any:
    """The settings of a file by name.

    Left out of a Python file are names that begin with ``_``, and variables: names that the file reads again and that
    are no keys of ``dialect``. Admitted are constants, containers, ``dict(key=…)``, ``**`` in both, names assigned
    before, their items, sums, products and powers of numbers, ``<<``, ``not``, ``a if b else c``, ``update(…)``,
    ``+=``, assignments to items and to several names, f-strings, ``str(…)``, ``.strip()``, functions of one
    ``return``, members of the dialect's enumerations and their imports, of inherited settings ``{{_base_.name}}``,
    and mmengine's variables in double braces. A YAML, TOML or JSON file without ``_base_`` may be any document.

    Raises InputError with file and line for anything else.
    """
    return plain(_read(path, (), dialect), str(path), nulls=path.suffix not in SUFFIXES)


def _read(path: Path, children: tuple[Path, ...], dialect: Dialect) -> Any:
    """Settings of a file; ``children`` are the files that inherit from it.

    Raises InputError for one that is its own heir.
    """
    if resolved(path) in children:
        raise InputError(f"{path}: inherits from itself")
    reader = _Reader(path, (*children, resolved(path)), dialect)
    if path.suffix in SUFFIXES:
        settings = read_document(path)
        if not isinstance(settings, dict) or "_base_" not in settings:
            return settings
        files = settings.pop("_base_")
        reader.inherit([files] if isinstance(files, str) else files, f"{path}: _base_ is {str(files)[:60]!r}")
        return merge(reader.base, settings)
    text = settings_text(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the parser, about what the file says
            tree = ast.parse(text, str(path))
        for statement in tree.body:
            reader.take(statement)
        settings = reader.settings()
    except (SyntaxError, ValueError) as error:
        raise InputError(f"{path}: not Python ({error})") from None
    except (RecursionError, MemoryError):  # the parser says either
        raise InputError(f"{path}: nested too deep") from None
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
    def __init__(self, path: Path, lineage: tuple[Path, ...], dialect: Dialect) -> None:
        self._path, self._lineage, self._dialect = path, lineage, dialect
        self._used: set[str] = set()
        """Names that expressions read."""
        self.values: dict[str, Any] = {}
        self._imported: dict[str, Mapping[str, str]] = {}
        """Name in the file → members of an enumeration."""
        self._functions: dict[str, tuple[list[str], ast.expr]] = {}
        """Name → its arguments, and what it returns."""
        self._calls = 0
        self.base: dict[str, Any] = {}

    def take(self, statement: ast.stmt) -> None:
        """Execute one statement. Raises InputError for anything but an assignment, ``update(…)``, or a docstring."""
        match statement:
            case ast.Expr(value=ast.Constant()):
                pass  # a docstring
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                self._assign(statement, name, self._value(value))
            case ast.Assign(targets=[ast.Tuple(elts=targets)], value=value):
                values = self._value(value)
                if not isinstance(values, list) or len(values) != len(targets):
                    self._refuse(statement, f"expected {len(targets)} values")
                for target, part in zip(targets, values, strict=True):
                    self._assign(statement, target.id if isinstance(target, ast.Name) else self._refuse(target), part)
            case ast.AugAssign(target=ast.Name(id=name), op=op, value=value):
                read = ast.copy_location(ast.Name(name, ast.Load()), statement)
                self._assign(statement, name, self._value(ast.copy_location(ast.BinOp(read, op, value), statement)))
            case ast.FunctionDef(
                name=name,
                args=ast.arguments(posonlyargs=[], args=args, vararg=None, kwonlyargs=[], kwarg=None, defaults=[]),
                body=[*documentation, ast.Return(value=ast.expr() as value)],
                decorator_list=[],
            ) if all(isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant) for line in documentation):
                self._functions[name] = [arg.arg for arg in args], value
            case ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value):
                self._assign(statement, name, self._value(value))
            case ast.Assign(targets=[ast.Subscript(value=of, slice=index)], value=value):
                self._update(of, lambda: {self._value(index): self._value(value)})
            case ast.Expr(value=ast.Call(func=ast.Attribute(value=of, attr="update")) as call):
                self._update(of, lambda: self._merged([*call.args, *self._by_name(call)]))
            case ast.ImportFrom(names=names) if all(name.name in self._dialect.enums for name in names):
                self._imported |= {name.asname or name.name: self._dialect.enums[name.name] for name in names}
            case _:
                self._refuse(statement)

    def settings(self) -> dict[str, Any]:
        """The settings that were assigned, without variables, as ``plain`` has them."""
        variables = self._used - self._dialect.keys if self._dialect.keys else set()
        settings = {k: value for k, value in self.values.items() if not k.startswith("_") and k not in variables}
        return plain(settings, str(self._path), nulls=True)

    def _assign(self, statement: ast.stmt, name: str, value: Any) -> None:
        if name != "_base_":
            self.values[name] = value
            return
        source = self._at(statement)
        self.inherit([value] if isinstance(value, str) else value, source)

    def _update(self, target: ast.expr, items: Callable[[], dict[Any, Any]]) -> None:
        """Put items into a dictionary that was assigned before."""
        settings = self._value(target)
        if not isinstance(settings, dict):
            self._refuse(target, "expected a dictionary")
        try:
            settings.update(items())
        except TypeError:
            self._refuse(target, _BAD_KEY)

    def inherit(self, files: Any, source: str) -> None:
        """Read the files that this one inherits from. Raises InputError, starting with ``source``."""
        if not (isinstance(files, list) and all(isinstance(file, str) for file in files)):
            raise InputError(f"{source}: expected the names of files")
        for file in files:
            path = self._path.parent / file
            if not path.is_file():
                raise InputError(f"{source}: there is no {path}")
            settings = _read(path, self._lineage, self._dialect)
            if not isinstance(settings, dict):
                raise InputError(f"{source}: {path} holds no settings by name")
            if twice := sorted(map(str, settings.keys() & self.base.keys())):
                raise InputError(f"{source}: {twice[0]} is set by two of them")
            self.base |= settings

    def _value(self, node: ast.expr) -> Any:
        try:
            return self._evaluated(node)
        except TypeError:
            self._refuse(node, _BAD_KEY)

    def _evaluated(self, node: ast.expr) -> Any:
        match node:
            case ast.Constant(value=value):
                return value
            case ast.List(elts=items) | ast.Tuple(elts=items):
                return [self._value(item) for item in items]
            case ast.Dict(keys=keys, values=values):
                return self._merged(
                    [
                        value if key is None else (self._value(key), value)
                        for key, value in zip(keys, values, strict=True)
                    ]
                )
            case ast.Name(id=name):
                self._used.add(name)
                return self.values[name] if name in self.values else self._refuse(node, f"{name} is not assigned above")
            case ast.Set(elts=[ast.Set(elts=[inherited])]):  # {{_base_.name}}
                return self._value(inherited)
            case (
                ast.Attribute(value=ast.Name(id=enum), attr=name)
                | ast.Attribute(value=ast.Attribute(value=ast.Name(id=enum), attr=name), attr="value")
            ) if enum in self._imported:
                return self._item(node, self._imported[enum], name)
            case ast.Attribute(value=ast.Name(id="_base_"), attr=name):
                return self._item(node, self.base, name)
            case ast.Attribute(value=ast.Attribute() as of, attr=name):
                return self._item(node, self._value(of), name)
            case ast.Subscript(value=of, slice=index):
                return self._item(node, self._value(of), self._value(index))
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return -self._number(operand)
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                return not self._value(operand)
            case ast.BinOp():
                return self._arithmetic(node)
            case ast.IfExp(test=test, body=body, orelse=other):
                return self._value(body if self._value(test) else other)
            case ast.JoinedStr(values=parts):
                return "".join(self._text(part) for part in parts)
            case ast.Call():
                return self._call(node)
        self._refuse(node)

    def _merged(self, parts: Sequence[Any]) -> dict[Any, Any]:
        """A dictionary of pairs (key, expression), and of expressions that are dictionaries themselves."""
        merged: dict[Any, Any] = {}
        for part in parts:
            match part:
                case (None, ast.expr() as node) | (ast.expr() as node):  # **settings
                    settings = self._value(node)
                    if not isinstance(settings, dict):
                        self._refuse(node, "expected a dictionary")
                    merged |= settings
                case (key, node):
                    merged[key] = self._value(node)
        return merged

    def _item(self, node: ast.expr, container: Any, index: Any) -> Any:
        try:
            return container[index]
        except (LookupError, TypeError):
            self._refuse(node, f"there is no item {plain(index, self._at(node), nulls=True)!r}")

    def _number(self, node: ast.expr) -> Any:
        value = self._value(node)
        return value if isinstance(value, int | float) else self._refuse(node, "expected a number")

    def _arithmetic(self, node: ast.BinOp) -> Any:
        compute = _ARITHMETIC.get(type(node.op)) or self._refuse(node)
        left, right = self._value(node.left), self._value(node.right)
        if isinstance(node.op, ast.Add) and type(left) is type(right) and isinstance(left, str | list):
            if len(left) + len(right) > MOST:
                self._refuse(node, f"unfolds to more than {MOST} values or characters")
            return left + right
        if not (isinstance(left, int | float) and isinstance(right, int | float)):
            self._refuse(node, "expected a number")
        if isinstance(node.op, ast.LShift) and not (isinstance(right, int) and 0 <= right <= _LARGEST_SHIFT):
            self._refuse(node, f"expected a shift of 0 to {_LARGEST_SHIFT}")
        if isinstance(node.op, ast.Pow) and not (abs(left) <= _LARGEST_BASE and 0 <= right <= _LARGEST_SHIFT):
            self._refuse(node, f"expected a power of 0 to {_LARGEST_SHIFT}")
        try:
            value = compute(left, right)
        except (ArithmeticError, TypeError) as error:
            self._refuse(node, str(error))
        if isinstance(value, int) and value.bit_length() > LONGEST_NUMBER:
            self._refuse(node, f"a number of {value.bit_length()} bits")
        return value

    def _text(self, node: ast.expr) -> str:
        if isinstance(node, ast.FormattedValue):
            if node.format_spec is not None or node.conversion != -1:
                self._refuse(node)
            node = node.value
        return str(plain(self._value(node), self._at(node), nulls=True))

    def _call(self, node: ast.Call) -> Any:
        match node:
            case ast.Call(func=ast.Name(id=name)) if name in self._functions:
                return self._returned(node, name)
            case ast.Call(func=ast.Name(id="dict"), args=args) if len(args) < 2:
                return self._merged([*args, *self._by_name(node)])
            case ast.Call(func=ast.Name(id="str"), args=[value], keywords=[]):
                return self._text(value)
            case ast.Call(func=ast.Attribute(value=of, attr=name), args=args, keywords=[]) if name in _TEXT_METHODS:
                text, arguments = self._value(of), [self._value(arg) for arg in args]
                if isinstance(text, str) and all(isinstance(arg, str) for arg in arguments) and len(arguments) < 2:
                    return getattr(text, name)(*arguments)
        self._refuse(node)

    def _by_name(self, node: ast.Call) -> list[tuple[str | None, ast.expr]]:
        """Arguments that a call names, each once."""
        names = [word.arg for word in node.keywords if word.arg is not None]
        if twice := [name for place, name in enumerate(names) if name in names[:place]]:
            self._refuse(node, f"keyword argument repeated: {twice[0]}")
        return [(word.arg, word.value) for word in node.keywords]

    def _returned(self, node: ast.Call, name: str) -> Any:
        """Value that a function of the file returns. It sees neither itself nor what is assigned below it."""
        self._calls += 1
        if self._calls > _MOST_CALLS:
            self._refuse(node, f"more than {_MOST_CALLS} calls")
        parameters, returned = self._functions[name]
        given = self._merged([*zip(parameters, node.args, strict=False), *self._by_name(node)])
        if given.keys() != set(parameters) or len(node.args) + len(node.keywords) != len(parameters):
            self._refuse(node, f"expected as arguments: {', '.join(parameters) or 'none'}")
        outside = self.values, self._functions
        self.values = {**self.values, **given}
        self._functions = {other: what for other, what in self._functions.items() if other != name}
        try:
            return self._value(returned)
        finally:
            self.values, self._functions = outside

    def _at(self, node: ast.AST) -> str:
        """The place of a node, and its beginning, for messages."""
        source = ast.unparse(node).splitlines()[0]
        excerpt = source if len(source) <= 60 else f"{source[:57]}..."
        return f"{self._path}, line {getattr(node, 'lineno', 0)}: {excerpt!r}"

    def _refuse(self, node: ast.AST, why: str = "") -> NoReturn:
        reason = why or "only literals are read from a configuration, nothing in it is executed"
        raise InputError(f"{self._at(node)}: {reason}")
