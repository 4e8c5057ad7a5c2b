"""Experiments for a machine with a GPU: predictions scored against engines, and what a region costs.

    CPDEBUG_TRT_PYTHON=PATH python benchmarks/predict_experiments.py OUT --networks FOLDER [--shared FOLDER]

``FOLDER`` holds ``vit.onnx`` and ``products.onnx`` with their ``.npz`` (``engine_networks.py`` makes them) and the
networks that are scored. Predictions run on the CPU beside the engines, of which they know nothing. Steps are in order
of priority: what comes after ``--budget`` is left out. ``OUT`` is written as ``gpu_experiments.py`` does it; ``--only``
takes beginnings of steps.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from gpu_experiments import REPO, Series, Step, bundled, cpdebug, script

SCORED = ("resnet.torchscript", "unet.torchscript", "detr.torchscript", "ppocr-det")
"""A residual network, a U-Net, a transformer and a trained text detector: none was used to build the predictions."""


def steps(out: Path, work: Path, networks: Path, shared: Path) -> tuple[list[Step], list[Step]]:
    """What builds engines, one after the other, and what runs beside it."""
    pillar = ["centerpoint:nus-pillar02", "--checkpoint", shared / "parity/state_dict_overfit.pt"]
    pillar += ["--inputs", shared / "data/nuscenes_frame.pcd.bin"]

    def net(name: str) -> list[object]:
        return [networks / f"{name}.onnx", "--inputs", networks / f"{name}.npz"]

    def bisect(name: str, model: list[object], *more: object, limit: float, reference: str = "ort-none") -> Step:
        to = ["--json", out / f"{name}.json", "--save", work / name]
        return Step(name, cpdebug("bisect", *model, "-b", f"{reference},trt-fp16", *more, *to), limit)

    def predicted(name: str, model: list[object], *more: object) -> Step:
        to = ["--json", out / f"predicted-{name}.json"]
        return Step(f"predicted-{name}", cpdebug("predict", *model, "--target", "trt-8.6", *more, *to), 240)

    def scored(name: str) -> Step:
        to = ["--json", out / f"score-{name}.json"]
        return Step(
            f"score-{name}",
            script("predict_score", out / f"predicted-{name}.json", out / f"{name}.json", *to),
            30,
            needs=out / f"predicted-{name}.json",
        )

    def fitted(name: str) -> Step:
        to = ["--device", "cuda", "--json", out / f"kernels-{name}.json"]
        return Step(f"kernels-{name}", script("predicted", work / name, *to), 60, needs=work / name / "result.json")

    vit = net("vit")
    engines = [
        bisect("vit", vit, limit=200),
        bisect("vit-again", vit, limit=120),
        *bundled("vit-bundle", work / "vit", work, "trt-fp16"),
    ]
    for name in SCORED:
        more = ["--builder-level", 2, "--build-timeout", 170] if name == "ppocr-det" else []
        engines += [bisect(name, net(name), *more, limit=200), scored(name), fitted(name)]
    engines += [
        bisect("pillar", pillar, limit=240, reference="torch"),
        scored("pillar"),
        bisect("products", net("products"), limit=120),
        fitted("products"),
        bisect("timeout", net("products"), "--no-cache", "--build-timeout", 3, limit=60),
        bisect("resnet-again", net(SCORED[0]), limit=60),
    ]
    beside = [predicted(name, net(name)) for name in SCORED]
    return engines, [predicted("pillar", pillar), *beside]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--networks", type=Path, required=True)
    parser.add_argument("--shared", type=Path, default=REPO.parent / "shared", help="parity checkpoint and frame")
    parser.add_argument("--work", type=Path, help="for captures and engines  [default: a temporary folder]")
    parser.add_argument("--only", default="", help="beginnings of steps, separated by commas")
    parser.add_argument("--budget", type=float, default=530.0, help="seconds in all")
    args = parser.parse_args()
    words = tuple(word for word in args.only.split(",") if word)
    with tempfile.TemporaryDirectory(prefix="visit-") as scratch:
        args.out.mkdir(parents=True, exist_ok=True)
        work = (args.work or Path(scratch)).resolve()
        queues = steps(args.out.resolve(), work, args.networks.resolve(), args.shared.resolve())
        series = Series(args.out, time.monotonic() + args.budget)
        chosen = [[step for step in queue if not words or step.name.startswith(words)] for queue in queues]
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(series.experiment, chosen))


if __name__ == "__main__":
    main()
