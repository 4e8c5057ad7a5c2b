"""A mutation run: small changes to the code, one at a time, and whether a test of what they touch fails.

Usage: ``python tests/mutation/mutants.py --minutes 60 --seed 0 --out mutants.jsonl [--only 'cp_debug/bisect/*']``.

cosmic-ray makes the changes. Which tests run a line is told by coverage with a context for each test, measured once for
each file of quick tests and kept as each file ends, so that a measurement that was stopped goes on where it stood.
Each worker has its own copy of the tree and two processes: one has collected the tests, and its forks renew what the
changed file has made; one has imported the heavy packages only, and confirms what changes of what runs at import do.
The tests of a mutant run in a fork, the quickest first, where files that are named after its module or import it count
as 8 times quicker, until one fails or ``--limit`` seconds of processor time are over; then it is undecided, and
``--again`` judges it once more. A survivor that ``equivalent.toml`` lists, with the reason, does not count. Mutants are
drawn so that every definition has one before any has two. Each outcome is a line of ``--out``, written when it is
known; a run with the same seed leaves out the mutants that stand there.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import json
import math
import os
import queue
import random
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from forks import QUICK

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
VERDICT = (
    "cp_debug/bisect/*", "cp_debug/probes/*", "cp_debug/graph/*", "cp_debug/programs/*",
    "cp_debug/backends/kernels/*", "cp_debug/backends/executor*.py", "cp_debug/backends/a*.py",
    "cp_debug/backends/r*.py", "cp_debug/backends/s*.py", "cp_debug/backends/onnx_definitions.py",
)  # fmt: skip
"""Modules that a verdict passes through."""
ELSEWHERE = ("cp_debug/mixed_precision/*", "cp_debug/quantization/*", "cp_debug/deploy/*", "cp_debug/detection/*")
OPERATORS = (
    "ReplaceBinaryOperator_Add_Sub", "ReplaceBinaryOperator_Sub_Add", "ReplaceBinaryOperator_Mul_Div",
    "ReplaceBinaryOperator_Div_Mul", "ReplaceBinaryOperator_FloorDiv_Mul", "ReplaceBinaryOperator_Mod_Mul",
    "ReplaceBinaryOperator_Pow_Mul", "ReplaceBinaryOperator_BitAnd_BitOr", "ReplaceBinaryOperator_BitOr_BitAnd",
    "ReplaceComparisonOperator_Eq_NotEq", "ReplaceComparisonOperator_NotEq_Eq", "ReplaceComparisonOperator_Lt_LtE",
    "ReplaceComparisonOperator_LtE_Lt", "ReplaceComparisonOperator_Gt_GtE", "ReplaceComparisonOperator_GtE_Gt",
    "ReplaceComparisonOperator_Lt_Gt", "ReplaceComparisonOperator_Gt_Lt", "ReplaceComparisonOperator_Is_IsNot",
    "ReplaceComparisonOperator_IsNot_Is", "ReplaceUnaryOperator_Delete_USub", "ReplaceUnaryOperator_Delete_Not",
    "AddNot", "ReplaceTrueWithFalse", "ReplaceFalseWithTrue", "ReplaceAndWithOr", "ReplaceOrWithAnd",
    "ReplaceContinueWithBreak", "NumberReplacer", "ZeroIterationForLoop",
)  # fmt: skip
COSMETIC = ("frozen", "repr", "strict", "costly")
"""Arguments that say how code may be used or how long it takes, not what comes out: they are not changed."""
PRELOADED = (
    "numpy,torch,torch.export,torch.onnx,torch.fx,onnx,onnx.reference,onnxruntime,onnxruntime.quantization,onnxscript,"
    "scipy.stats,pandas,pydantic,jinja2,rich.console,typer,yaml,pytest,hypothesis,safetensors"
)


@dataclass(frozen=True)
class Mutant:
    """One change to one file."""

    path: str
    operator: str
    occurrence: int
    lines: tuple[int, int]
    definition: str


@dataclass
class Outcome:
    """What became of a mutant: ``killed``, ``hung``, ``survived``, ``undecided``, ``untested`` or ``equivalent``."""

    mutant: Mutant
    outcome: str
    before: str
    after: str
    tests: int = 0
    seconds: float = 0.0
    by: str = ""
    """The test that failed, or why a mutant is equivalent."""


def mutants(path: Path) -> Iterator[Mutant]:
    """Every mutant of a module but those in annotations and in what only type checkers read."""
    from cosmic_ray import plugins
    from cosmic_ray.ast import ast_nodes, get_ast_from_path
    from cosmic_ray.ast.ast_query import ASTQuery

    unread = _unread(path)
    nodes = list(ast_nodes(get_ast_from_path(path)))
    for name in OPERATORS:
        operator = plugins.get_operator(f"core/{name}")()
        places = ((node, *place) for node in nodes for place in operator.mutation_positions(node))
        for occurrence, (node, start, end) in enumerate(places):
            if not any(low <= start < high for low, high in unread):
                definition = ASTQuery(node).get_definition_name() or ""
                yield Mutant(str(path.relative_to(ROOT)), name, occurrence, (start[0], end[0]), definition)


def _unread(path: Path) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Spans of (line, column) that do nothing when the program runs."""
    spans = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        notes = [getattr(node, "annotation", None), getattr(node, "returns", None)]
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "__name__ == '__main__'"):
            notes.append(node)
        if isinstance(node, ast.arguments) and node.kwonlyargs and node.vararg is None:
            spans.append(_star(node))
        notes += [k.value for k in getattr(node, "keywords", ()) if k.arg in COSMETIC]
        if isinstance(node, ast.BinOp) and isinstance(node.right, ast.Constant) and node.right.value is None:
            notes.append(node)  # the type of an alias
        spans += [
            ((n.lineno, n.col_offset), (n.end_lineno or n.lineno, n.end_col_offset or 0))
            for n in notes
            if isinstance(n, ast.expr | ast.stmt)
        ]
    return spans


