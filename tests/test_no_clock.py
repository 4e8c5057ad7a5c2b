"""No test asks the clock, and what depends on other processes is marked ``process`` and stays out of the quick run."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
CLOCK = {"time.sleep", "time.monotonic", "time.perf_counter", "time.process_time", "threading.Timer"}
"""Only ``states.until`` may, and it waits for a state."""
PROCESSES = {
    *("os.kill", "os.killpg", "subprocess.Popen", "resource.setrlimit", "resource.getrusage", "signal.setitimer"),
    *("signal.alarm", "socket.socket", "socket.create_server", "webdriver.Chrome", "states.until", "states.gone"),
}
"""What only tests that are marked ``process`` use, by themselves or through a function or fixture of their file."""
THREADS = {"test_trt_runner.py", "test_deploy_awml.py", "test_sweep_shared.py"}
"""Files whose tests wait for a thread of their own process, which nothing but an error of the test can keep."""


def calls(tree: ast.AST, names: dict[str, str]) -> Iterator[str]:
    """Dotted names of everything used below ``tree``; ``names``: imported name → where it is from."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            yield f"{names.get(node.value.id, node.value.id)}.{node.attr}"
        elif isinstance(node, ast.Name):
            yield names.get(node.id, node.id)


def imported(tree: ast.Module) -> dict[str, str]:
    """Names that the imports of a file bind, anywhere in it, with what they stand for."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.asname or alias.name: alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return {name: place.removeprefix("selenium.") for name, place in found.items()}


def marked(node: ast.Module | ast.FunctionDef) -> bool:
    """Whether a file or a test has the mark."""
    places = node.decorator_list if isinstance(node, ast.FunctionDef) else []
    if isinstance(node, ast.Module):
        places = [line.value for line in node.body if isinstance(line, ast.Assign) and "pytestmark" in ast.dump(line)]
    return any("pytest.mark.process" in ast.unparse(place) for place in places)


def unmarked(tree: ast.Module, names: dict[str, str], file: str) -> Iterator[tuple[str, str]]:
    """(test, what it uses) for tests of a file that lack the mark; what functions of the file use counts as theirs."""
    if marked(tree):
        return
    parts = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    uses = {name: set(calls(node, names)) | _arguments(node) for name, node in parts.items()}
    while True:
        more = {name: used | {u for part in used & set(parts) for u in uses[part]} for name, used in uses.items()}
        if more == uses:
            break
        uses = more
    allowed = {"states.until"} if file in THREADS else set()
    for name, node in parts.items():
        if name.startswith("test_") and isinstance(node, ast.FunctionDef) and not marked(node):
            yield from ((name, used) for used in sorted(uses[name] & PROCESSES - allowed))


def _arguments(node: ast.AST) -> set[str]:
    """Fixtures that a function asks for."""
    return {a.arg for a in node.args.args} if isinstance(node, ast.FunctionDef) else set()


FILES = sorted(path for path in TESTS.rglob("*.py") if path.name != "states.py" and "mutation" not in path.parts)


@functools.cache
def read(path: Path) -> tuple[set[str], list[str], list[tuple[str, str]]]:
    """What a file uses, the calls in it that limit a process, and the tests that lack the mark."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = imported(tree)
    limits = [ast.unparse(call.func) for call in ast.walk(tree) if isinstance(call, ast.Call) and _limited(call)]
    return set(calls(tree, names)), limits, list(unmarked(tree, names, path.name))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_no_test_asks_the_clock(path: Path) -> None:
    used, limits, _ = read(path)
    if "fuzz" not in path.parts and path.name != "sweep_tasks.py":  # hangs are seen by it; tasks that take a while
        assert not used & CLOCK
    if path.name.startswith("test_"):
        assert not limits, "pytest-timeout ends what hangs"


def _limited(call: ast.Call) -> bool:
    """Whether it gives a limit of time to a process."""
    runs = ("subprocess.run", "communicate", "wait", "HTTPConnection")
    return any(word.arg == "timeout" for word in call.keywords) and ast.unparse(call.func).endswith(runs)


@pytest.mark.parametrize("path", [f for f in FILES if f.name.startswith("test_")], ids=lambda path: path.stem)
def test_what_needs_other_processes_is_marked(path: Path) -> None:
    assert not read(path)[2]
