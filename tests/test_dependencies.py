"""What the package imports, it declares: as a dependency, or as an extra that messages name."""

from __future__ import annotations

import ast
import functools
import re
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "cp_debug"
DISTRIBUTIONS = {
    "google": "protobuf",
    "ml_dtypes": "ml-dtypes",
    "pydantic_core": "pydantic-core",
    "modelopt": "nvidia-modelopt",
    "typing_extensions": "typing-extensions",
    "yaml": "pyyaml",
}
"""Top-level module → distribution, where their names differ."""
ELSEWHERE = {"tensorrt/runner.py", "mmdet3d/runner.py"}
"""Run by another Python, with what is installed there."""
WITH_MMENGINE = {"addict", "mmcv", "mmdet", "mmdet3d", "mmengine"}
"""The mmdet3d extra: mmengine's own packages, and those that its Python has."""

IN_NOTEBOOKS = {"IPython"}
"""What every notebook's Python has, and is imported in one only."""
ONLY_WITH = {"quantization/mmengine_hook.py", "pytest_plugin.py", "polygraphy_plugin.py"}
"""What an extra, pytest or Polygraphy completes: imported by those who have it."""


@functools.cache
def imports() -> list[tuple[str, str, bool]]:
    """(file, module, whether at the top of the file) of every import of a third party, anywhere in the text."""
    found = []
    for file in sorted(PACKAGE.rglob("*.py")):
        name = file.relative_to(PACKAGE).as_posix()
        if name.endswith(tuple(ELSEWHERE)):
            continue
        tree = ast.parse(file.read_text())
        for node in ast.walk(tree):
            modules = []
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                modules = [node.module or ""]
            for module in modules:
                top = module.partition(".")[0]
                if top not in {*sys.stdlib_module_names, "tomllib", "cp_debug"}:
                    found.append((name, module, node in tree.body))
    return found


def imported() -> dict[str, set[str]]:
    """Top-level module of a third party → the files that import it."""
    found: dict[str, set[str]] = {}
    for name, module, _ in imports():
        found.setdefault(module.partition(".")[0], set()).add(name)
    return found


def declared() -> tuple[set[str], set[str]]:
    """The distributions that every installation has, and those of the extras that users install."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

    def names(requirements: list[str]) -> set[str]:
        return {re.split(r"[\s<>=!~;\[]", requirement, maxsplit=1)[0].lower() for requirement in requirements}

    extras = {k: v for k, v in project["optional-dependencies"].items() if k != "dev"}
    return names(project["dependencies"]), set().union(*map(names, extras.values()))


@pytest.mark.slow
def test_every_import_is_declared() -> None:
    always, extras = declared()
    unknown = {}
    for module, files in imported().items():
        distribution = DISTRIBUTIONS.get(module, module).lower()
        if (
            distribution not in always | extras
            and module not in WITH_MMENGINE | IN_NOTEBOOKS
            and not files <= ONLY_WITH
        ):
            unknown[module] = sorted(files)
    assert not unknown


def test_what_an_extra_brings_is_imported_where_it_is_used() -> None:
    """A module of an extra alone, imported at the top of a file, is one that every command needs."""
    always, _ = declared()
    wrong = []
    for name, module, at_top in imports():
        top = module.partition(".")[0]
        if at_top and not name.endswith(tuple(ONLY_WITH)) and DISTRIBUTIONS.get(top, top).lower() not in always:
            wrong.append(f"{name}: {module}")
    assert not wrong


@pytest.mark.parametrize("module", ["typing_extensions", "numpy", "torch"])
def test_the_check_sees_what_is_imported(module: str) -> None:
    assert module in imported()
