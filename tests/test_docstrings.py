"""Docstrings: every module, class and public function has one, and it starts with what the thing is or does."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import cp_debug

PACKAGE = Path(cp_debug.__file__).parent
RIDDLE = re.compile(
    r"(Also|And|As|But|By|For what|From|How|It|Its|Likewise|Nor|Not|Of|Or|Such|That|The same|Their|Them|Then|There|"
    r"These|They|This|Those|What|Whatever|When|Where|Which|Whichever|Who|Why)\b"
)
"""Openings that leave a reader to find the subject elsewhere: genitives, pronouns, comparisons, indirect questions."""
Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


@cache
def modules() -> dict[str, ast.Module]:
    """Path within the package → syntax tree, empty modules left out."""
    trees = {str(p.relative_to(PACKAGE)): ast.parse(p.read_text("utf-8")) for p in sorted(PACKAGE.rglob("*.py"))}
    return {path: tree for path, tree in trees.items() if tree.body}


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


def texts(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and text of every docstring, those below variables and fields included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | Definition):
            for statement in node.body:
                match statement:
                    case ast.Expr(value=ast.Constant(value=str(text))):
                        yield statement.lineno, text.strip()


def test_every_public_definition_has_a_docstring() -> None:
    missing = [path for path, tree in modules().items() if not ast.get_docstring(tree)]
    missing += [
        f"{path}: {name}"
        for path, tree in modules().items()
        for name, node in public(tree)
        if not ast.get_docstring(node) and not explains_itself(node)
    ]
    assert not missing, "\n".join(missing)


def test_docstrings_start_with_their_subject() -> None:
    riddles = [
        f"{path}:{line}: {text.splitlines()[0]}"
        for path, tree in modules().items()
        for line, text in texts(tree)
        if RIDDLE.match(text)
    ]
    assert not riddles, "\n".join(riddles)
