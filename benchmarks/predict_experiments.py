"""Experiments for a machine with a GPU: engines that predictions are scored against, and what a bisect does when it
is disturbed.

    CPDEBUG_TRT_PYTHON=PATH python benchmarks/predict_experiments.py OUT --networks FOLDER [--shared FOLDER]

``FOLDER`` holds the networks of ``QUEUES`` with their ``.npz`` (``engine_networks.py`` makes most). Queues run beside
each other; what comes after ``--budget`` is left out. ``OUT`` is written as ``gpu_experiments.py`` does it; ``--work``
keeps captures, from which ``predicted.py`` and ``predict_score.py`` work later, on another machine; ``--only`` takes
beginnings of steps.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from gpu_experiments import REPO, Series, Step, cpdebug, script

LEVELS = {"ppocr-det": 1, "ppocr-cls": 2}
"""Builder levels below TensorRT's own: trained networks with dynamic axes take minutes there."""
QUEUES = (
    ("pillar",),
    ("ppocr-det",),
    ("segment", "yolo"),
    ("odd", "ppocr-cls", "encoder"),
    ("orders", "products", "resnet"),
    ("vit-no-builds", "roi", "killed", "cache-nowhere", "timeout"),
)
"""What builds engines; queues run beside each other, so seconds are upper bounds. No network but ``products`` was used
to build the predictions."""
SIZED = (
    ("detr", "slim"),
    ("diffusion", "slim_aside"),
    ("painter", "batched"),
    ("convnext_sized", "batched_aside"),
    ("yolo-0", "yolo-2"),
    ("pillar-0",),
)
"""Networks of ``engine_networks_sized.py``, and lower builder levels. ``predicted.py`` follows each, on the GPU."""

DETECTOR = (
    ("yolov8n-3", "yolov8n-3-again", "yolov8n-3-boundaries", "kernels-yolov8n-3-boundaries"),
    ("ppocr-det-1", "ppocr-det-2", "ppocr-det-3", *(f"kernels-ppocr-det-{level}" for level in (3, 2, 1))),
    ("yolov8n-static", "kernels-yolov8n-static"),
)
"""Trained detectors with free axes at the builder's own levels: run one queue at a time (``--only``) for seconds that
count. ``again`` and ``boundaries`` take engines and timings of the first command from its cache."""
PLUGINS = (("plug", "plug-handles", "plug-nms", "plug-norm", "branch", "loop"),)
"""Networks of ``engine_networks_plugins.py``."""
SETS = {"sized": SIZED, "detector": DETECTOR, "plugins": PLUGINS, "": QUEUES}
WITHOUT_HANDLES = "--tactic-sources=-CUBLAS,-CUBLAS_LT,-CUDNN"
"""Plug-ins are handed cuBLAS and cuDNN while these are sources of kernels, and packages need not have them."""


