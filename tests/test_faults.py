"""Every seeded fault is found, alone and exactly; ``cpdebug demo`` shows it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from faults import edits
from faults.catalog import FAULTS
from faults.edits import Editor
from nets import residual, second_like
from typer.testing import CliRunner

from cp_debug.bisect.demos import DEMOS
from cp_debug.bisect.engine import bisect
from cp_debug.cli.bisect import verdict
from cp_debug.cli.main import app
from cp_debug.errors import InputError
from cp_debug.graph.graph import Graph


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_the_fault_is_found_exactly(name: str) -> None:
    seeded = FAULTS[name].seed()
    result = bisect(seeded.model, seeded.backends, test_model=seeded.test_model)
    assert any(seeded.strikes(row.name, row.op) for row in result.tests[0].rows)
    assert verdict(seeded, result.tests[0]).plain.startswith("found: the ")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("nets")
    return {
        "second": second_like(folder / "second.onnx", depth=1, size=16),
        "residual": residual(folder / "residual.onnx"),
    }


@pytest.mark.few(5)
@pytest.mark.parametrize(
    ("net", "op", "change", "arguments"),
    [
        ("second", "Conv", edits.scale_weights, (1e-5,)),
        ("second", "Conv", edits.scale_channel, (1e-3, 3)),
        ("second", "Conv", edits.scale_bias, (1e-3,)),
        ("second", "Conv", edits.shift_padding, ()),
        ("second", "ConvTranspose", edits.scale_weights, (1e-5,)),
        ("second", "BatchNormalization", edits.epsilon, (1e-4,)),
        ("second", "BatchNormalization", edits.stale_statistics, (1e-5,)),
        ("second", "Relu", edits.drop, ()),
        ("second", "Relu", edits.clip, (1.0,)),
        ("second", "Relu", edits.zero_times_infinity, ()),
        ("second", "Concat", edits.swap_channels, ([*range(32, 64), *range(32)],)),
        ("second", "Concat", edits.scramble, ((1, 64, 8, 8),)),
        ("residual", "Add", edits.scale, (1e-5,)),
        ("residual", "Add", edits.store_as, ("bf16",)),
        ("residual", "Add", edits.store_as, ("fp16",)),
        ("residual", "MaxPool", edits.quantize, (2.0,)),
        ("residual", "GlobalAveragePool", edits.add, (1e-5,)),
        ("residual", "MatMul", edits.scale_weights, (1e-5,)),
        ("residual", "Sigmoid", edits.drop, ()),
    ],
)
def test_an_edit_spoils_one_layer(
    files: dict[str, Path], tmp_path: Path, net: str, op: str, change: Callable[..., None], arguments: tuple[object]
) -> None:
    path = files[net]
    value = next(n.outputs[0] for n in Graph(path).nodes[2:] if n.op == op)
    if change is edits.scramble:
        arguments = (shape_of(path, value),)
    editor = Editor(path)
    change(editor, value, *arguments)
    result = bisect(str(path), "ort,ort-none", test_model=editor.save(tmp_path / "spoilt.onnx")).tests[0]
    assert [row.onnx for row in result.guilty] == [value]
    assert all((row.share is None) == bool(row.replay and row.replay.new_nonfinite) for row in result.guilty)


def shape_of(path: Path, value: str) -> list[int]:
    return [d.dim_value for d in Graph(path).types[value].tensor_type.shape.dim]


@pytest.mark.parametrize("backend", ["ort-none", "emu-fp16"])
def test_a_rescaled_network_is_right_in_fp32_and_overflows_in_fp16(
    files: dict[str, Path], tmp_path: Path, backend: str
) -> None:
    graph = Graph(files["residual"])
    relu = [n for n in graph.nodes if n.op == "Relu"][1]
    above, below = graph.producer[relu.inputs[0]], graph.consumers[relu.outputs[0]][0]
    editor = Editor(files["residual"])
    edits.rescale(editor, above.outputs[0], below.outputs[0], 2.0**15)
    result = bisect(str(editor.save(tmp_path / "rescaled.onnx")), f"ort,{backend}").tests[0]
    names = [row.onnx for row in result.guilty]
    assert names[:1] == ([] if backend == "ort-none" else [above.outputs[0]])
    if backend == "ort-none":
        same = bisect(str(files["residual"]), "ort,ort-none", test_model=tmp_path / "rescaled.onnx").tests[0]
        assert all(row.stats.equal for row in same.outputs)


def test_an_unknown_layer_is_refused(files: dict[str, Path]) -> None:
    with pytest.raises(InputError, match="nowhere"):
        edits.scale(Editor(files["second"]), "nowhere", 0.1)


def test_demo_lists_and_refuses() -> None:
    listed = CliRunner().invoke(app, ["demo"])
    assert listed.exit_code == 0
    assert all(name in listed.output for name in DEMOS)
    refused = CliRunner().invoke(app, ["demo", "wieght-scale"])
    assert isinstance(refused.exception, InputError)
    assert "did you mean weight-scale?" in str(refused.exception)


@pytest.mark.slow
def test_demo_shows_what_it_finds(tmp_path: Path) -> None:
    page = tmp_path / "demo.html"
    shown = CliRunner().invoke(app, ["demo", "weight-scale", "--html", str(page)])
    assert shown.exit_code == 0, "it found what it promised"
    assert "Values on both sides" in page.read_text(encoding="utf-8")  # with the tensors, not the tables alone
    assert "injected: one convolution's weights" in shown.output
    assert "found: the one injected layer, and no other" in shown.output
