"""Where a declared precision's divergence comes from: 52 networks, each with one place too much for FP16 or BF16.

Thirteen kinds of trouble (a mean or a constant taken off behind a large offset, positions, sums along an axis, grid
coordinates, distances of near points, …) stand behind four kinds of network. Which layer makes most is known by brute
force: the error of each layer alone is added to the FP32 run, and the rest is computed in FP32 again. Then every fix
that ``bisect`` prints is followed. The last part compares what the shares cost with what both runs cost.

    python benchmarks/declared_costs.py                                      # all of them, 3 minutes on one core
    python benchmarks/declared_costs.py --json docs/data/declared_costs.json  # also write what was found
    python benchmarks/declared_costs.py --device cuda                        # the cost of shares alone, on a GPU
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from cp_debug.backends.arithmetic import ARITHMETICS, FP32
from cp_debug.backends.executor import Executor
from cp_debug.backends.registry import create
from cp_debug.backends.spec import BackendSpec
from cp_debug.bisect import one_sample
from cp_debug.bisect.engine import Options, bisect
from cp_debug.graph.graph import Graph
from cp_debug.programs.pipeline import Pipeline
from tests.nets import NetBuilder

WIDTH = 32
"""Channels between a trunk and its trouble."""
LINEAR = 0.1
"""Divergence below which a network counts as nearly linear."""

Inputs = dict[str, np.ndarray]


def number(net: NetBuilder, value: float | list[float]) -> str:
    """A constant of a network."""
    return net.weight(np.array(value, np.float32))


def linear(net: NetBuilder, x: str, before: int, after: int) -> str:
    """x [..., before] times a weight, with a bias: [..., after]."""
    w = net.weight((net.rng.standard_normal((before, after)) / before**0.5).astype(np.float32))
    return net.op("Add", net.op("MatMul", x, w), net.weight((net.rng.standard_normal(after) / 10).astype(np.float32)))


def mlp(net: NetBuilder, x: str) -> str:
    """Three layers: [8, 32]."""
    for _ in range(3):
        x = net.op("Tanh", linear(net, x, WIDTH, WIDTH))
    return linear(net, x, WIDTH, WIDTH)


def residual(net: NetBuilder, x: str) -> str:
    """Convolutions over [8, 2, 4, 4] with two additions."""
    x = net.conv(net.op("Reshape", x, net.weight(np.array([8, 2, 4, 4]))), 2, 8)
    for _ in range(2):
        x = net.op("Add", x, net.conv(net.op("Relu", net.conv(x, 8, 8)), 8, 8))
    return net.op("Reshape", net.conv(x, 8, 2), net.weight(np.array([8, WIDTH])))


def attention(net: NetBuilder, x: str) -> str:
    """One head over 8 tokens, and a feed-forward part with Gelu by Erf."""
    q, k, v = (linear(net, x, WIDTH, WIDTH) for _ in range(3))
    scores = net.op("Mul", net.op("MatMul", q, net.op("Transpose", k, perm=[1, 0])), number(net, WIDTH**-0.5))
    x = net.op("Add", x, net.op("MatMul", net.op("Softmax", scores, axis=-1), v))
    y = linear(net, x, WIDTH, WIDTH)
    gate = net.op("Add", net.op("Erf", net.op("Div", y, number(net, 2**0.5))), number(net, 1))
    return linear(net, net.op("Mul", net.op("Mul", y, gate), number(net, 0.5)), WIDTH, WIDTH)


def gated(net: NetBuilder, x: str) -> str:
    """Gates of sigmoids, and a normalization."""
    for _ in range(2):
        x = net.op("Mul", linear(net, x, WIDTH, WIDTH), net.op("Sigmoid", linear(net, x, WIDTH, WIDTH)))
        scale, bias = net.weight(np.ones(WIDTH, np.float32)), net.weight(np.zeros(WIDTH, np.float32))
        x = net.op("LayerNormalization", x, scale, bias, axis=-1)
    return x


TRUNKS: dict[str, Callable[[NetBuilder, str], str]] = {f.__name__: f for f in (mlp, residual, attention, gated)}


def mean_off(net: NetBuilder, x: str) -> str:
    """A mean taken off behind + 1000."""
    x = net.op("Add", x, number(net, 1000), name="trouble")
    return net.op("Sub", x, net.op("ReduceMean", x, axes=[-1], name="trouble_mean"))


def constant_off(net: NetBuilder, x: str) -> str:
    """− 600 behind + 600."""
    return net.op("Sub", net.op("Add", x, number(net, 600), name="trouble"), number(net, 600))


def positions(net: NetBuilder, x: str) -> str:
    """Angles of positions of 3000 and more, for a rotation."""
    frequency = net.weight((10000.0 ** -np.linspace(0, 1, WIDTH)).astype(np.float32)[None])
    angle = net.op("Mul", net.op("Cast", "positions", to=1, name="trouble_cast"), frequency, name="trouble")
    return net.op("Add", net.op("Mul", x, net.op("Cos", angle)), net.op("Sin", angle))


def running_sum(net: NetBuilder, x: str) -> str:
    """A phase that is summed up, for a sine."""
    steps = net.op("Mul", net.op("Sigmoid", x), number(net, 40))
    return net.op("Sin", net.op("CumSum", steps, net.weight(np.array(1)), name="trouble"))


def variance(net: NetBuilder, x: str) -> str:
    """E[x²] − E[x]², of data far from 0."""
    x = net.op("Add", x, number(net, 12), name="trouble_shift")
    square = net.op("ReduceMean", net.op("Mul", x, x, name="trouble_square"), axes=[-1], name="trouble_mean")
    mean = net.op("ReduceMean", x, axes=[-1], name="trouble_other_mean")
    spread = net.op("Sub", square, net.op("Mul", mean, mean, name="trouble_product"), name="trouble")
    return net.op("Div", x, net.op("Sqrt", net.op("Abs", spread)))


def logits(net: NetBuilder, x: str) -> str:
    """Large logits of a softmax."""
    return net.op("Softmax", net.op("Add", net.op("Mul", x, number(net, 4)), number(net, 700), name="trouble"), axis=-1)


def near_one(net: NetBuilder, x: str) -> str:
    """exp(x ÷ 100) − 1."""
    return net.op("Sub", net.op("Exp", net.op("Div", x, number(net, 100)), name="trouble"), number(net, 1))


def log_of_near_one(net: NetBuilder, x: str) -> str:
    """log(1 + x ÷ 100)."""
    return net.op("Log", net.op("Add", net.op("Div", x, number(net, 100)), number(net, 1), name="trouble"))


def window_sum(net: NetBuilder, x: str) -> str:
    """Sums of windows as differences of a running sum."""
    total = net.op("CumSum", net.op("Add", x, number(net, 30)), net.weight(np.array(1)), name="trouble")
    ends = [net.weight(np.array([n])) for n in (3, WIDTH, 0, WIDTH - 3, 1)]
    return net.op(
        "Sub",
        net.op("Slice", total, ends[0], ends[1], ends[4]),
        net.op("Slice", total, ends[2], ends[3], ends[4]),
    )


def instance_norm(net: NetBuilder, x: str) -> str:
    """An instance normalization behind + 800."""
    x = net.op("Add", x, number(net, 800), name="trouble")
    x = net.op("Reshape", x, net.weight(np.array([1, 8, WIDTH])))
    ones, zeros = net.weight(np.ones(8, np.float32)), net.weight(np.zeros(8, np.float32))
    return net.op("Reshape", net.op("InstanceNormalization", x, ones, zeros), net.weight(np.array([8, WIDTH])))


def distances(net: NetBuilder, x: str) -> str:
    """Squared distances of rows by |a|² + |b|² − 2ab, of rows far from 0."""
    x = net.op("Add", x, number(net, 6), name="trouble_shift")
    squares = net.op("ReduceSumSquare", x, axes=[-1], name="trouble_squares")
    both = net.op("Add", squares, net.op("Transpose", squares, perm=[1, 0]), name="trouble")
    product = net.op("MatMul", x, net.op("Transpose", x, perm=[1, 0]), name="trouble_product")
    return net.op("Sub", both, net.op("Mul", product, number(net, 2), name="trouble_twice"))


def coordinates(net: NetBuilder, x: str) -> str:
    """A wide picture sampled at computed places."""
    picture = net.weight(net.rng.standard_normal((1, 1, 1, 2000)).astype(np.float32))
    place = net.op("Reshape", net.op("Tanh", x, name="trouble"), net.weight(np.array([1, 8, WIDTH, 1])))
    grid = net.op("Concat", place, net.op("Mul", place, number(net, 0)), axis=-1)
    sampled = net.op("GridSample", picture, grid, align_corners=1)
    return net.op("Reshape", sampled, net.weight(np.array([8, WIDTH])))


def halves(net: NetBuilder, x: str) -> str:
    """(x + 20)² − (x² + 400)."""
    shifted = net.op("Add", x, number(net, 20), name="trouble_shift")
    square = net.op("Mul", shifted, shifted, name="trouble")
    return net.op("Sub", square, net.op("Add", net.op("Mul", x, x), number(net, 400), name="trouble_other"))


TROUBLES: dict[str, Callable[[NetBuilder, str], str]] = {
    f.__name__: f
    for f in (
        *(mean_off, constant_off, positions, running_sum, variance, logits, near_one, log_of_near_one, window_sum),
        *(instance_norm, distances, coordinates, halves),
    )
}


def network(trunk: str, trouble: str, seed: int, folder: Path) -> Path:
    """The file of one network, with its inputs beside it as ``.npz``."""
    net = NetBuilder(seed)
    value = TROUBLES[trouble](net, TRUNKS[trunk](net, "x"))
    width = {"window_sum": WIDTH - 3, "distances": 8}.get(trouble, WIDTH)
    net.op("MatMul", value, net.weight((net.rng.standard_normal((width, 4)) / 4).astype(np.float32)), name="y")
    inputs: Inputs = {"x": net.rng.standard_normal((8, WIDTH)).astype(np.float32)}
    declared: dict[str, Any] = {"x": (1, [8, WIDTH])}
    if trouble == "positions":
        inputs["positions"] = 3000 + 7 * np.arange(8)[:, None]
        declared["positions"] = (7, [8, 1])
    path = folder / f"{trunk}-{trouble}.onnx"
    np.savez(path.with_suffix(".npz"), **inputs)  # type: ignore[arg-type]
    return net.save(path, declared, ["y"])


def alone(path: Path, precision: str) -> dict[str, float]:
    """Node → relative L2 change of the output by its own error alone, everything else in FP32."""
    graph = Graph(path)
    with np.load(path.with_suffix(".npz")) as loaded:
        inputs = dict(loaded)
    exactly, low = Executor(graph, FP32), Executor(graph, ARITHMETICS[precision])
    exact: dict[str, Any] = {}
    rounded: dict[str, Any] = {}
    exactly.run(inputs, exact.__setitem__)
    low.run(inputs, rounded.__setitem__)
    given = {name: torch.from_numpy(array) for name, array in inputs.items()}
    right = exact["y"]
    found: dict[str, float] = {}
    for node in graph.nodes:
        (value,) = node.outputs
        if not exact[value].is_floating_point():
            continue
        own = exactly.run_nodes([node], {**given, **rounded}, [value])[value]
        nodes, starts = graph.segment(["y"], {n for n in exact if graph.producer[n].index <= node.index})
        changed = {**given, **exact, value: exact[value] + (rounded[value] - own)}
        output = changed["y"] if value == "y" else exactly.run_nodes(nodes, {s: changed[s] for s in starts}, ["y"])["y"]
        found[node.name] = float((output - right).norm() / right.norm())
    return found


def judge(path: Path, precision: str) -> dict[str, Any]:
    """What is said of one network, beside the truth, and what following it gives."""
    options = Options(inputs=path.with_suffix(".npz"))
    (test,) = bisect(str(path), f"ort,emu-{precision}", options=options).tests
    effects = alone(path, precision)
    ranked = sorted((row for row in test.rows if row.share is not None), key=lambda row: -(row.share or 0.0))
    first = ranked[0].name if ranked else ""
    found = {
        "network": path.stem,
        "precision": precision,
        "divergence": test.outputs[0].stats.rel_l2,
        "guilty": [row.name for row in test.guilty],
        "most": max(effects, key=effects.__getitem__),
        "named": first,
        "right": effects.get(first, 0.0) >= 0.8 * max(effects.values()),
        "sum": test.attribution and test.attribution.layers + (test.attribution.reference or 0.0),
        "carried": len(test.attribution.carried) if test.attribution else 0,
        "says": [finding.says for finding in test.findings],
        "fix": [finding.fix for finding in test.findings],
    }
    for finding in test.findings:
        if "keep_fp32" not in finding.evidence:
            continue
        backend: Any = create(BackendSpec.parse(f"emu-{precision}"))
        sides = [create(BackendSpec.parse("ort")), backend.keeping(finding.evidence["keep_fp32"])]
        (after,) = bisect(str(path), sides, options=options).tests
        found |= {"promised": finding.evidence["after"], "followed": after.outputs[0].stats.rel_l2}
    return found


SIDES = {
    "cpu": ("ort,emu-fp16", "ort,emu-bf16", "ort,emu-tf32", "ort,ort-all"),
    "cuda": tuple(f"torch@cuda,emu-{precision}@cuda" for precision in ("fp16", "bf16", "tf32")),
}
"""Device → what is compared for the cost of shares, which are computed on the test's device."""


