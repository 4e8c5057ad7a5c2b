"""Everything that the gate leaves out, part by part: ``make nightly``, or ``python .ci/nightly.py [PART …]``.

What a part printed, its JUnit file and its result lie in ``.nightly/COMMIT/``: a run that was interrupted goes on where
it stopped, and a part that failed is run again. A table at the end counts tests and skips; exit 1 where one failed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
KEPT = ROOT / ".nightly"


@dataclass(frozen=True)
class Part:
    """``command``: a line of bash, run in the root; ``{python}`` has every extra, ``{junit}`` is the part's report."""

    name: str
    command: str
    needs: str = ""
    """A program without which the part is left out."""


TESTS = "{python} -m pytest -p no:cacheprovider --junitxml={junit} -o addopts='-q --strict-markers' "
OTHER = (
    "{other} -m venv --clear {folder}/{other} && "
    "{folder}/{other}/bin/python -m pip install -q -c constraints.txt -e '.[dev]' && "
    "{folder}/{other}/bin/python -m pytest -n auto -p no:cacheprovider --junitxml={junit}"
)
EXECUTORCH = (
    "{python} -m venv --clear {folder}/executorch && "
    "{folder}/executorch/bin/python -m pip install -q -c constraints.txt -e '.[cpu]' && "
    "{folder}/executorch/bin/python -m pip install -q --no-deps executorch==1.5.1 flatbuffers ruamel.yaml tabulate && "
    "{folder}/executorch/bin/python -W ignore examples/executorch_dump.py | tee {folder}/executorch.txt && "
    "grep -q 'guilty: node_gelu' {folder}/executorch.txt && grep -q 'approximate is tanh' {folder}/executorch.txt"
)
PARTS = (
    Part("checks", "{bin}/ruff check . && {bin}/ruff format --check . && {bin}/mypy"),
    Part("quick", TESTS + "-n auto --random-order -m 'not slow and not process'"),
    Part(
        "slow",
        TESTS
        + "-n auto -m 'slow and not process and not mmdet3d' --ignore=tests/fuzz --ignore=tests/test_notebooks.py",
    ),
    Part("processes", TESTS + "-m 'process and not mmdet3d'"),
    Part("notebooks", TESTS + "tests/test_notebooks.py"),
    Part("speed", "{python} benchmarks/speed.py"),
    Part("fuzz", "{python} tests/fuzz/fuzz_run.py --seed whole --cases 2000"),
    Part(
        "mmdet3d",
        "make --no-print-directory test-mmdet3d PYTHON={python} JUNIT={folder} MMDET3D_ENV={cache}/mmdet3d",
        "g++",
    ),
    Part("executorch", EXECUTORCH),
    *(Part(name, OTHER.replace("{other}", name), name) for name in ("python3.10", "python3.13")),
)
AUDIT = "skips"
"""The part that reads the others' JUnit files."""


@dataclass
class Result:
    """Result of a part."""

    status: str
    """``passed``, ``failed`` or why it was left out."""
    seconds: float = 0.0
    tests: int = 0
    skipped: int = 0


def counted(reports: Iterable[Path]) -> tuple[int, int]:
    """(tests that ran, tests that were skipped) of JUnit files."""
    cases = [case for report in reports for case in ElementTree.parse(report).iter("testcase")]
    skipped = sum(case.find("skipped") is not None for case in cases)
    return len(cases) - skipped, skipped


def run(part: Part, folder: Path, words: dict[str, str]) -> Result:
    """Run a part; what it prints goes to the terminal and to its log."""
    if part.needs and shutil.which(part.needs) is None:
        return Result(f"left out: no {part.needs}")
    junit = folder / f"{part.name}.xml"
    junit.unlink(missing_ok=True)
    command = part.command.format(**words, junit=junit, folder=folder)
    started = time.monotonic()
    with (folder / f"{part.name}.log").open("w") as log:
        process = subprocess.Popen(
            ["bash", "-c", command],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            log.write(line)
    status = "failed" if process.wait() else "passed"
    return Result(status, time.monotonic() - started, *counted(folder.glob(f"{part.name}*.xml")))


def table(results: dict[str, Result]) -> Iterator[str]:
    """The parts, a line each."""
    yield f"{'part':<12} {'result':<28} {'ran':>6} {'skipped':>8} {'minutes':>8}"
    for name, result in results.items():
        minutes = f"{result.seconds / 60:.1f}"
        yield f"{name:<12} {result.status:<28} {result.tests:>6} {result.skipped:>8} {minutes:>8}"


def main() -> int:
    """Run what is left of the parts."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    names = [*(part.name for part in PARTS), AUDIT]
    parser.add_argument("parts", nargs="*", choices=[[], *names], metavar="PART", help=f"of {', '.join(names)}")
    asked = parser.parse_args().parts or names
    git = ["git", "-C", str(ROOT)]
    commit = subprocess.run(
        [*git, "rev-parse", "--short=10", "HEAD"], capture_output=True, text=True, check=True
    ).stdout
    changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True).stdout
    commit = commit.strip() + ("-changed" if changed else "")
    folder, cache = KEPT / commit, Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "cpdebug"
    folder.mkdir(parents=True, exist_ok=True)
    environment = KEPT / "env"
    words = {"python": str(environment / "bin/python"), "bin": str(environment / "bin"), "cache": str(cache)}
    if not (environment / "complete").is_file():
        subprocess.run([sys.executable, "-m", "venv", "--clear", environment], check=True)
        subprocess.run([ROOT / ".ci/extras", words["python"]], check=True)
        (environment / "complete").touch()
    results: dict[str, Result] = {}
    for part in (part for part in PARTS if part.name in asked):
        kept = folder / f"{part.name}.json"
        if kept.is_file() and not changed:
            results[part.name] = Result(**json.loads(kept.read_text()))
            continue
        print(f"\n== {part.name}", flush=True)
        results[part.name] = run(part, folder, words)
        if results[part.name].status == "passed":
            kept.write_text(json.dumps(asdict(results[part.name])))
    reports = sorted(map(str, folder.glob("*.xml")))
    if AUDIT in asked and reports:
        started = time.monotonic()
        audit = subprocess.run([sys.executable, ROOT / ".ci/skips.py", *reports], check=False).returncode
        results[AUDIT] = Result("failed" if audit else "passed", time.monotonic() - started)
    passed = sum(result.status == "passed" for result in results.values())
    print("", *table(results), f"nightly: {passed} of {len(results)} parts passed on {commit}", sep="\n")
    return int(any(result.status == "failed" for result in results.values()))


if __name__ == "__main__":
    sys.exit(main())
