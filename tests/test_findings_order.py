"""Findings of small networks whose effects are known: which comes first, of which sample, what they do to the end."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from faults import edits
from faults.edits import Editor
from nets import NetBuilder

from cp_debug.backends.base import Program
from cp_debug.backends.ort_backend import OrtBackend, OrtSession
from cp_debug.backends.registry import create
from cp_debug.backends.spec import BackendSpec
from cp_debug.bisect.causes import declared
from cp_debug.bisect.causes.effects import Effects
from cp_debug.bisect.causes.findings import Explainer, _node_names, _unexplained
from cp_debug.bisect.engine import Options, bisect
from cp_debug.bisect.regions.region import Region
from cp_debug.bisect.result import LayerRow, TestResult
from cp_debug.graph.graph import Graph
from cp_debug.probes.capture import Capture
from cp_debug.probes.statistics import compare
from cp_debug.programs.pipeline import Key
from cp_debug.safe_text import some

X = np.linspace(1, 2, 256, dtype=np.float32).reshape(1, 256)


def times(net: NetBuilder, value: str, factor: float, name: str) -> str:
    return net.op("Mul", value, net.weight(np.array(factor, np.float32)), name=name)


def judged(path: Path, spoil: Callable[[Editor], None], *samples: np.ndarray) -> TestResult:
    editor = Editor(path)
    spoil(editor)
    other = editor.save(path.with_suffix(".spoilt.onnx"))
    folder = path.with_suffix(".inputs")
    folder.mkdir()
    for i, x in enumerate(samples or (X,)):
        np.savez(folder / f"{i}.npz", x=x)
    return bisect(
        str(path), "ort,ort-none", test_model=other, options=Options(inputs=folder, samples=len(samples) or 1)
    ).tests[0]


def test_the_finding_with_the_largest_effect_comes_first_whichever_is_the_worse_layer(tmp_path: Path) -> None:
    """1000x + x: one per cent of the first part is ten times a hundred per cent of the second."""
    net = NetBuilder()
    net.op("Add", times(net, "x", 1000, "large"), times(net, "x", 1, "small"), name="y")
    path = net.save(tmp_path / "net.onnx", {"x": (1, [1, 256])}, ["y"])

    def spoil(editor: Editor) -> None:
        edits.scale(editor, "large", 0.01)
        edits.scale_weights(editor, "small", 1.0)

    found = judged(path, spoil)
    assert {row.onnx: row.replay and row.replay.introduced for row in found.guilty} == {
        "large": pytest.approx(0.01, rel=1e-3),
        "small": pytest.approx(1, rel=1e-3),
    }
    assert [(f.layers, f.effect.share) for f in found.findings] == [
        (["node_large"], pytest.approx(10 / 11, rel=1e-3)),
        (["node_small"], pytest.approx(1 / 11, rel=1e-3)),
    ]


class Spoilt(OrtBackend):
    """ONNX Runtime whose results are changed on their way out, by name."""

    def __init__(self, changes: Mapping[str, Callable[[np.ndarray], np.ndarray]]) -> None:
        super().__init__(BackendSpec.parse("ort-none"))
        self._changes = changes

    def with_threads(self, count: int | None) -> Spoilt:
        return self

    def open(self, program: Program) -> OrtSession:
        session = super().open(program)
        real, changes = session.run, self._changes

        def run(inputs: Any, sink: Any = None, probes: Any = None) -> dict[str, Any]:
            def shown(name: str, value: Any) -> None:
                sink(name, changes.get(name, np.asarray)(np.asarray(value)))

            outputs = real(inputs, shown if sink else None, probes)
            return {name: changes.get(name, np.asarray)(np.asarray(value)) for name, value in outputs.items()}

        session.run = run  # type: ignore[method-assign]
        return session


def chain(folder: Path) -> Path:
    net = NetBuilder()
    net.op("Neg", net.op("Neg", net.op("Relu", "x", name="r"), name="first"), name="second")
    path = net.save(folder / "net.onnx", {"x": (1, [1, 256])}, ["second"])
    np.savez(folder / "x.npz", x=X)
    return path


def test_what_two_layers_have_in_common_is_told_with_the_least_that_it_explains(tmp_path: Path) -> None:
    """Both results are 2 % too large; in the second one 0.3 % of that are noise."""
    noise = np.random.default_rng(0).standard_normal(256) * 0.003 * 0.02
    spoilt = Spoilt(
        {
            "first": lambda value: (value * 1.02).astype(np.float32),
            "second": lambda value: (value * 1.02 * (1.02 + noise)).astype(np.float32),
        }
    )
    backends = [create(BackendSpec.parse("ort")), spoilt]
    (finding,) = bisect(str(chain(tmp_path)), backends, options=Options(inputs=tmp_path / "x.npz")).tests[0].findings
    assert sorted(finding.layers) == ["node_first", "node_second"]
    assert finding.evidence["explained_least"] == pytest.approx(0.997, abs=5e-4)
    assert finding.explained == pytest.approx(0.9985, abs=5e-4)


def test_findings_are_those_of_the_worst_sample(tmp_path: Path) -> None:
    """Zeros hide a wrong factor: nothing is found in them, before the other sample or behind it."""
    net = NetBuilder()
    net.op("Neg", times(net, "x", 3, "m"), name="y")
    for order in ((X, 0 * X), (0 * X, X)):
        folder = tmp_path / str(float(order[0].sum()))
        folder.mkdir()
        path = net.save(folder / "net.onnx", {"x": (1, [1, 256])}, ["y"])
        found = judged(path, lambda editor: edits.scale_weights(editor, "m", 0.5), *order)
        assert [f.layers for f in found.findings] == [["node_m"]]


def test_a_divergence_that_nobody_is_guilty_of_is_relative_to_the_reference(tmp_path: Path) -> None:
    """x + 1000 − 1000 in FP16, which has steps of one half there: 0.3 becomes 0.5, two thirds more, not 40 % of it.

    It is told although another output is within the tolerance.
    """
    net = NetBuilder()
    thousand = net.weight(np.array(1000, np.float32))
    net.op("Sub", net.op("Add", "x", thousand, name="up"), thousand, name="y")
    net.op("Neg", "x", name="sound")
    path = net.save(tmp_path / "net.onnx", {"x": (1, [1, 256])}, ["y", "sound"])
    np.savez(tmp_path / "x.npz", x=np.full((1, 256), 0.3, np.float32))
    (found,) = bisect(str(path), "ort,emu-fp16", options=Options(inputs=tmp_path / "x.npz")).tests
    assert not found.guilty
    assert found.remainder is not None
    assert found.remainder.divergence == pytest.approx(2 / 3, rel=1e-3)


@pytest.mark.parametrize("large", ["first", "second"])
def test_of_sound_layers_in_int8_the_one_that_reaches_the_outputs_most_is_named(tmp_path: Path, large: str) -> None:
    """Both round by as much; the result of one counts a hundred times as much."""
    net, rng = NetBuilder(), np.random.default_rng(0)
    parts = []
    for name in ("first", "second"):
        product = net.op("MatMul", "x", net.weight(rng.standard_normal((64, 32)).astype(np.float32)), name=name)
        parts.append(times(net, product, 100.0 if name == large else 1.0, f"of {name}"))
    path = net.save(tmp_path / "net.onnx", {"x": (1, [16, 64])}, [net.op("Sub", *parts, name="y")])
    np.savez(tmp_path / "x.npz", x=rng.standard_normal((16, 64)).astype(np.float32))
    options = Options(inputs=tmp_path / "x.npz", rtol=1e-5, atol=1e-6)
    (test,) = bisect(str(path), "ort,ort-int8", options=options).tests
    (finding,) = [f for f in test.findings if f.cause == "int8"]
    assert finding.layers == [f"node_{large}"]
    assert finding.effect.share == pytest.approx(1, abs=0.1)


def test_the_layer_that_int8_costs_most_in_is_named_wherever_its_quantizers_lie(int8_rows: list[LayerRow]) -> None:
    """What a layer reads is quantized by nodes of its own, or by those of the layer in front: then it has no step."""
    for place, row in enumerate(int8_rows):
        assert row.replay is not None
        rows = {str(r.index): replace(r, share=0.9 if r is row else 0.05) for r in int8_rows}
        rows[str(row.index)] = replace(rows[str(row.index)], replay=replace(row.replay, step=None))
        (finding,) = declared.int8(rows, "int8", lambda named: named[0].name)  # type: ignore[arg-type]
        assert (finding.layers, finding.fix.split()[-1]) == ([row.name], row.name), place


@pytest.mark.parametrize(
    ("shares", "alone", "named"),
    [
        ((1.5, -0.5), (0.02, 0.9), 1),  # they cancel: the second alone makes more than both together
        ((0.4, 0.1), (0.02, 0.9), 1),  # half is not linear
        ((1.5, -0.5), (0.75, 0.9), 1),
        ((0.8, 0.2), (0.02, 0.9), 0),
    ],
)
def test_where_shares_mislead_the_layer_that_makes_most_alone_is_named(
    int8_rows: list[LayerRow], shares: tuple[float, ...], alone: tuple[float, ...], named: int
) -> None:
    rows = {str(n): replace(row, share=share) for n, (row, share) in enumerate(zip(int8_rows, shares, strict=True))}
    effects = {str(n): size for n, size in enumerate(alone)}
    (finding,) = declared.int8(rows, "int8", lambda _: "", None, lambda _: effects)  # type: ignore[arg-type, return-value]
    assert finding.layers == [int8_rows[named].name]
    assert finding.says.endswith(": the outputs are 0.9 off by its error alone") == (named == 1)


def test_what_a_layer_makes_alone_is_its_error_added_to_the_reference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, x = NetBuilder(), np.random.default_rng(3).standard_normal((8, 16))
    of_first, of_second = (net.rng.standard_normal((16, 16)).astype(np.float32) for _ in range(2))
    net.op("MatMul", "x", net.weight(of_first), name="first")
    net.op("MatMul", "first", net.weight(of_second), name="second")
    net.op("Mul", "first", "second", name="y")
    path = net.save(tmp_path / "net.onnx", {"x": (1, [8, 16])}, ["y"])
    np.savez(tmp_path / "x.npz", x=x.astype(np.float32))
    found: dict[str, float] = {}
    costliest = Effects.costliest

    def told(self: Effects, rows: Mapping[Key, LayerRow]) -> dict[Key, float]:
        sizes = costliest(self, rows)
        found.update({key.value: size for key, size in sizes.items()})
        return sizes

    monkeypatch.setattr(Effects, "costliest", told)
    monkeypatch.setattr(declared, "CANCELS", 0.0)
    bisect(str(path), "ort,ort-int8", options=Options(inputs=tmp_path / "x.npz", save=tmp_path / "seen"))
    (capture,) = (Capture.open(p.parent) for p in tmp_path.glob("seen/sample-0/*/manifest.json") if "int8" in str(p))
    (component,) = {entry.component for entry in capture.entries}
    first, second = (capture.load(name, component=component).astype(np.float64) for name in ("first", "second"))
    right = x @ of_first
    exact = right * (right @ of_second)
    ends = {"first": first * (first @ of_second), "second": exact + right * (second - first @ of_second)}
    for name, end in ends.items():
        off = float(np.linalg.norm(end - exact) / np.linalg.norm(exact))
        assert found[name] == pytest.approx(off, rel=1e-4)
    assert [*found.values()] == sorted(found.values(), reverse=True)


@pytest.fixture(scope="module")
def int8_rows(tmp_path_factory: pytest.TempPathFactory) -> list[LayerRow]:
    """Two sound layers in INT8."""
    net, folder = NetBuilder(), tmp_path_factory.mktemp("int8")
    value = "x"
    for name in ("first", "second"):
        value = net.op("MatMul", value, net.weight(net.rng.standard_normal((16, 16)).astype(np.float32)), name=name)
    path = net.save(folder / "net.onnx", {"x": (1, [16, 16])}, [value])
    (test,) = bisect(str(path), "ort,ort-int8").tests
    return [row for row in test.rows if row.replay is not None and row.replay.step is not None]


def test_a_reference_at_fault_has_no_share_of_the_tests_error(tmp_path: Path) -> None:
    net = NetBuilder()
    net.op("Neg", times(net, "x", 3.3, "m"), name="y")
    path = net.save(tmp_path / "net.onnx", {"x": (1, [1, 256])}, ["y"])
    np.savez(tmp_path / "x.npz", x=X)
    wrong = create(BackendSpec.parse("emu-fp32"), overrides={"node_m": "bf16"})
    options = Options(inputs=tmp_path / "x.npz")
    (row,) = bisect(str(path), [wrong, create(BackendSpec.parse("ort"))], options=options).tests[0].guilty
    assert (row.onnx, row.side, row.share) == ("m", "reference", None)


def test_noise_of_the_reference_counts_for_every_layer(tmp_path: Path) -> None:
    memory = np.random.default_rng(0)

    def restless(value: np.ndarray) -> np.ndarray:
        return (value * (1 + 0.01 * memory.standard_normal(value.shape))).astype(np.float32)

    backends = [Spoilt({"first": restless, "second": restless}), create(BackendSpec.parse("ort"))]
    result = bisect(str(chain(tmp_path)), backends, options=Options(inputs=tmp_path / "x.npz")).tests[0]
    floors = {row.onnx: row.noise_floor for row in result.rows}
    assert floors == {"x": 0, "r": 0, "first": pytest.approx(0.014, rel=0.3), "second": pytest.approx(0.014, rel=0.3)}


@pytest.mark.parametrize("change", [0.2, -0.2])
def test_a_score_that_an_error_raises_is_told_as_raised(change: float) -> None:
    """Detections with the error are the reference's plus the error."""
    boxes = np.array([[1, 2, 0, 4, 2, 1, 0.0]], np.float32)
    outputs = {"net": {"scores": np.array([0.5], np.float32)}}

    def decode(sample: Any, results: Any) -> Any:
        return SimpleNamespace(boxes=boxes, scores=results["net"]["scores"], labels=np.zeros(1, np.int64))

    model: Any = SimpleNamespace(components=[SimpleNamespace(name="net")], decode=decode)
    shares: Any = SimpleNamespace(change=lambda key: {"scores": np.array([change])})
    sample: Any = None
    stats = compare(np.ones(1), np.ones(1))
    row = LayerRow(0, "net", "layer", "layer", "Conv", stats, "guilty", False, share=0.75)
    effect = Effects(model, sample, shares, outputs).of([row])
    assert effect.share == 0.75
    assert effect.detections is not None
    assert effect.detections.mean_score == pytest.approx(change, rel=1e-5)
    assert Key("net", "layer").component == "net"


