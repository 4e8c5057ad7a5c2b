"""Experiments on a machine with a GPU, by name, each step under a time limit of its own, failures noted.

    CPDEBUG_TRT_PYTHON=PATH python benchmarks/gpu_experiments.py OUT --shared ../shared [--only WORD,...]

What builds engines runs one after the other, as builders that time kernels on one GPU disturb each other; all else runs
beside it, and what measures time alone at the end. A step is one command line. ``OUT`` takes ``STEP.json`` (what the
command wrote), ``STEP.log`` (what it printed) and ``experiments.json`` (commands, exit statuses, seconds),
rewritten after every step; captures and engines go to ``--work``. ``--only`` takes names of experiments or
beginnings of steps; ``--list`` shows all.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cp_debug.files import write_text

BENCHMARKS = Path(__file__).resolve().parent
REPO = BENCHMARKS.parent
GRACE = 15.0
"""Seconds that a command has for ending after Ctrl-C, before it is killed."""
BESIDE = ("host", "ort", "causes")
"""Experiments without engines."""
ALONE = ("rebuilds", "times")
"""Experiments whose seconds count."""


@dataclass(frozen=True)
class Step:
    """One command. ``limit`` in seconds; it is left out where the file or folder ``needs`` is missing."""

    name: str
    command: Sequence[str]
    limit: float = 120.0
    needs: Path | None = None


Experiments = dict[str, list[Step]]


def cpdebug(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "cp_debug", *map(str, arguments)]


def script(name: str, *arguments: object) -> list[str]:
    return [sys.executable, str(BENCHMARKS / f"{name}.py"), *map(str, arguments)]


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def experiments(out: Path, work: Path, shared: Path) -> Experiments:
    """All of them, in the order in which they are started: the longest first."""
    net, conv, tiny = [str(work / "net.onnx")], [str(work / "conv.onnx")], ["centerpoint:tiny"]
    checkpoint = ["--checkpoint", str(shared / "parity/state_dict_overfit.pt")]
    frame = ["--inputs", str(shared / "data/nuscenes_frame.pcd.bin")]
    pillar = ["centerpoint:nus-pillar02", *checkpoint]
    torchscript = ["--exporter", "torchscript"]
    pytest = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    minmax, deblocks = ["--trt-calibrator", "minmax"], "/pts_neck/deblocks.2/deblocks.2.0/ConvTranspose"
    cuda = "torch,torch@cuda,torch-tf32@cuda,ort@cuda,ort-tf32@cuda,ort-fp16@cuda"

    def bisect(name: str, model: list[str], backends: str, *more: str, limit: float, save: bool = True) -> Step:
        kept = ["--save", work / name] if save else []
        to = [*kept, "--json", out / f"{name}.json"]
        return Step(name, cpdebug("bisect", *model, "-b", backends, *more, *to), limit)

    def predicted(name: str, saved: str, backend: str) -> Step:
        to = ["--backend", backend, "--device", "cuda", "--json", out / f"{name}.json"]
        return Step(name, script("predicted", work / saved, *to), 150, needs=work / saved / "result.json")

    return {
        "pillar": [
            bisect("pillar-trt", pillar, "torch,trt-fp16", *frame, limit=330),
            predicted("pillar-predicted", "pillar-trt", "trt-fp16"),
            *bundled("pillar-bundle", work / "pillar-trt", work, "trt-fp16"),
        ],
        "tiny": [
            bisect("tiny-fp16", tiny, "torch,trt-fp16", limit=240),
            predicted("tiny-predicted-fp16", "tiny-fp16", "trt-fp16"),
            bisect("tiny-fp32", tiny, "torch,trt-tf32,trt-fp32", limit=300),
            predicted("tiny-predicted-tf32", "tiny-fp32", "trt-tf32"),
        ],
        "int8": [
            Step("int8-forms", script("int8_forms", out / "int8-forms.json"), 240),
            Step(
                "int8-tiny",
                script("tensorrt_backends", out / "int8-tiny", "--models", *tiny, "--specs", "trt-int8"),
                150,
            ),
        ],
        "net": [
            Step("net-make", python(MAKE_NETS.format(benchmarks=str(BENCHMARKS), net=net[0], conv=conv[0])), 60),
            bisect("net-trt", net, "ort,trt-fp16,trt-tf32,trt-fp32", limit=150),
            predicted("net-predicted", "net-trt", "trt-fp16"),
            bisect("net-refused", net, "ort,trt-int8", *minmax, limit=120, save=False),
            bisect("net-best", net, "ort,trt-best", limit=120, save=False),
            bisect("net-ort-trt", net, "ort,ort-trt@cuda", limit=60, save=False),
        ],
        "calibrated": [
            bisect("calibrated-conv", conv, "ort,trt-int8", *minmax, limit=120),
            bisect(
                "calibrated-net", net, "ort,trt-int8", *minmax, "--keep-fp32", "/6/ConvTranspose", limit=120, save=False
            ),
            bisect("calibrated-tiny", tiny, "torch,trt-int8", *minmax, "--keep-fp32", deblocks, limit=200),
            bisect("calibrated-pillar", pillar, "torch,trt-int8", *frame, *minmax, "--keep-fp32", deblocks, limit=300),
        ],
        "best": [
            bisect("best-tiny", tiny, "torch,trt-best", limit=240),
            bisect("best-pillar", pillar, "torch,trt-best", *frame, limit=330),
        ],
        "deploy": deployed(out, work),
        "tests": [Step("tests-gpu", [*pytest, *with_gpu_tests()], 240)],
        "host": [
            Step("host-doctor", cpdebug("doctor", "--json")),
            Step("host-packages", python(PACKAGES), 60),
        ],
        "ort": [
            bisect("ort-tiny", tiny, cuda, *torchscript, limit=200, save=False),
            bisect("ort-pillar", pillar, cuda, *frame, *torchscript, limit=300, save=False),
        ],
        "causes": [Step("causes-torch", script("explain_gpu"), 200)],
        "rebuilds": [
            Step("rebuilds-net", script("rebuilds", out / "rebuilds-net.json"), 120),
            Step("rebuilds-tiny", script("rebuilds", out / "rebuilds-tiny.json", "--model", *tiny, "--cold", 2), 180),
        ],
        "times": [
            Step("times-tiny", cpdebug("bench", work / "deploy.yaml", "-b", TIMED, "--json", out / "times-tiny.json"))
        ],
    }


TIMED = "torch@cuda,ort@cuda,trt-fp16"
PACKAGES = """
import importlib
for name in "torch onnx onnxruntime onnxscript pydantic yaml jinja2 pytest hypothesis ml_dtypes".split():
    try:
        print(name, getattr(importlib.import_module(name), "__version__", "?"))
    except ImportError as error:
        print(name, "missing:", error)
