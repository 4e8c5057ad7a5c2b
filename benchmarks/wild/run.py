"""cpdebug on networks in the wild: one process a case, a resumable log, the table of ``docs/wild.md``.

    make wild-env                                                     # once: the packages that ship networks
    python benchmarks/wild/run.py make --zoo FOLDER --packages ENV    # networks, variants and faults into FOLDER
    python benchmarks/wild/run.py run --zoo FOLDER --log FILE [--quick] [--only TEXT] [--half tuning] [--limit N]
    python benchmarks/wild/run.py table --log FILE [--write docs/wild.md]

``--only`` takes a regular expression over ``GROUP:NETWORK:KIND:FILE:BACKENDS``. A case that is in the log is not run
again; delete the log (or ``--again``) after the code changed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from importlib import import_module
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import wild

    __package__ = wild.__name__

from .cases import QUICK, Case, all_cases
from .score import ERROR, score

TIME_LIMIT = 180.0
"""Seconds of processor time that a case may take."""


def run_case(case: Case, folder: Path, limit: float = TIME_LIMIT) -> dict[str, Any]:
    """The log's record of one case: the question, the exit code, the verdict, seconds and memory."""
    with tempfile.TemporaryDirectory(prefix="wild-") as scratch:
        answer, said = Path(scratch) / "result.json", Path(scratch) / "output.txt"
        dump = write_tensors(case, folder, Path(scratch)) if case.group == "tensors" else None
        command = [*case.command(folder, dump), "--level", "stages", "--json", str(answer)]
        start = time.perf_counter()
        code, cpu, peak = in_child(lambda: _cpdebug(command), said, limit)
        seconds = time.perf_counter() - start
        block = None
        if answer.exists() and code in (0, 1):
            block = json.loads(answer.read_text())["tests"][0]
        once = None
        if block is not None and case.group in ("healthy", "fault", "renamed") and not os.environ.get("WILD_NO_COST"):
            figures = Path(scratch) / "once.json"
            in_child(lambda: _both_once(case, folder, figures), Path(scratch) / "once.txt", limit)
            once = json.loads(figures.read_text()) if figures.exists() else None
        record = case.to_dict() | {"exit": code, **score(case.to_dict(), code, block)}
        if record["verdict"] == ERROR:
            record["said"] = said.read_text(errors="replace")[-1500:]
        return record | {"cpu": round(cpu, 2), "wall": round(seconds, 2), "once": once, "peak_mib": peak}


def write_tensors(case: Case, folder: Path, scratch: Path) -> Path:
    """The values of a faulty network's run that its parent's graph has too, as one file."""
    import numpy as np
    import onnx

    from .edits import Net

    sample = dict(np.load(folder / case.inputs))
    own = {name for node in onnx.load(folder / case.model).graph.node for name in node.output}
    values = Net(onnx.load(folder / case.test_model)).run(sample)
    target = scratch / "tensors.npz"
    np.savez(target, **{name: array for name, array in values.items() if name in own}, **sample)
    return target


def in_child(work: Callable[[], int], output: Path, limit: float) -> tuple[int, float, int]:
    """(exit code, processor seconds, peak MiB) of a function in a fork of this process, which has loaded libraries.

    What it prints goes into a file. A code above 128 is a signal, of one that ran past ``limit`` processor seconds.
    """
    child = os.fork()
    if child == 0:
        code = 70
        try:
            os.setpgid(0, 0)
            written = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            os.dup2(written, 1)
            os.dup2(written, 2)
            used = time.process_time()
            resource.setrlimit(resource.RLIMIT_CPU, (int(used + limit) + 1, int(used + limit) + 1))
            signal.alarm(int(4 * limit))
            code = work()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    _, status, usage = os.wait4(child, 0)
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code, usage.ru_utime + usage.ru_stime, usage.ru_maxrss // 1024


def load_libraries() -> None:
    """Import what every case needs, so that its processor time is its own."""
    import torch

    for name in ("onnx", "onnxruntime", "cp_debug.bisect.engine", "cp_debug.cli.main"):
        import_module(name)
    torch.set_num_threads(1)


def _cpdebug(arguments: list[str]) -> int:
    from cp_debug.cli.main import main

    sys.argv = ["cpdebug", *arguments]
    main()
    return 0


def _both_once(case: Case, folder: Path, figures: Path) -> int:
    """Processor seconds of opening both backends with all probes and running them once."""
    from cp_debug.backends.registry import create
    from cp_debug.backends.spec import parse_backends
    from cp_debug.programs.pipeline import Pipeline, prepare
    from cp_debug.recipes.onnx_file import OnnxFileModel

    start = time.process_time()
    files = [folder / case.model, folder / (case.test_model or case.model)]
    for file, spec in zip(files, parse_backends(case.backends), strict=True):
        model = OnnxFileModel(file)
        (sample,) = model.samples(1, 0, folder / case.inputs)
        with tempfile.TemporaryDirectory() as scratch:
            programs = prepare(model, sample, Path(scratch))
            with Pipeline(model, programs, create(spec)) as pipeline:
                pipeline.run(sample, lambda key, tensor: None)
    figures.write_text(json.dumps(round(time.process_time() - start, 3)))
    return 0


def read_log(path: Path) -> list[dict[str, Any]]:
    """The records, the last of each key; a line that a killed run left half written is dropped."""
    records: dict[str, dict[str, Any]] = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        records[record["key"]] = record
    return list(records.values())