def test_what_nothing_explains_is_told_with_what_the_graphs_say() -> None:
    says = "no known cause explains what these layers introduce"
    for differ, told in (([], says), (["a", "b"], f"{says}; the two graphs differ there: a; b")):
        explanation: Any = SimpleNamespace(graphs_differ=differ)
        assert _unexplained(explanation) == told


def row(name: str, *shape: int) -> LayerRow:
    return LayerRow(0, "net", name, name, "Neg", compare(np.ones(shape), np.ones(shape)), "ok", True)


def explainer(implicit: bool) -> Any:
    made = Explainer.__new__(Explainer)
    made.notes = []
    run: Any = SimpleNamespace(
        implicit=implicit,
        quantized_names=lambda r: [f"{r.component}.{r.name}"],
        came_quantized=lambda component: False,
    )
    made.run = run
    return made


def test_layers_are_left_out_of_int8_by_the_flag_that_the_backend_has() -> None:
    assert explainer(False)._unquantized([row("a", 1)]) == "--skip-layers net.a"
    assert explainer(True)._unquantized([row("a", 1)]) == "--keep-fp32 net.a"
    several = explainer(False)._unquantized([row(name, 1) for name in ("a", "b c")])
    assert several == "--skip-layers net.a --skip-layers 'net.b c'", "as a shell takes them"


