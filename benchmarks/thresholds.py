"""Excess of healthy layers where it is largest: long sums, activations far from 1. ``docs/thresholds.md`` has a run.

ONNX Runtime without optimization against the FP64 oracle, one operator a network. ``expected`` is in unit roundoffs of
FP32 (2⁻²⁴); where it goes beyond what the emulation introduces, other orders of summation were asked.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from random_graphs import NetBuilder
from rich.console import Console
from rich.table import Table

from cp_debug.bisect.engine import Options, bisect

Make = Callable[[NetBuilder], str]
ACTIVATIONS = ("Sigmoid", "Tanh", "Erf", "Exp", "Softplus", "Elu", "Selu", "Celu", "Sqrt", "Log", "Reciprocal", "Sin")


def cases() -> Iterator[tuple[str, Make, np.ndarray]]:
    """(what it is, its network, its input ``x``)."""
    rng = np.random.default_rng(0)
    for terms in (64, 1024, 8192, 65536):
        for sign in ("both signs", "one sign"):
            x = rng.standard_normal((16, terms)).astype(np.float32)
            x = np.abs(x) if sign == "one sign" else x
            tag = f"K = {terms}, {sign}"
            yield f"MatMul {tag}", lambda net, x=x: net.op("MatMul", "x", net.weight(x.T.copy())), x
            yield f"ReduceMean {tag}", lambda net: net.op("ReduceMean", "x", axes=[1]), x
            yield f"ReduceSum {tag}, first axis", lambda net: net.op("ReduceSum", "x", net.weight(np.array([0]))), x.T
            yield f"Softmax {tag}", lambda net: net.op("Softmax", "x", axis=-1), x
            ones = np.ones(terms, np.float32)
            yield f"LayerNormalization {tag}", lambda net, w=ones: net.op("LayerNormalization", "x", net.weight(w)), x
    for channels in (64, 1024):
        for sign in (1, 0):
            x, w = (rng.standard_normal(s).astype(np.float32) for s in ((1, channels, 16, 16), (32, channels, 3, 3)))
            x, w = (np.abs(x), np.abs(w)) if sign else (x, w)
            tag = f"K = {9 * channels}, {'one sign' if sign else 'both signs'}"
            yield f"Conv {tag}", lambda net, w=w: net.op("Conv", "x", net.weight(w), pads=[1] * 4), x
    for op in ACTIVATIONS:
        for scale in (1e-3, 1.0, 10.0):
            x = (rng.standard_normal((64, 256)) * scale).astype(np.float32)
            x = np.abs(x) + np.float32(1e-6) if op in ("Sqrt", "Log", "Reciprocal") else x
            yield f"{op} at {scale:g}", lambda net, op=op: net.op(op, "x"), x


def main() -> None:
    """Print one row a case."""
    table = Table("layer", "expected / u", "excess", box=None)
    with tempfile.TemporaryDirectory() as name:
        for tag, make, x in cases():
            net = NetBuilder()
            path = net.save(Path(name) / "net.onnx", {"x": (1, list(x.shape))}, [make(net)])
            np.savez(inputs := Path(name) / "x.npz", x=np.ascontiguousarray(x))
            replay = bisect(str(path), "ort,ort-none", options=Options(inputs=inputs)).tests[0].rows[-1].replay
            assert replay is not None
            assert replay.expected is not None
            table.add_row(tag, f"{replay.expected * 2**24:.2f}", f"{replay.excess:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