def steps(out: Path, work: Path, networks: Path, shared: Path, device: str = "cuda") -> dict[str, Step]:
    """Every step by name."""
    pillar = ["centerpoint:nus-pillar02", "--checkpoint", shared / "parity/state_dict_overfit.pt"]
    pillar += ["--inputs", shared / "data/nuscenes_frame.pcd.bin"]

    def net(name: str) -> list[object]:
        return [networks / f"{name}.onnx", "--inputs", networks / f"{name}.npz"]

    def bisect(name: str, model: list[object], *more: object, limit: float, reference: str = "ort-none") -> Step:
        command = cpdebug("bisect", *model, "-b", f"{reference},trt-fp16", *more, "--json", out / f"{name}.json")
        return Step(name, command, limit)

    made = [
        bisect("pillar", pillar, limit=480, reference="torch"),
        bisect("ppocr-det", net("ppocr-det"), *leveled("ppocr-det"), "--save", work / "ppocr-det", limit=480),
        bisect("vit-no-builds", net("vit"), "--max-builds", 0, limit=150),
        bisect("roi", net("roi"), limit=100),
        bisect("cache-nowhere", net("roi"), "--cache", "/proc/engines", limit=60),
        bisect("timeout", net("products"), "--no-cache", "--build-timeout", 3, limit=60),
        Step(
            "killed", script("kill_runner", work / "killed", *cpdebug("bisect", *net("roi"), "-b", "ort,trt-fp16")), 90
        ),
    ]
    level0 = ["--builder-level", 0, "--probes", "boundaries", "--no-explain", "--no-cache"]
    made.append(bisect("pillar-0", pillar, *level0, "--save", work / "pillar-0", limit=300, reference="torch"))
    for level in (0, 2):
        more = ["--builder-level", level, "--probes", "boundaries", "--no-explain", "--save", work / f"yolo-{level}"]
        made.append(bisect(f"yolo-{level}", net("yolo"), *more, limit=200))
    for name in ("detr", "diffusion", "painter", "convnext_sized", "slim", "slim_aside", "batched", "batched_aside"):
        more = ["--probes", "boundaries", "--no-explain", "--save", work / name]
        made.append(bisect(name, net(name), *more, limit=250))
    for name, level in [("yolov8n-3", 3), *((f"ppocr-det-{n}", n) for n in (1, 2, 3))]:
        more = ["--no-explain", "--cache", work / f"cache-{name}", *(["--builder-level", level] if level != 3 else [])]
        made.append(bisect(name, net(name[:-2]), *more, "--save", work / name, limit=700))
        if level == 3:
            made.append(bisect(f"{name}-again", net(name[:-2]), *more, limit=100))
            more += ["--probes", "boundaries", "--save", work / f"{name}-boundaries"]
            made.append(bisect(f"{name}-boundaries", net(name[:-2]), *more, limit=300))
    more = ["--no-explain", "--no-cache", "--tactic-sources=-JIT_CONVOLUTIONS", "--probes", "boundaries"]
    made.append(bisect("yolov8n-static", net("yolov8n"), *more, "--save", work / "yolov8n-static", limit=500))
    for name in ("plug", "plug_nms", "plug_norm"):
        more = ["--no-cache", WITHOUT_HANDLES]
        made.append(bisect(name.replace("_", "-"), net(name), *more, limit=90, reference="trt-fp32"))
    made.append(bisect("plug-handles", net("plug"), "--no-cache", limit=60, reference="trt-fp32"))
    made += [bisect(name, net(name), "--no-cache", limit=90) for name in ("branch", "loop")]
    kernels = [name.removeprefix("kernels-") for queue in DETECTOR for name in queue if name.startswith("kernels-")]
    for name in [*kernels, *(name for queue in SIZED for name in queue if name != "pillar-0")]:
        files = ["--json", out / f"kernels-{name}.json", "--crops", out / f"crops-{name}.npz"]
        command = script("predicted", work / name, "--device", device, *files)
        made.append(Step(f"kernels-{name}", command, 60, work / name / "result.json"))
    for name in ("segment", "yolo", "odd", "ppocr-cls", "encoder", "orders", "products", "resnet"):
        more = [*leveled(name), "--probes", "boundaries", "--no-explain", "--save", work / name]
        made.append(bisect(name, net(name), *more, limit=300))
    return {step.name: step for step in made}


def leveled(name: str) -> list[object]:
    return ["--builder-level", LEVELS[name]] if name in LEVELS else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--networks", type=Path, required=True)
    parser.add_argument("--shared", type=Path, default=REPO.parent / "shared", help="parity checkpoint and frame")
    parser.add_argument("--work", type=Path, help="for captures and engines  [default: a temporary folder]")
    parser.add_argument("--only", default="", help="beginnings of steps, separated by commas")
    parser.add_argument("--set", choices=[*SETS], default="", help="other queues: SIZED, DETECTOR, PLUGINS")
    parser.add_argument("--device", default="cuda", help="where predicted.py emulates  [default: cuda]")
    parser.add_argument("--budget", type=float, default=530.0, help="seconds in all")
    args = parser.parse_args()
    words = tuple(word for word in args.only.split(",") if word)
    with tempfile.TemporaryDirectory(prefix="visit-") as scratch:
        args.out.mkdir(parents=True, exist_ok=True)
        work = (args.work or Path(scratch)).resolve()
        known = steps(args.out.resolve(), work, args.networks.resolve(), args.shared.resolve(), args.device)
        series = Series(args.out, time.monotonic() + args.budget)
        queues = [[*queue] for queue in SETS[args.set]]
        if args.set == "sized":
            queues = [[each for name in queue for each in (name, f"kernels-{name}")] for queue in queues]
        chosen = [[known[n] for n in queue if n in known and (not words or n.startswith(words))] for queue in queues]
        chosen = [queue for queue in chosen if queue]
        with ThreadPoolExecutor(len(chosen) or 1) as pool:
            list(pool.map(series.experiment, chosen))


if __name__ == "__main__":
    main()