def costs(folder: Path, device: str = "cpu") -> list[dict[str, Any]]:
    """Seconds of both runs and of the shares, on a network of convolutions; the second of two bisects counts."""
    net = NetBuilder(0)
    value = net.conv("x", 3, 64, k=7, stride=2)
    for _ in range(6):
        value = net.op("Relu", net.op("Add", value, net.conv(net.op("Relu", net.conv(value, 64, 64)), 64, 64)))
    net.op("GlobalAveragePool", value, name="y")
    path = net.save(folder / "convolutions.onnx", {"x": (1, [1, 3, 224, 224])}, ["y"])
    np.savez(path.with_suffix(".npz"), x=net.rng.standard_normal((1, 3, 224, 224)).astype(np.float32))
    found = []
    for sides in SIDES[device]:
        seconds: dict[str, float] = {}
        originals = one_sample.set_shares, Pipeline.run

        def timed(name: str, function: Callable[..., Any], seconds: dict[str, float] = seconds) -> Callable[..., Any]:
            def run(*given: Any, **named: Any) -> Any:
                begun = time.perf_counter()
                try:
                    return function(*given, **named)
                finally:
                    seconds.setdefault(name, 0.0)
                    seconds[name] += time.perf_counter() - begun

            return run

        try:
            one_sample.set_shares = timed("shares", originals[0])
            Pipeline.run = timed("runs", originals[1])  # type: ignore[method-assign]
            for _ in range(2):
                seconds.clear()
                begun = time.perf_counter()
                bisect(str(path), sides, options=Options(inputs=path.with_suffix(".npz")))
                seconds["bisect"] = time.perf_counter() - begun
        finally:
            one_sample.set_shares, Pipeline.run = originals  # type: ignore[method-assign]
        found.append({"backends": sides, **{name: round(value, 3) for name, value in seconds.items()}})
    return found