def test_only_layers_that_ptq_knows_are_left_out_of_it(tmp_path: Path) -> None:
    net = NetBuilder()
    conv = net.conv("x", 3, 4, name="c")
    relu = net.op("Relu", conv, name="r")
    graph = Graph(net.save(tmp_path / "net.onnx", {"x": (1, [1, 3, 8, 8])}, [net.conv(relu, 4, 4, name="d")]))
    made, programs = explainer(False), {"net": SimpleNamespace(graph=graph)}
    made.run.__dict__.update(came_quantized=lambda component: True, kind=lambda component: "int8", programs=programs)
    made.run.pipeline = SimpleNamespace(model=SimpleNamespace(name="f"))
    first, second, third = (node.name for node in graph.nodes)
    command = "cpdebug quantize ptq f -o FOLDER"
    fused = replace(row("r", 1), replay=SimpleNamespace(nodes=(first, second)))
    assert made._unquantized([row(first, 1)]) == made._unquantized([fused]) == f"{command} --skip-layers {first}"
    behind = replace(row("r", 1), onnx=relu)
    assert made._unquantized([behind]) == f"{command} --skip-layers {third}", "the pair is in front of its reader"
    assert made._unquantized([row("y", 1)]) == command


def test_a_cause_that_could_not_be_tried_is_told_once() -> None:
    made = explainer(False)
    for name in ("a", "a", "b"):
        made._failed(row(name, 1), ValueError("no room"))
    assert [note.partition(":")[0] for note in made.notes] == ["a", "b"]
    assert all("no room" in note for note in made.notes)


def test_a_remedy_names_nodes_a_regions_own_where_the_row_stands_for_one() -> None:
    rows = [row("a", 1), row("b", 1)]
    rows[1].region = Region(("n1", "n2"))
    assert _node_names(rows) == ["a", "n1", "n2"]
    assert some(["a", "b"]) == "a, b"
    assert some([str(i) for i in range(8)]) == "0, 1, 2, 3, 4, 5, 6, 7"
    assert some([str(i) for i in range(11)]) == "0, 1, 2, 3, 4, 5, 6, 7 and 3 more"