def _star(arguments: ast.arguments) -> tuple[tuple[int, int], tuple[int, int]]:
    """Where the ``*`` stands before parameters that are given by name only, which says how code may be called."""
    before = [*arguments.posonlyargs, *arguments.args, *arguments.defaults]
    first = arguments.kwonlyargs[0]
    begin = max(((b.end_lineno or 0, b.end_col_offset or 0) for b in before), default=(first.lineno - 1, 0))
    return begin, (first.lineno, first.col_offset)


def is_python(mutant: Mutant) -> bool:
    """Whether the changed file can be compiled: ``{"a": b, **c}`` with one star cannot."""
    from cosmic_ray import plugins
    from cosmic_ray.mutating import mutate_code

    source = (ROOT / mutant.path).read_text(encoding="utf-8")
    changed = mutate_code(source, plugins.get_operator(f"core/{mutant.operator}")(), mutant.occurrence)
    try:
        compile(changed or "", mutant.path, "exec")
    except SyntaxError:
        return False
    return True


def functions_of(path: Path) -> list[tuple[int, int]]:
    """First and last line of every function's body: what is in none runs when the module is imported."""
    found = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    return [(n.body[0].lineno, n.end_lineno or 0) for n in found if isinstance(n, ast.FunctionDef)]


class Affected:
    """The tests that run a line, by coverage."""

    def __init__(self, folder: Path, collected: Sequence[str]) -> None:
        """Read what ``Worker.measure`` left in ``folder``.

        Of the ``collected`` tests those of files that were not measured are taken for what their file concerns.
        """
        self._tests: dict[str, dict[int, set[str]]] = defaultdict(lambda: defaultdict(set))  # path → line → tests
        self._functions: dict[str, list[tuple[int, int]]] = {}
        self._durations: dict[str, float] = {}
        self._near: dict[tuple[str, str], bool] = {}
        self._words: dict[str, set[str]] = {}
        for log in sorted(folder.glob("*.json")):
            self._durations.update(json.loads(log.read_text(encoding="utf-8")))
            self._read(log.with_suffix(".db"))
        measured = {test.partition("::")[0] for test in self._durations}
        self._unmeasured = [test for test in collected if test.partition("::")[0] not in measured]

    def _read(self, coverage: Path) -> None:
        if not coverage.exists():  # no test of the file ran
            return
        with contextlib.closing(sqlite3.connect(coverage)) as db:
            rows = db.execute(
                "select path, context, numbits from line_bits join file on file.id = file_id "
                "join context on context.id = context_id"
            )
            for path, context, bits in rows:
                lines = self._tests[_inside(path)]
                for n in range(8 * len(bits)):
                    if context and bits[n // 8] >> (n % 8) & 1:
                        lines[n].add(context.rpartition("|")[0])

    def at_import(self, path: str, line: int) -> bool:
        """Whether a line runs when its module is imported."""
        if path not in self._functions:
            self._functions[path] = functions_of(ROOT / path)
        return not any(first <= line <= last for first, last in self._functions[path])

    def __call__(self, path: str, lines: tuple[int, int], definition: str = "") -> list[str]:
        """Tests that run one of the lines; for a line that runs at import, those that run a function of the file, and
        those of files that concern the module.

        The quickest first, each file's together; those of files that concern the module count as 8 times quicker, those
        of files that name the definition as 4 times, and of the cases of one test the second as half as quick as the
        first, the fourth as a quarter.
        """
        of_file = self._tests.get(path, {})
        if self.at_import(path, lines[0]):  # some test is the first to import a module
            run = (tests for line, tests in of_file.items() if not self.at_import(path, line))
            near = {t for t in self._durations if self._is_near(path, t.partition("::")[0])}
            names = set().union(*run) | near
        else:
            names = set().union(*(of_file.get(n, ()) for n in range(lines[0], lines[1] + 1)))
        names |= {test for test in self._unmeasured if self._is_near(path, test.partition("::")[0])}
        place: Counter[str] = Counter()
        ranks = {}
        for name in sorted(names):
            case = place[name.partition("[")[0]]
            place[name.partition("[")[0]] += 1
            ranks[name] = self._rank(path, definition, name, case)
        return sorted(names, key=ranks.__getitem__)

    def known(self, tests: list[str]) -> dict[str, float]:
        """The seconds that each test takes."""
        return {test: self._durations.get(test, 60.0) for test in tests}

    def _rank(self, path: str, definition: str, test: str, case: int) -> tuple[int, str, float, str]:
        file, seconds = test.partition("::")[0], self._durations.get(test, 1.0)
        nearer = 3 * self._is_near(path, file) + 2 * self._names(definition, file)
        return math.ceil(math.log2(seconds + 0.1) + math.log2(1 + case)) - nearer, file, seconds, test

    def _names(self, definition: str, file: str) -> bool:
        """Whether a file of tests names a definition."""
        if file not in self._words:
            self._words[file] = {*re.findall(r"\w+", (ROOT / file).read_text(encoding="utf-8"))}
        return definition in self._words[file]

    def _is_near(self, path: str, file: str) -> bool:
        """Whether a file of tests is named after the module, or imports it."""
        if (path, file) not in self._near:
            module, text = Path(path).with_suffix(""), (ROOT / file).read_text(encoding="utf-8")
            package = f"from {'.'.join(module.parts[:-1])} import "
            imports = re.search(
                rf"{re.escape('.'.join(module.parts))}\b|{re.escape(package)}[^\n]*\b{module.name}\b", text
            )
            self._near[path, file] = Path(file).stem == f"test_{module.name}" or imports is not None
        return self._near[path, file]


def _inside(path: str) -> str:
    return path[path.rfind("/cp_debug/") + 1 :]


class Worker:
    """A copy of the tree, and a process with the heavy packages that forks for each mutant."""

    def __init__(self, folder: Path) -> None:
        self._tree = folder
        self._sound: set[str] = set()
        self._broken: set[str] = set()
        skipped = shutil.ignore_patterns(".git", ".venv", ".gpu*", "*.egg-info", "__pycache__", ".mypy_cache", ".*-env")
        shutil.copytree(ROOT, folder, ignore=skipped, symlinks=True, dirs_exist_ok=True)
        shared = ROOT.parent / "shared"
        if shared.exists() and not (folder.parent / "shared").exists():
            (folder.parent / "shared").symlink_to(shared.resolve())
        self._imported = self._server("--import", PRELOADED)
        self._ready = self._collected = self._server("--ready", PRELOADED)

    def collect(self, files: list[str]) -> list[str]:
        """Start the process that has collected the quick tests of these files, and wait until it has: the tests."""
        self._end(self._ready)
        self._collected = self._server("--collect", PRELOADED, *files)
        assert self._collected.stdout
        tests: list[str] = json.loads(self._collected.stdout.readline())
        return tests  # before any file is changed: it would import the changed one

    def _server(self, *arguments: str) -> subprocess.Popen[str]:
        environment = {**os.environ, "PYTHONPATH": str(self._tree), "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("forks.py")), *arguments],
            cwd=self._tree, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def measure(self, tests: str, folder: Path) -> None:
        """Run a file of quick tests with a coverage context for each test: ``folder/NAME.db``, and the seconds of each
        test in ``folder/NAME.json``."""
        log = folder / f"{tests.replace('/', '-')}.json"
        settings = self._tree.parent / "coverage.rc"
        settings.write_text(f"[run]\nsource = cp_debug\ndata_file = {log.with_suffix('.db')}\n", encoding="utf-8")
        cover = ["--cov", f"--cov-config={settings}", "--cov-context=test", "--cov-report="]
        answer = self._ask(self._ready, {"arguments": ["-m", QUICK, *cover, tests], "seconds": 600})
        _replace(log, json.dumps(answer["durations"]))

    def run(
        self, mutant: Mutant, source: str, changed: str, known: dict[str, float], seconds: float, at_import: bool
    ) -> tuple[str, str]:
        """(``killed``, ``hung``, ``survived`` or ``undecided``, the test that failed).

        ``known``: the tests in their order, with the seconds that each takes. ``at_import``: the change tells when its
        module is imported. It is then put in the place of what the module made; a process that imports the module anew
        must confirm the test that fails, and where none does runs those of the first files once more.
        """
        asked = {"path": str(self._tree / mutant.path), "source": source, "changed": changed, "at_import": at_import}
        answer = self._ask(self._collected, {**asked, "tests": list(known), "seconds": seconds, "known": known})
        found, by = answer["outcome"], answer["by"]
        if not at_import:
            return found, by
        if by in known and self._anew({by: known[by]}, seconds)[0] in ("killed", "hung"):
            return found, by
        near = _of_few_files(list(known))
        anew = self._anew({test: known[test] for test in near}, seconds)
        return anew if anew[0] in ("killed", "hung") or found == "survived" else ("undecided", by)

    def _anew(self, known: dict[str, float], seconds: float) -> tuple[str, str]:
        """The outcome in a process that imports cp_debug anew."""
        asked = {"arguments": ["-x", "-m", "", *known], "seconds": seconds, "known": known}
        answer = self._ask(self._imported, asked)
        return answer["outcome"], answer["by"]

    def _ask(self, server: subprocess.Popen[str], asked: dict[str, Any]) -> dict[str, Any]:
        assert server.stdin
        assert server.stdout
        print(json.dumps(asked), file=server.stdin, flush=True)
        answer: dict[str, Any] = json.loads(server.stdout.readline())
        return answer

    def judge(self, mutant: Mutant, affected: Affected, limit: float) -> Outcome:
        """Run the tests of ``mutant`` until one fails or ``limit`` seconds are over."""
        from cosmic_ray import plugins
        from cosmic_ray.mutating import mutate_code

        path = self._tree / mutant.path
        source, written = path.read_text(encoding="utf-8"), path.stat()
        changed = mutate_code(source, plugins.get_operator(f"core/{mutant.operator}")(), mutant.occurrence)
        assert changed is not None, mutant
        pairs = zip(source.splitlines(), changed.splitlines(), strict=False)
        before, after = next(((a.strip(), b.strip()) for a, b in pairs if a != b), ("", ""))
        tests = affected(mutant.path, mutant.lines, mutant.definition)
        outcome = Outcome(mutant, "untested", before, after)
        if not tests:
            return outcome
        at_import, run = affected.at_import(mutant.path, mutant.lines[0]), affected.known(tests)
        begun = time.monotonic()
        while True:
            run = {t: seconds for t, seconds in run.items() if t not in self._broken}
            _forget(path)
            path.write_text(changed, encoding="utf-8")
            try:
                outcome.outcome, outcome.by = self.run(mutant, source, changed, run, limit, at_import)
            finally:
                path.write_text(source, encoding="utf-8")
                os.utime(path, ns=(written.st_atime_ns, written.st_mtime_ns))
                _forget(path)
            if outcome.outcome != "killed" or outcome.by not in run or self._passes(outcome.by, limit):
                break
            self._broken.add(outcome.by)
            print(f"fails without any mutant, and is left out: {outcome.by}", flush=True)
        outcome.tests, outcome.seconds = len(run), round(time.monotonic() - begun, 2)
        return outcome

    def _passes(self, test: str, limit: float) -> bool:
        """Whether a test passes in this copy of the tree as it is."""
        if test not in self._sound:
            answer = self._ask(self._collected, {"arguments": [test], "tests": [test], "seconds": limit})
            if answer["outcome"] != "killed":  # undecided where the machine stood still
                self._sound.add(test)
        return test in self._sound

    def close(self) -> None:
        """End the processes."""
        for server in {self._imported, self._ready, self._collected}:
            self._end(server)

    @staticmethod
    def _end(server: subprocess.Popen[str]) -> None:
        server.send_signal(signal.SIGTERM)
        server.wait()


def _of_few_files(tests: list[str]) -> list[str]:
    """The first tests, of at most 5 files: to collect more takes longer than they run."""
    files = list(dict.fromkeys(t.partition("::")[0] for t in tests))[:5]
    return [t for t in tests if t.partition("::")[0] in files]


def _forget(path: Path) -> None:
    """Remove the bytecode of a module."""
    for each in (path.parent / "__pycache__").glob(f"{path.stem}.*.pyc"):
        each.unlink()


def _replace(path: Path, text: str) -> None:
    """Write a file in one step."""
    part = path.with_suffix(".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def equivalents() -> dict[tuple[str, str, str], str]:
    """(Path, line before, line after) → why no test can tell the difference."""
    listed = tomllib.loads(Path(__file__).with_name("equivalent.toml").read_text(encoding="utf-8"))
    return {(e["path"], e["before"], e["after"]): e["why"] for e in listed.get("mutant", [])}


def chosen(only: str | None, where: str, seed: int) -> list[Mutant]:
    """All mutants, shuffled, one of each definition before any second; three here to two elsewhere."""
    rng = random.Random(seed)
    pools = []
    for patterns in (VERDICT if where != "elsewhere" else (), ELSEWHERE if where != "verdict" else ()):
        paths = sorted(p for p in (ROOT / "cp_debug").rglob("*.py") if _matches(p, patterns, only))
        pool = [m for path in paths for m in mutants(path)]
        rng.shuffle(pool)
        taken: Counter[tuple[str, str]] = Counter()
        turns = []
        for mutant in pool:
            taken[mutant.path, mutant.definition] += 1
            turns.append((taken[mutant.path, mutant.definition], mutant))
        turns.sort(key=lambda turn: -turn[0])  # the last is the first that is drawn
        pools.append([mutant for _, mutant in turns])
    mixed: list[Mutant] = []
    while any(pools):
        for pool, count in zip(pools, (3, 2), strict=True):
            mixed += [pool.pop() for _ in range(min(count, len(pool)))]
    return mixed


def _matches(path: Path, patterns: tuple[str, ...], only: str | None) -> bool:
    name = str(path.relative_to(ROOT))
    return any(fnmatch(name, p) for p in patterns) and (only is None or fnmatch(name, only))


def wanted(patterns: list[str]) -> list[str]:
    """Files of tests in the order of the patterns that they match, the shortest first: it is mostly the quickest."""
    files = sorted((ROOT / "tests").rglob("test_*.py"), key=lambda path: path.stat().st_size)
    names = [str(path.relative_to(ROOT)) for path in files]
    return list(dict.fromkeys(name for p in patterns for name in names if fnmatch(name, p)))


def report(outcomes: list[Outcome]) -> str:
    """A table by room and path: killed of those that are not equivalent."""
    rows: dict[str, Counter[str]] = defaultdict(Counter)
    for each in outcomes:
        path = each.mutant.path
        verdict = any(fnmatch(path, p) for p in VERDICT)
        for name in (f"  {'/'.join(path.split('/')[1:-1])}", "the verdict's path" if verdict else "elsewhere"):
            rows[name][each.outcome] += 1
    lines = [f"{'':32} killed  hung  survived  undecided  untested  equivalent  caught"]
    for name in sorted(rows):
        row = rows[name]
        judged = sum(row.values()) - row["equivalent"]
        caught = f"{(row['killed'] + row['hung']) / judged:7.1%}" if judged else "      -"
        lines.append(
            f"{name:32} {row['killed']:6} {row['hung']:5} {row['survived']:9} {row['undecided']:10} "
            f"{row['untested']:9} {row['equivalent']:11} {caught}"
        )
    return "\n".join(lines)


def finished(path: Path, seed: int) -> list[Outcome]:
    """The outcomes that a run with ``seed`` left in ``path``."""
    if not path.exists():
        return []
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    found = {}
    for row in rows:
        if row.pop("seed") == seed:
            m = row.pop("mutant")
            mutant = Mutant(**{**m, "lines": tuple(m["lines"])})
            found[mutant] = Outcome(mutant, **row)  # the last counts
    return list(found.values())


def main() -> None:
    """Parse the arguments, run, write a line of JSON for each mutant."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--mutants", type=int, default=1 << 30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="pattern of paths: 'cp_debug/bisect/*'")
    parser.add_argument("--where", choices=("verdict", "elsewhere", "both"), default="both")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--limit", type=float, default=90, help="seconds of processor time of tests for one mutant")
    parser.add_argument("--again", action="append", help="judge those with this outcome once more: undecided")
    parser.add_argument("--tests", action="append", help="pattern of test files to use: 'tests/test_replay.py'")
    parser.add_argument("--unmeasured", action="store_true", help="measure no further coverage")
    parser.add_argument("--coverage", type=Path, default=ROOT / ".mutants" / "coverage")
    parser.add_argument("--out", type=Path, default=ROOT / ".mutants" / "mutants.jsonl")
    parser.add_argument("--table", type=Path, help="write the table of outcomes here, too")
    given = parser.parse_args()
    given.coverage = given.coverage.resolve()  # workers are elsewhere
    known, outcomes, lock = equivalents(), finished(given.out, given.seed), threading.Lock()
    if given.again:
        outcomes = [o for o in outcomes if o.outcome not in given.again]
    unmeasured: queue.SimpleQueue[str] = queue.SimpleQueue()
    used = wanted(given.tests or ["*"])
    for name in used if not given.unmeasured else ():
        if not (given.coverage / f"{name.replace('/', '-')}.json").exists():
            unmeasured.put(name)
    waiting: queue.SimpleQueue[Mutant] = queue.SimpleQueue()
    done = {o.mutant for o in outcomes}
    for mutant in chosen(given.only, given.where, given.seed)[: given.mutants]:
        if mutant not in done:
            waiting.put(mutant)
    for folder in (given.coverage, given.out.parent):
        folder.mkdir(parents=True, exist_ok=True)

    def measuring(worker: Worker) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                name = unmeasured.get_nowait()
                worker.measure(name, given.coverage)
                print(f"measured  {name}", flush=True)

    def working(worker: Worker) -> None:
        while time.monotonic() < end and not waiting.empty():
            m = waiting.get()
            if not is_python(m):
                continue
            outcome = worker.judge(m, affected, given.limit)
            if (
                outcome.outcome in ("survived", "undecided", "untested")
                and (m.path, outcome.before, outcome.after) in known
            ):
                outcome.outcome, outcome.by = "equivalent", known[m.path, outcome.before, outcome.after]
            with lock, given.out.open("a", encoding="utf-8") as out:
                outcomes.append(outcome)
                print(json.dumps({**asdict(outcome), "seed": given.seed}), file=out)
                print(f"{outcome.outcome:9} {m.path}:{m.lines[0]} {outcome.before} -> {outcome.after}", flush=True)

    with tempfile.TemporaryDirectory(prefix="mutants-") as scratch:
        workers = [Worker(Path(scratch) / f"w{i}" / "tree") for i in range(given.workers)]
        try:
            with ThreadPoolExecutor(given.workers) as pool:
                list(pool.map(measuring, workers))
                files = {f"tests/{log.stem[6:]}" for log in given.coverage.glob("*.json")} | {*used}
                for worker in workers:
                    tests = worker.collect(sorted(name for name in files if (ROOT / name).exists()))
                affected, end = Affected(given.coverage, tests), time.monotonic() + 60 * given.minutes
                list(pool.map(working, workers))
        finally:
            for worker in workers:
                worker.close()
    table = report(outcomes)
    print(table)
    if given.table:
        given.table.write_text(table + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
