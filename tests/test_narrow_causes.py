"""Causes of errors in FP8 and 4 bits: departures from what is declared, scales, and declarations that do not fit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nets import NetBuilder
from test_executor import graph, random

from cp_debug.backends.arithmetic import ARITHMETICS, Arithmetic
from cp_debug.backends.base import Program, Session
from cp_debug.backends.emulated import EmulatedBackend, ExecutorSession
from cp_debug.backends.executor import Executor
from cp_debug.backends.narrow_options import NarrowOptions
from cp_debug.backends.registry import create
from cp_debug.backends.scaling import E4M3, FixedScaling
from cp_debug.backends.spec import BackendSpec
from cp_debug.bisect.causes.narrow import misfit
from cp_debug.bisect.engine import bisect
from cp_debug.bisect.narrow_variants import variants
from cp_debug.bisect.options import Options
from cp_debug.bisect.replay import Replayer
from cp_debug.bisect.result import TestResult
from cp_debug.graph.graph import Graph
from cp_debug.reports.verdict_line import verdict_line

NET = "g (float[12,256] x) => (float[12,40] y) { m = MatMul(x, w)  y = Add(m, b) }"


class Departing(EmulatedBackend):
    """Claims what its spec says; computes ``m`` in another arithmetic."""

    def __init__(self, spec: str, computed: Arithmetic) -> None:
        super().__init__(BackendSpec.parse(spec))
        self._computed = computed

    def open(self, program: Program) -> Session:
        node = program.graph.producer["m"].name
        return ExecutorSession(program.graph, self.arithmetic, self.device, overrides={node: self._computed})


def judged(
    folder: Path, claim: str, computed: Arithmetic | None, x: np.ndarray, w: np.ndarray
) -> tuple[TestResult, dict[str, Any]]:
    """A bisect of one product, and its findings by cause."""
    net = graph(folder, NET, {"w": w, "b": random(40, seed=3)})
    np.savez(folder / "x.npz", x=x)
    backend = create(BackendSpec.parse(f"emu-{claim}")) if computed is None else Departing(f"emu-{claim}", computed)
    options = Options(inputs=folder / "x.npz")
    test = bisect(str(net.path), [create(BackendSpec.parse("emu-fp32")), backend], options=options).tests[0]
    return test, {finding.cause: finding for finding in test.findings}


def fixed(scale: float, claim: str = "fp8", *, saturates: bool = True) -> Arithmetic:
    return Arithmetic(claim, scaling=FixedScaling(NarrowOptions.parse(claim), (scale, None), saturates))


X, W = random(12, 256, seed=1), random(256, 40, seed=2)
FITS = float(np.abs(X).max()) / 448


@pytest.mark.parametrize(
    ("claim", "computed", "cause"),
    [
        ("fp8", "fp8:acc=10-bit", "fp8-accumulation"),
        ("mxfp8", "mxfp8:acc=10-bit", "fp8-accumulation"),
        ("fp8", "fp8:e5m2", "fp8-element"),
        ("int4:g32", "int4", "int4-group"),
    ],
)
def test_a_layer_that_computes_otherwise_than_declared_is_named(
    tmp_path: Path, claim: str, computed: str, cause: str
) -> None:
    test, findings = judged(tmp_path, claim, ARITHMETICS[computed], X, W)
    assert [row.onnx for row in test.guilty] == ["m"]
    assert test.guilty[0].replay is not None
    assert test.guilty[0].replay.computed_in == computed
    assert list(findings) == [cause]
    assert findings[cause].explained == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("computed", ["fp8", "nvfp4"])
def test_a_narrow_type_under_a_wider_claim_is_named(tmp_path: Path, computed: str) -> None:
    test, findings = judged(tmp_path, "bf16", ARITHMETICS[computed], X, W)
    assert [row.onnx for row in test.guilty] == ["m"]
    assert list(findings) == [computed]


@pytest.mark.few(2)
@pytest.mark.parametrize(
    ("computed", "factor", "cause", "scale"),
    [
        (fixed(1.0), 5e4, "fp8-saturated", 1.0),
        (fixed(1.0), 2e-5, "fp8-underflow", 1.0),
        (fixed(FITS / 20), 1.0, "scale-stale", FITS / 20),
        (fixed(FITS * 6e4), 1.0, "scale-stale", FITS * 6e4),
    ],
)
def test_a_scale_that_is_not_that_of_the_data_is_found(
    tmp_path: Path, computed: Arithmetic, factor: float, cause: str, scale: float
) -> None:
    """Out of sample: each half of the outputs is predicted with the scale that the other half tells."""
    test, findings = judged(tmp_path, "fp8", computed, X * np.float32(factor), W)
    assert [row.onnx for row in test.guilty] == ["m"]
    assert list(findings) == [cause]
    assert findings[cause].evidence["scale"] == pytest.approx(scale, rel=0.01)
    assert findings[cause].explained > 0.9


def test_a_plain_cast_to_e4m3_makes_nan(tmp_path: Path) -> None:
    x = X.copy()
    x[3, 5] = 700.0
    test, findings = judged(tmp_path, "fp8", fixed(1.0, saturates=False), x, W)
    assert [row.onnx for row in test.guilty] == ["m"]
    assert list(findings) == ["fp8-saturated"]
    assert "has no Inf" in findings["fp8-saturated"].says


def hot(count: int, factor: float, start: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Data and weights, some channels of which are larger and smaller by a factor: the product stays."""
    factors = np.ones(256, np.float32)
    chosen = np.random.default_rng(5).permutation(256)[:count] if start is None else np.arange(start, start + count)
    factors[chosen] = factor
    return X * factors, W / factors[:, None]


