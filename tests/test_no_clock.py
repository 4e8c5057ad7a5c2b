"""No test asks the clock, and what depends on other processes is marked ``process`` and stays out of the quick run."""

from __future__ import annotations

import ast
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


def trees() -> Iterator[tuple[Path, ast.Module]]:
    """Every file of the tests, as Python reads it."""
    for path in FILES:
        yield path, ast.parse(path.read_text(encoding="utf-8"))


@pytest.mark.slow
def test_no_test_asks_the_clock_or_lacks_its_mark() -> None:
    asks, limits, lacks = [], [], []
    for path, tree in trees():
        names = imported(tree)
        if "fuzz" not in path.parts and path.name != "sweep_tasks.py":  # hangs are seen by it; tasks that take a while
            asks += [(path.name, used) for used in set(calls(tree, names)) & CLOCK]
        if path.name.startswith("test_"):
            limits += [
                (path.name, node.lineno) for node in ast.walk(tree) if isinstance(node, ast.Call) and _limited(node)
            ]
            lacks += [(path.name, *what) for what in unmarked(tree, names, path.name)]
    assert not asks
    assert not limits, "pytest-timeout ends what hangs"
    assert not lacks


def _limited(call: ast.Call) -> bool:
    """Whether it gives a limit of time to a process."""
    runs = ("subprocess.run", "communicate", "wait", "HTTPConnection")
    return any(word.arg == "timeout" for word in call.keywords) and ast.unparse(call.func).endswith(runs)


@pytest.mark.slow
def test_no_test_draws_from_a_generator_of_its_file() -> None:
    """What it draws would depend on the tests before it; ``draws.RNG`` begins anew with each test."""
    shared = []
    for path, tree in trees():
        made = {
            target.id
            for line in tree.body
            if isinstance(line, ast.Assign)
            and isinstance(line.value, ast.Call)
            and ast.unparse(line.value.func).endswith("default_rng")
            for target in line.targets
            if isinstance(target, ast.Name)
        }
        functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
        for function in functions if path.name != "draws.py" else []:
            shared += [
                (path.name, function.name, name) for name in made & set(calls(ast.Module(function.body, []), {}))
            ]
    assert not shared