def choose(cases: Iterable[Case], args: argparse.Namespace) -> list[Case]:
    """The cases that the flags ask for, in the order of their networks, or shuffled by ``--seed``."""
    found = [
        case
        for case in cases
        if (not args.only or re.search(args.only, case.key))
        and (not args.half or case.half == args.half)
        and (not args.quick or (case.network in QUICK and _quick(case)))
    ]
    if args.seed is not None:
        random.Random(args.seed).shuffle(found)
    return found[: args.limit]


def _quick(case: Case) -> bool:
    return not case.fault or case.backends == "ort,ort-none"


def run(args: argparse.Namespace) -> int:
    """Run what is not in the log yet; 1 where a healthy network was accused, a fault missed, or a case failed."""
    cases = choose(all_cases(args.zoo), args)
    done = set() if args.again else {record["key"] for record in read_log(args.log)}
    left = [case for case in cases if case.key not in done]
    print(f"{len(cases)} cases, {len(cases) - len(left)} in the log")
    load_libraries()
    commit = code_version()
    args.log.parent.mkdir(parents=True, exist_ok=True)
    bad = 0
    with args.log.open("a") as log:
        for number, case in enumerate(left, 1):
            record = run_case(case, args.zoo.resolve(), args.time_limit) | {"commit": commit}
            log.write(json.dumps(record) + "\n")
            log.flush()
            bad += (wrong := record["verdict"] in ("accused", "missed", "error"))
            cause = f" {record['cause']}: {record['said']}" if "cause" in record else ""
            mark = "!" if wrong else " "
            print(f"{mark}{number:4}/{len(left)} {record['cpu']:6.1f} s  {record['verdict']:8}{cause:24} {case.key}")
    return int(bad > 0)


def code_version() -> str:
    """The commit of the code, with ``-dirty`` where files differ from it; empty outside of a git work tree."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude=*"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def make(args: argparse.Namespace) -> int:
    """Write networks, variants and faults; what exists stays."""
    from . import networks as zoo
    from .faults import FAULTY, write_faults
    from .variants import PARENTS, write_variants

    packages = site_packages(args.packages)
    networks: Iterable[tuple[str, str]]
    if args.packaged:
        shipped = zoo.write_shipped(args.zoo, packages, zoo.SHIPPED_BESIDE)
        networks = itertools.chain(shipped, zoo.write_exported(args.zoo, zoo.packaged_names()))
        faulty = zoo.packaged_faulty()
    elif args.unusual:
        networks, faulty = zoo.write_exported(args.zoo, zoo.unusual_names()), zoo.unusual_names()
    else:
        networks, faulty = zoo.write(args.zoo, packages), list(FAULTY)
    dynamo = [name for name in zoo.unusual_names() if name.endswith(".dynamo")]
    parents = faulty if args.packaged else dynamo if args.unusual else PARENTS
    for name, error in itertools.chain(networks, write_variants(args.zoo, parents)):
        if error:
            print(f"{name}: {error}")
    count = write_faults(args.zoo, args.seed or 0, args.faulty or faulty, args.each)
    print(f"{len(list(args.zoo.glob('*.onnx')))} files, {count} faults")
    return 0


def site_packages(environment: Path | None) -> list[Path]:
    """Where shipped networks are looked for: in the environment, then beside this interpreter's ``onnx``."""
    import onnx

    found = sorted(environment.glob("lib/python*/site-packages")) if environment else []
    return [*found, Path(onnx.__file__).parents[1]]


def table(args: argparse.Namespace) -> int:
    """Print the table, or write it and its figures beside it."""
    from .table import markdown, raw

    records = read_log(args.log)
    if args.write is None:
        print(markdown(records, args.note))
        return 0
    args.write.write_text(markdown(records, args.note))
    data = args.write.parent / "data" / "wild.json"
    data.parent.mkdir(exist_ok=True)
    data.write_text(json.dumps(raw(records), separators=(",", ":"), sort_keys=True) + "\n")
    return 0


def main() -> None:
    """Parse the flags and do one of make, run and table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("make", "run", "table"))
    parser.add_argument("--zoo", type=Path, default=Path(".wild-zoo"), help="folder of networks, variants and faults")
    parser.add_argument("--packages", type=Path, help="environment with the packages of requirements.txt")
    parser.add_argument("--log", type=Path, default=Path(".wild-zoo/log.jsonl"), help="JSON lines, one a case")
    parser.add_argument("--only", help="regular expression over the cases' keys")
    parser.add_argument("--half", choices=("tuning", "held-out"), help="one half of the networks, by their names")
    parser.add_argument("--limit", type=int, help="at most so many cases")
    parser.add_argument("--seed", type=int, help="shuffles the cases; of make: draws the faults")
    parser.add_argument("--faulty", action="append", help="of make: put faults into this network instead; repeatable")
    parser.add_argument("--unusual", action="store_true", help="of make: the networks of unusual.py instead")
    parser.add_argument("--packaged", action="store_true", help="of make: the networks of packaged.py instead")
    parser.add_argument("--each", type=int, help="of make: at most so many faults a network, not one of every kind")
    parser.add_argument("--quick", action="store_true", help="six networks, faults at one level")
    parser.add_argument("--again", action="store_true", help="also what is in the log")
    parser.add_argument("--time-limit", type=float, default=TIME_LIMIT, help="processor seconds a case")
    parser.add_argument("--write", type=Path, help="write the table here, and its figures into data/ beside it")
    parser.add_argument("--note", action="append", default=[], help="a line for the table's conditions; repeatable")
    args = parser.parse_args()
    sys.exit({"make": make, "run": run, "table": table}[args.what](args))


if __name__ == "__main__":
    main()