import onnxruntime
print(onnxruntime.get_available_providers())
"""
MAKE_NETS = """
import sys
sys.path.insert(0, {benchmarks!r})
from pathlib import Path
from tensorrt_backends import LAYERS, make_net
make_net(Path({net!r}))
make_net(Path({conv!r}), [layer for layer in LAYERS if layer[0] == "Conv"])
"""


def with_gpu_tests() -> list[str]:
    """The test files to collect: others may need packages that a GPU host lacks."""
    return [str(path) for path in sorted((REPO / "tests").glob("test_*.py")) if "mark.gpu" in path.read_text()]


def bundled(name: str, saved: Path, work: Path, backend: str) -> list[Step]:
    """A bundle of the first guilty layer, then its own script in TensorRT's own interpreter."""
    folder = work / name
    interpreter = os.environ.get("CPDEBUG_TRT_PYTHON", sys.executable)
    return [
        Step(name, cpdebug("bundle", saved, "-o", folder, "--backend", backend), 240, needs=saved / "result.json"),
        Step(f"{name}-repro", [interpreter, str(folder / "repro.py")], 60, needs=folder),
    ]


def deployed(out: Path, work: Path) -> list[Step]:
    """Engines with dynamic shapes: built, verified and scored from their files; a foreign manifest is refused."""
    config = work / "deploy.yaml"
    profiles = {
        "pts_voxel_encoder": {"input_features": {"min": [1, 20, 11], "opt": [4000, 20, 11], "max": [10000, 20, 11]}},
        "pts_backbone_neck_head": {
            "spatial_features": {side: [1, 32, 128, 128] for side in ("min", "opt", "max")},
        },
    }
    document = {
        "model": "centerpoint:tiny",
        "work_dir": str(work / "deployed"),
        "export": {"mode": "both", "exporter": "torchscript"},
        "components": {name: {"profile": profile} for name, profile in profiles.items()},
        "tensorrt": {"precision": "fp16", "timing_cache": str(work / "deploy.cache")},
        "verify": {"samples": 2},
        "evaluate": {"samples": 10, "backends": ["torch", "ort", "trt-fp16"]},
    }
    config.parent.mkdir(parents=True, exist_ok=True)
    config.write_text(json.dumps(document))  # JSON is YAML
    manifest = work / "deployed/tensorrt/engines.json"
    foreign = f"import pathlib; p = pathlib.Path({str(manifest)!r}); p.write_text(p.read_text().replace('NVIDIA', 'X'))"
    encoder = "input_features:1x20x11:4000x20x11:10000x20x11"
    canvas = "spatial_features:1x32x128x128:1x32x128x128:1x32x128x128"
    built = [
        "--precision", "fp16", "--profile", encoder, "--profile", canvas, "--timing-cache", work / "deploy.cache",
        "-o", work / "built",
    ]  # fmt: skip
    return [
        Step("deploy-all", cpdebug("deploy", config, "--json", out / "deploy-all.json"), 300),
        Step("deploy-build", cpdebug("build", "centerpoint:tiny", *built), 120),
        Step("deploy-verify", cpdebug("verify", config, "--json", out / "deploy-verify.json"), 90),
        Step("deploy-foreign", python(foreign), 10),
        Step("deploy-refused", cpdebug("verify", config), 60),
    ]


