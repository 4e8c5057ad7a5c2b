"""The layout keeps its promises: nothing shadows the standard library, imports run one way, help is fast."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
# Leaves: they import nothing of the project but errors, and say what a model is, so recipes need them too.
LEAVES = {f"cp_debug.probes.{name}" for name in ("graph", "inputs", "outputs", "arrays", "trace")}
# An entry point beside the recipe whose weights it makes; nothing imports it.
ENTRY_POINTS = {"cp_debug/recipes/centerpoint/training.py"}
RANK = {
    "cli": 0,
    "reports": 1,
    "bisect": 2,
    "deploy": 2,
    "quantization": 2,
    "repair": 2,
    "sweep": 2,
    "backends": 3,
    "probes": 3,
    "recipes": 4,
}


def test_root_links_do_not_shadow_the_standard_library() -> None:
    code = "import random, bisect; a = [1, 3]; bisect.insort(a, 2); assert a == [1, 2, 3], a"
    subprocess.run([sys.executable, "-c", code], cwd=REPO, check=True)


@pytest.mark.parametrize("name", ["bisect", "probes", "recipes"])
def test_root_links_lead_into_the_package(name: str) -> None:
    assert (REPO / name).resolve() == REPO / "cp_debug" / name


def test_bisect_is_a_namespace_folder() -> None:
    assert not (REPO / "cp_debug" / "bisect" / "__init__.py").exists()


def test_imports_run_one_way() -> None:
    wrong = []
    for path in (REPO / "cp_debug").rglob("*.py"):
        folder = path.relative_to(REPO / "cp_debug").parts[0]
        if folder not in RANK or str(path.relative_to(REPO)) in ENTRY_POINTS:
            continue
        for module in _top_level_imports(path):
            other = module.split(".")[1] if module.startswith("cp_debug.") else None
            if other in RANK and RANK[other] < RANK[folder] and module not in LEAVES:
                wrong.append(f"{path.relative_to(REPO)} imports {module}")
    assert not wrong


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from cp_debug.cli.main import app; "
        "heavy = {'torch', 'onnx', 'onnxruntime', 'numpy', 'pandas', 'numba'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], cwd=REPO, check=True)


def _top_level_imports(path: Path) -> list[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = []
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module:
            found.append(node.module)
        elif isinstance(node, ast.Import):
            found.extend(alias.name for alias in node.names)
    return found
