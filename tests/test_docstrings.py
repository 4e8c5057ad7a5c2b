"""Docstrings: every public definition has one; functions on arrays name shapes or types, and the errors they raise."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import cp_debug
from cp_debug import errors

PACKAGE = Path(cp_debug.__file__).parent
Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


@cache
def modules() -> dict[str, ast.Module]:
    """Path within the package → syntax tree, empty modules left out."""
    trees = {str(p.relative_to(PACKAGE)): ast.parse(p.read_text("utf-8")) for p in sorted(PACKAGE.rglob("*.py"))}
    return {path: tree for path, tree in trees.items() if tree.body}


@pytest.fixture(scope="module", autouse=True)
def forgotten() -> Iterator[None]:
    """The trees are millions of objects, which every later collection of garbage would visit."""
    yield
    modules.cache_clear()


def public(node: ast.Module | ast.ClassDef, prefix: str = "") -> Iterator[tuple[str, Definition]]:
    """Dotted name and definition of every public class, function and method, without those inside functions."""
    for child in node.body:
        if isinstance(child, Definition) and not child.name.startswith("_"):
            yield prefix + child.name, child
            if isinstance(child, ast.ClassDef):
                yield from public(child, f"{prefix}{child.name}.")


def explains_itself(node: Definition) -> bool:
    """Whether a decorator says what the function is: the operator of a kernel, the property of a setter."""
    decorators = [d.func if isinstance(d, ast.Call) else d for d in node.decorator_list]
    names = {d.id if isinstance(d, ast.Name) else d.attr for d in decorators if isinstance(d, ast.Name | ast.Attribute)}
    return bool(names & {"kernel", "setter"})


@pytest.mark.slow
def test_every_public_definition_has_a_docstring() -> None:
    missing = [path for path, tree in modules().items() if not ast.get_docstring(tree)]
    missing += [
        f"{path}: {name}"
        for path, tree in modules().items()
        for name, node in public(tree)
        if not ast.get_docstring(node) and not explains_itself(node)
    ]
    assert not missing, "\n".join(missing)


ROOMS = ("graph", "probes", "backends", "programs", "detection", "quantization", "bisect")
"""Rooms whose functions take and give arrays."""
ARRAY = re.compile(r"ndarray|\bTensor\b|AnyTensor|\bArrays\b|\bFloats\b|\bInts\b")
SAYS_SHAPE = re.compile(
    r"\[[A-Z0-9a-z][^\]]*\]|\([A-Z]+,[^)]*\)|shape|dtype|float(32|64)|FP(16|32|64)|int(32|64)|\bbool\b|integers|\bscalar\b|"
    r"\btorch tensor\b|elementwise|element by element"
)
ERRORS = {
    name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, errors.CpdebugError)
}


def functions() -> Iterator[tuple[str, ast.FunctionDef]]:
    """Every public function and method of ``ROOMS``: where it stands, and its definition."""
    for path, tree in modules().items():
        for name, node in public(tree):
            if path.startswith(ROOMS) and isinstance(node, ast.FunctionDef) and not explains_itself(node):
                yield f"{path}:{node.lineno}: {name}", node


def annotations(node: ast.FunctionDef) -> Iterator[str]:
    """The types of a function's arguments and of its result, as they are written."""
    for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs):
        if argument.annotation is not None:
            yield ast.unparse(argument.annotation)
    if node.returns is not None:
        yield ast.unparse(node.returns)


def raised(node: ast.AST) -> Iterator[str]:
    """Names of the project's errors that are raised in a body, by their own names and not to be caught there."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Raise) and isinstance(child.exc, ast.Call) and isinstance(child.exc.func, ast.Name):
            yield from ERRORS & {child.exc.func.id}
        elif isinstance(child, ast.Try):
            for part in (*child.handlers, *child.orelse, *child.finalbody):
                yield from raised(part)
        elif not isinstance(child, Definition):
            yield from raised(child)


def test_functions_on_arrays_name_shapes_or_dtypes() -> None:
    silent = [
        f"{where}: {ast.get_docstring(node)}"
        for where, node in functions()
        if any(map(ARRAY.search, annotations(node))) and not SAYS_SHAPE.search(ast.get_docstring(node) or "")
    ]
    assert not silent, "\n".join(silent)


def test_errors_that_a_function_raises_are_named() -> None:
    silent = [
        f"{where}: {name}"
        for where, node in functions()
        for name in sorted(set(raised(node)))
        if not re.search(rf"Raises?\b.*\b{name}\b", ast.get_docstring(node) or "", re.DOTALL)
    ]
    assert not silent, "\n".join(silent)