class Series:
    """Runs experiments until the time is up, and notes how each step went."""

    def __init__(self, out: Path, deadline: float) -> None:
        self.out, self.deadline = out, deadline
        self.rows: list[dict[str, Any]] = []
        self._lock = threading.Lock()

    def experiment(self, steps: Sequence[Step]) -> None:
        """Its steps in order; the ones behind a failed step run too."""
        for step in steps:
            self._note(self.step(step))

    def step(self, step: Step) -> dict[str, Any]:
        """Run the command; a row for ``experiments.json``."""
        started = time.monotonic()
        limit = min(step.limit, self.deadline - started)
        row: dict[str, Any] = {"step": step.name, "command": list(step.command), "limit": round(limit, 1)}
        if limit < 5:
            return {**row, "status": "no time left"}
        if step.needs is not None and not step.needs.exists():
            return {**row, "status": f"left out: there is no {step.needs}"}
        log = self.out / f"{step.name}.log"
        with log.open("w") as stream:
            said: dict[str, Any] = {"stdout": stream, "stderr": subprocess.STDOUT}
            process = subprocess.Popen(step.command, cwd=REPO, env=environment(), start_new_session=True, **said)
            status: object = ended(process, limit)
        return {**row, "status": status, "seconds": round(time.monotonic() - started, 1), "said": tail(log)}

    def _note(self, row: dict[str, Any]) -> None:
        with self._lock:
            self.rows.append(row)
            write_text(json.dumps(self.rows, indent=1), self.out / "experiments.json")
            print(f"{row['step']}: {row['status']}, {row.get('seconds', 0)} s", flush=True)
            for line in digest(self.out / f"{row['step']}.json"):
                print(f"    {line}", flush=True)
            said = row.get("said", "")
            if row["status"] not in (0, 1) or "Traceback" in said:
                print("    " + said[-600:].replace("\n", "\n    "), flush=True)


def environment() -> dict[str, str]:
    """This one's, with the repository importable behind what is already first."""
    paths = [*filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)), str(REPO)]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "COLUMNS": "160"}


def ended(process: subprocess.Popen[bytes], limit: float) -> int | str:
    """The exit status, or that time ran out: Ctrl-C first, so that processes it started elsewhere are ended by it."""
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
    try:
        process.wait(GRACE)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return "stopped at its limit"


def tail(path: Path, size: int = 2000) -> str:
    return path.read_text(errors="replace")[-size:]


def digest(path: Path) -> Iterator[str]:
    """What a saved `bisect` says, a line a backend."""
    try:
        tests: list[Mapping[str, Any]] = json.loads(path.read_text())["tests"]
    except (OSError, ValueError, KeyError, TypeError):
        return
    for test in tests:
        worst = max((row["rel_l2"] for row in test["outputs"]), key=float, default=None)
        found = [f"{f['cause']} ({f['explained']}) in {len(f['layers'])}" for f in test["findings"]]
        yield (
            f"{test['backend']}: worst output {worst}, compared {len(test['layers'])}, guilty {len(test['guilty'])}, "
            f"causes {found}, gap {test['observer_gap']}, floor {test['noise_floor']}, {test['detections']}"
        )


def chosen(found: Experiments, only: Sequence[str]) -> Experiments:
    """Experiments named in ``only``, and steps whose name begins with one of its words; all without any."""

    def wanted(name: str, step: Step) -> bool:
        return not only or name in only or step.name.startswith(tuple(only))

    picked = {name: [step for step in steps if wanted(name, step)] for name, steps in found.items()}
    return {name: steps for name, steps in picked.items() if steps}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--shared", type=Path, default=REPO.parent / "shared", help="parity checkpoint and frame")
    parser.add_argument("--work", type=Path, help="for captures and engines  [default: a temporary folder]")
    parser.add_argument("--only", default="", help="experiments, or beginnings of steps, separated by commas")
    parser.add_argument("--budget", type=float, default=530.0, help="seconds in all")
    parser.add_argument("--list", action="store_true", help="show the experiments and their commands")
    args = parser.parse_args()
    deadline = time.monotonic() + args.budget
    with tempfile.TemporaryDirectory(prefix="experiments-") as scratch:
        work = (args.work or Path(scratch)).resolve()
        args.out.mkdir(parents=True, exist_ok=True)
        found = experiments(args.out.resolve(), work, args.shared.resolve())
        found = chosen(found, [word for word in args.only.split(",") if word])
        if args.list:
            for name, steps in found.items():
                print(name, *(f"\n  {step.name} ({step.limit:.0f} s): {' '.join(step.command)}" for step in steps))
            return
        series = Series(args.out, deadline)
        beside = [step for name in BESIDE for step in found.pop(name, [])]
        alone = [step for name in ALONE for step in found.pop(name, [])]
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(series.experiment, [[step for steps in found.values() for step in steps], beside]))
        series.experiment(alone)


if __name__ == "__main__":
    main()