def summary(networks: list[dict[str, Any]]) -> dict[str, Any]:
    """The figures of all networks together."""
    linear = [n for n in networks if n["divergence"] < LINEAR and n["sum"] is not None]
    tried = [n for n in networks if "followed" in n]
    return {
        "networks": len(networks),
        "first_right": sum(n["right"] for n in networks),
        "nearly_linear": len(linear),
        "add_up": sum(0.9 <= n["sum"] <= 1.1 for n in linear),
        "fixes": len(tried),
        "fixes_hold": sum(n["promised"] / 2 <= n["followed"] <= 2 * n["promised"] for n in tried),
        "without_fix": sum(any(fix.startswith("no fix") for fix in n["fix"]) for n in networks),
    }


def main() -> None:
    """Judge all networks and print what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write what was found here")
    parser.add_argument("--only", default="", help="networks whose name holds this")
    parser.add_argument("--device", choices=SIDES, default="cpu", help="where the cost is measured; cuda: that alone")
    options = parser.parse_args()
    torch.set_num_threads(1)
    networks = []
    with tempfile.TemporaryDirectory() as scratch:
        for place, (trunk, trouble) in enumerate((t, p) for p in TROUBLES for t in TRUNKS):
            if options.device != "cpu" or options.only not in f"{trunk}-{trouble}":
                continue
            precision = "bf16" if place % 4 == 3 else "fp16"
            found = judge(network(trunk, trouble, place, Path(scratch)), precision)
            networks.append(found)
            mark = "✓" if found["right"] else "✗"
            kept = f"; kept {found['promised']:.2g}, {found['followed']:.2g} followed" if "followed" in found else ""
            said = f"{found['named']} (most: {found['most']}), sum {found['sum']:.3f}{kept}"
            print(f"{mark} {found['network']} {precision}: {found['divergence']:.2g}, {said}")
        seconds = [] if options.only else costs(Path(scratch), options.device)
    if networks:
        print(json.dumps(summary(networks)))
    for cost in seconds:
        print(cost)
    if options.json:
        document = {
            "command": "python benchmarks/declared_costs.py"
            + f" --device {options.device}" * (options.device != "cpu"),
            "torch": torch.__version__,
            "summary": summary(networks) if networks else None,
            "costs": seconds,
            "networks": networks,
        }
        options.json.write_text(json.dumps(document, indent=0, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
