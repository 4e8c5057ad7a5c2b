"""The fuzzer as a command: ``python tests/fuzz/fuzz_run.py --seed 1 --cases 2000``; exit code 1: found something.

``--only KIND`` keeps one kind; ``--index N`` repeats one case, shows it, and keeps its files.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import fuzz_arguments
import fuzz_crossed
import fuzz_deploy
import fuzz_ends
import fuzz_files
import fuzz_foreign
import fuzz_harness
import fuzz_hostile
import fuzz_more
import fuzz_newer
import fuzz_onnx
import fuzz_python
import fuzz_records
from fuzz_base import Case, Make
from fuzz_world import World

KINDS: dict[str, tuple[Make, int]] = {
    "onnx-bytes": (fuzz_onnx.onnx_bytes, 8),
    "onnx-structure": (fuzz_onnx.onnx_structure, 24),
    "onnx-names": (fuzz_onnx.onnx_names, 7),
    "inputs": (fuzz_files.inputs, 9),
    "clouds": (fuzz_files.clouds, 5),
    "infos": (fuzz_files.infos, 6),
    "checkpoints": (fuzz_files.checkpoints, 6),
    "captures": (fuzz_records.captures, 8),
    "results": (fuzz_records.results, 9),
    "logs": (fuzz_records.logs, 5),
    "states": (fuzz_records.states, 2),
    "deploy": (fuzz_deploy.configuration, 12),
    "arguments": (fuzz_arguments.arguments, 14),
    "outputs": (fuzz_arguments.outputs, 8),
    "callables": (fuzz_arguments.callables, 4),
    "runners": (fuzz_arguments.runners, 3),
    "onnx-reflected": (fuzz_more.onnx_reflected, 16),
    "test-models": (fuzz_more.test_models, 8),
    "numbers": (fuzz_more.numbers, 8),
    "grammar": (fuzz_more.grammar, 8),
    "sealed-logs": (fuzz_more.sealed_logs, 5),
    "caches": (fuzz_more.caches, 5),
    "strange-values": (fuzz_more.strange_values, 8),
    "environments": (fuzz_more.environments, 2),
    "operators": (fuzz_foreign.operators, 16),
    "control-flow": (fuzz_foreign.control_flow, 8),
    "dumps": (fuzz_foreign.dumps, 8),
    "programs": (fuzz_foreign.programs, 6),
    "plug-ins": (fuzz_foreign.plugins, 2),
    "combined": (fuzz_foreign.combined, 10),
    "external-data": (fuzz_newer.external_data, 10),
    "huge": (fuzz_newer.huge, 8),
    "schema": (fuzz_newer.schema, 8),
    "saved": (fuzz_newer.saved, 10),
    "imported": (fuzz_newer.imported, 8),
    "node-tests": (fuzz_crossed.node_test, 14),
    "crossed": (fuzz_crossed.crossed, 8),
    "leaves": (fuzz_crossed.leaves, 10),
    "collisions": (fuzz_crossed.collisions, 5),
    "wrong-files": (fuzz_crossed.wrong_files, 8),
    "python-values": (fuzz_python.values, 12),
    "python-modules": (fuzz_python.modules, 8),
    "pytest-plug-in": (fuzz_python.pytest_plugin, 3),
    "quantized": (fuzz_ends.quantized, 8),
    "streams": (fuzz_ends.streams, 4),
    "failing": (fuzz_ends.failing, 6),
    "endless": (fuzz_ends.endless, 1),
    "options": (fuzz_ends.options, 6),
    "no-text": (fuzz_hostile.no_text, 8),
    "dimensions": (fuzz_hostile.dimensions, 8),
    "narrow-weights": (fuzz_hostile.narrow_weights, 8),
    "odd-names": (fuzz_hostile.odd_names, 8),
    "signals": (fuzz_foreign.signals, 3),
    "kills": (fuzz_ends.kills, 3),
}
"""Name → (generator, how often)."""

DEAR = {"runners", "infos", "states", "logs", "sealed-logs", "caches", "strange-values", "plug-ins", "pytest-plug-in"}
"""Kinds of which a case takes seconds: left out of the quick run."""

ASKED = {"signals", "kills"}
"""Kinds that run where ``--only`` names them: time decides what they do, not the seed alone."""


def seeded(seed: str, index: int, kinds: Sequence[str]) -> tuple[str, random.Random]:
    """The kind of a case and its generator: from the seed and the number alone."""
    rng = random.Random(f"{seed}/{index}")
    return rng.choices(kinds, [KINDS[kind][1] for kind in kinds])[0], rng


def run_cases(
    seed: str, indices: Sequence[int], kinds: Sequence[str], folder: Path, *, keep: bool = False
) -> Iterator[tuple[int, str, Case, fuzz_harness.Outcome]]:
    """Every case with its kind and what came of it; its files are removed unless ``keep``."""

    def run(argv: list[str], place: Path) -> int:
        temporary = folder / "world-tmp"
        temporary.mkdir(exist_ok=True)
        code, _ = fuzz_harness.call(argv, place, temporary, folder / "world-said")
        return code

    world = World(folder / "world", run)
    for index in indices:
        kind, rng = seeded(seed, index, kinds)
        place = folder / f"case-{index}"
        (place / "work").mkdir(parents=True)
        case = KINDS[kind][0](rng, world, place / "work")
        outcome = fuzz_harness.judge(case, place)
        if not keep:
            fuzz_harness.clear(place)
        yield index, kind, case, outcome


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", default="0")
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--only", action="append", choices=list(KINDS))
    parser.add_argument("--index", type=int)
    parser.add_argument("--keep", type=Path, help="a new folder in which the cases' files stay")
    parser.add_argument("--log", type=Path, help="every fault as a line of JSON")
    parser.add_argument("--limit", type=float, help="seconds after which no case begins")
    given = parser.parse_args()
    kinds = given.only or [kind for kind in KINDS if kind not in ASKED]
    indices = [given.index] if given.index is not None else range(given.first, given.first + given.cases)
    keep = given.keep is not None or given.index is not None
    folder = given.keep or Path(tempfile.mkdtemp(prefix="cpdebug-fuzz-"))
    folder.mkdir(parents=True, exist_ok=True)
    fuzz_harness.prepare()
    started = time.monotonic()
    found: Counter[str] = Counter()
    distinct: dict[tuple[str, str], list[int]] = {}
    spent: Counter[str] = Counter()
    number: Counter[str] = Counter()
    count = 0
    for index, kind, case, outcome in run_cases(given.seed, indices, kinds, folder, keep=keep):
        count += 1
        spent[kind] += outcome.seconds
        number[kind] += 1
        for fault, detail in outcome.faults:
            found[fault] += 1
            distinct.setdefault((fault, detail), []).append(index)
            if given.log:
                line = {"index": index, "kind": kind, "commands": case.commands, "fault": fault, "detail": detail}
                with given.log.open("a") as stream:
                    stream.write(json.dumps({**line, "stderr": outcome.stderr[-4000:]}) + "\n")
        if given.index is not None:
            print(case, outcome.codes, f"{outcome.seconds:.1f} s", outcome.stderr, folder, sep="\n")
        if given.limit and time.monotonic() - started > given.limit:
            break
    for (fault, detail), where in sorted(distinct.items(), key=lambda item: -len(item[1])):
        print(f"{len(where):5} {fault}: {detail}  (--index {where[0]})")
    if count > 1:
        times = ", ".join(f"{kind} {number[kind]}×{spent[kind] / number[kind]:.2f}s" for kind in sorted(number))
        print(times)
    command = " ".join(["tests/fuzz/fuzz_run.py", *sys.argv[1:]])
    print(f"{command}: {fuzz_harness.summary(given.seed, count, found, time.monotonic() - started)}")
    if not keep:
        fuzz_harness.clear(folder)
    return int(bool(found))


if __name__ == "__main__":
    try:
        status = main()
    except Exception:
        traceback.print_exc()
        status = 2
    sys.stdout.flush()
    os._exit(status)  # what preparing started must not keep the process