SPIKED = W * np.where(np.random.default_rng(4).random(W.shape) < 0.01, 20, 1).astype(np.float32)


@pytest.mark.parametrize(
    ("claim", "treated", "cause"),
    [
        ("fp8", hot(128, 1e5, 0), "block-scale"),
        ("fp8:block", hot(64, 5e5), "fp8-underflow"),
        ("mxfp4", hot(8, 60.0), "fp4-outlier"),
        ("mxfp4", hot(4, 60.0, 0), "fp4-outlier"),  # in one block, where they could hide each other
        ("nvfp4", hot(2, 60.0, 0), "fp4-outlier"),
        ("int4:g128", hot(8, 60.0), "int4-outlier"),
        ("int4:g256", (X, SPIKED), "int4-group"),
        ("fp8:acc=9-bit", (abs(X), abs(W)), "fp8-accumulation"),
    ],
)
def test_a_declaration_that_does_not_fit_the_numbers(
    tmp_path: Path, claim: str, treated: tuple[np.ndarray, np.ndarray], cause: str
) -> None:
    test, findings = judged(tmp_path, claim, None, *treated)
    assert not test.guilty
    assert cause in findings
    finding = findings[cause]
    assert finding.evidence["declared"] is True
    assert finding.evidence["error_then"] * 1.6 <= finding.evidence["error_as_declared"]
    assert "m" in finding.fix


def test_the_last_line_tells_that_another_declaration_loses_less(tmp_path: Path) -> None:
    test, _ = judged(tmp_path, "mxfp4", None, *hot(20, 1e3))
    assert not test.agrees
    assert verdict_line(test).plain.endswith(", but 1 layer would lose less with a better declaration (fp4-outlier)")


@pytest.mark.parametrize("claim", ["fp8", "fp8:block", "mxfp8", "mxfp4", "nvfp4", "int4"])
def test_numbers_that_fit_their_format_have_no_finding(tmp_path: Path, claim: str) -> None:
    test, findings = judged(tmp_path, claim, None, X, W)
    assert not test.guilty
    assert not findings.keys() & {
        "block-scale",
        "fp8-underflow",
        "fp4-outlier",
        "int4-group",
        "int4-outlier",
        "fp8-accumulation",
    }


