"""The layout keeps its promises: nothing shadows the standard library, imports run one way, help is fast."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
PACKAGE = REPO / "cp_debug"
ORDER = (
    "version safe_text errors doing reading files loading optional store plugins interpreter progress serialize "
    "minimize display graph probes recipes backends programs detection quantization bisect mixed_precision prediction "
    "deploy sweep reports api cli pytest_plugin polygraphy_plugin"
)
ROOMS = ORDER.split()
"""A room imports from itself and from those before it in this list."""


def test_root_links_do_not_shadow_the_standard_library() -> None:
    code = "import random, bisect; a = [1, 3]; bisect.insort(a, 2); assert a == [1, 2, 3], a"
    subprocess.run([sys.executable, "-c", code], cwd=REPO, check=True)


@pytest.mark.parametrize("name", ["bisect", "probes", "recipes"])
def test_root_links_lead_into_the_package(name: str) -> None:
    assert (REPO / name).resolve() == PACKAGE / name


def test_bisect_is_a_namespace_folder() -> None:
    assert not (PACKAGE / "bisect" / "__init__.py").exists()


def test_every_room_has_its_place() -> None:
    there = {path.stem for path in PACKAGE.iterdir() if path.is_dir() or path.suffix == ".py"}
    assert there - {"__init__", "__main__", "__pycache__", "py"} <= set(ROOMS)


def test_imports_run_one_way() -> None:
    """All imports count: those in functions and under TYPE_CHECKING, too."""
    assert not _upward(_graph())


def test_no_modules_import_each_other_in_a_circle() -> None:
    assert not _in_circles(_graph())


def test_no_two_classes_have_one_name() -> None:
    """One name, one thing: an underscore in front does not make it another name."""
    places: dict[str, list[str]] = {}
    for path, (_, classes) in _read().items():
        for name, line in classes:
            places.setdefault(name.lstrip("_"), []).append(f"{path.relative_to(REPO)}:{line}")
    assert not {name: where for name, where in places.items() if len(where) > 1}


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from cp_debug.cli.main import app; "
        "heavy = {'torch', 'onnx', 'onnxruntime', 'numpy', 'pandas', 'numba'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], cwd=REPO, check=True)


def _upward(graph: dict[str, set[str]]) -> list[str]:
    """Imports from a room that stands after the module's own."""
    return [
        f"{module} imports {other}"
        for module, others in graph.items()
        for other in others
        if (here := _room(module)) in ROOMS and ROOMS.index(_room(other)) > ROOMS.index(here)
    ]


def _in_circles(graph: dict[str, set[str]]) -> set[str]:
    """Modules that import themselves by way of others, and modules that import such."""
    left = {module: set(others) for module, others in graph.items()}
    while leaves := [module for module, others in left.items() if not others & left.keys()]:
        for module in leaves:
            del left[module]
    return set(left)


def _show(graph: dict[str, set[str]]) -> None:
    """Every room with the rooms that it imports from and by how many imports, then the sums."""
    for room in ROOMS:
        own = [_room(other) for module, others in graph.items() if _room(module) == room for other in others]
        if modules := sum(_room(module) == room for module in graph):
            counts = ", ".join(f"{other} {own.count(other)}" for other in ROOMS if other in own and other != room)
            print(f"{room:16} {modules:4} modules  ←  {counts or 'nothing'}")
    print(f"{len(graph)} modules, {sum(map(len, graph.values()))} imports of each other")
    print("\n".join(["upward arrows: 0"] if not (found := _upward(graph)) else ["upward arrows:", *found]))
    print("\n".join(["modules in circles: 0"] if not (left := _in_circles(graph)) else ["in circles:", *sorted(left)]))


def _room(module: str) -> str:
    return module.split(".")[1] if "." in module else module


def _graph() -> dict[str, set[str]]:
    """Module → the modules of the project that it imports anywhere in its text."""
    paths = {_module(path): path for path in PACKAGE.rglob("*.py")}
    graph = {}
    for module, path in paths.items():
        imported = set()
        for node in _read()[path][0]:
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                below = {f"{node.module}.{alias.name}" for alias in node.names}
                imported |= (below & paths.keys()) or {node.module}
            elif isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
        imported |= {package for name in imported for package in _packages(name)} - set(_packages(module))
        graph[module] = {name for name in imported if name.startswith("cp_debug.") and name in paths} - {module}
    return graph


@functools.cache
def _read() -> dict[Path, tuple[list[ast.stmt], list[tuple[str, int]]]]:
    """Every file of the package: its imports, and its classes with their lines. Whole trees are millions of objects."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        imports: list[ast.stmt] = [node for node in nodes if isinstance(node, ast.Import | ast.ImportFrom)]
        found[path] = imports, [(node.name, node.lineno) for node in nodes if isinstance(node, ast.ClassDef)]
    return found


def _packages(module: str) -> list[str]:
    """The packages that a module lies in: to import it imports their ``__init__``, too."""
    parts = module.split(".")
    return [".".join(parts[:i]) for i in range(2, len(parts))]


def _module(path: Path) -> str:
    name = ".".join(path.relative_to(REPO).with_suffix("").parts)
    return name.removesuffix(".__init__")


if __name__ == "__main__":
    _show(_graph())