def test_scales_of_calibration_are_no_fault(tmp_path: Path) -> None:
    test, findings = judged(tmp_path, "fp8", fixed(FITS * 1.4), X, W)
    assert not test.guilty
    assert not findings


def test_nan_that_a_scale_spreads_is_nobodys_fault(tmp_path: Path) -> None:
    """The scale of a tensor with a NaN is NaN: all of the product is, where the oracle has one row of it."""
    net = graph(tmp_path, "g (float[4,64] x) => (float[4,8] y) { h = Log(x)  y = MatMul(h, w) }", {"w": random(64, 8)})
    x = np.abs(random(4, 64)) + 0.1
    x[2, 3] = -1.0
    np.savez(tmp_path / "x.npz", x=x)

    class Own(EmulatedBackend):
        """As its spec says, and judged by replay."""

    backends = [create(BackendSpec.parse("emu-fp32")), Own(BackendSpec.parse("emu-fp8"))]
    test = bisect(str(net.path), backends, options=Options(inputs=tmp_path / "x.npz")).tests[0]
    assert not test.guilty


def test_variants_are_worse_than_what_is_declared() -> None:
    options = NarrowOptions.parse("fp8:block:acc=fp22:promote=128")
    found = {str(other): cause for cause, other in variants(options)}
    assert found["fp8:channel:acc=fp22:promote=128"] == "block-scale"
    assert found["fp8:block:acc=fp22"] == "fp8-accumulation"
    assert str(options) not in found
    assert str(replace(options, significant=None, promote=None)) not in found


def test_weights_in_int4_by_an_override_are_encoded(tmp_path: Path) -> None:
    net = graph(tmp_path, NET, {"w": W, "b": random(40, seed=3)})
    given: Mapping[str, torch.Tensor] = {"x": torch.from_numpy(X)}
    whole = Executor(net, ARITHMETICS["int4"]).run(given)["y"]
    alone = Executor(net, overrides={net.producer["m"].name: ARITHMETICS["int4"]}).run(given)["y"]
    np.testing.assert_array_equal(alone.numpy(), whole.numpy())


@pytest.mark.parametrize(
    ("scale", "cause", "what"),
    [
        (1.0, "fp8-saturated", "25.00% of it are clipped at 448"),
        (0.5, "scale-stale", "50.00% of it are clipped at 224"),
        (4.0, "scale-stale", "25.00% of it lie below 0.0625, where bits are lost"),
    ],
)
def test_a_scale_that_is_not_that_of_its_data_is_told_with_what_it_costs(scale: float, cause: str, what: str) -> None:
    """E4M3 ends at 448, its normal numbers begin at 1/64."""
    x = torch.tensor([0.05, 10.0, 304.0, 900.0])
    name, says, evidence = misfit(x, E4M3, scale)
    assert name == cause
    meant = f"the scale {scale:.3g} of its data is for numbers up to {scale * 448:.4g}, but they reach 900"
    assert says == (
        f"its data is cast to E4M3 without a scale (it reaches 900): {what}" if scale == 1 else f"{meant}: {what}"
    )
    assert evidence["needed_scale"] == pytest.approx(900 / 448)
    assert evidence["clipped"] == (0.5 if scale < 1 else 0.25 if scale == 1 else 0.0)
    assert evidence["below_normal"] == (0.25 if scale == 4 else 0.0)


def test_departures_are_looked_for_from_narrow_precisions_only(tmp_path: Path) -> None:
    net = NetBuilder()
    net.op("Relu", "x", name="y")
    graph = Graph(net.save(tmp_path / "n.onnx", {"x": (1, [2])}, ["y"]))
    claims = ("fp32", "fp16", "fp8", "mxfp4")
    replayers = [Replayer(graph, ("fp32", claim), "fp32", graph.values) for claim in claims]
    assert [replayer._departures is not None for replayer in replayers] == [False, False, True, True]
