"""Files that are written again: what is compared, on which sizes, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from nets import NetBuilder
from onnx import TensorProto, helper, numpy_helper
from typer.testing import CliRunner

from cp_debug.backends.base import Program
from cp_debug.cli.main import app
from cp_debug.deploy.exporting import _checked_run, _same_signature, export_files, outcome
from cp_debug.errors import InputError
from cp_debug.graph.graph import Graph
from cp_debug.recipes.base import Sample
from cp_debug.recipes.registry import load_model


def product(folder: Path) -> Path:
    """An ONNX file of one product and an activation."""
    weight = numpy_helper.from_array(np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32), "w")
    nodes = [helper.make_node("MatMul", ["x", "w"], ["a"], "product"), helper.make_node("Relu", ["a"], ["y"])]
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [2, size]) for n, size in (("x", 4), ("y", 3))]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], [weight])
    path = folder / "net.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def test_a_file_is_compared_on_three_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def noted(model: Any, programs: Any, samples: Any, *rest: Any, **more: Any) -> list[Any]:
        seen.append(len(samples))
        return []

    monkeypatch.setattr("cp_debug.deploy.exporting.export_files", noted)
    CliRunner().invoke(app, ["export", str(product(tmp_path)), "-o", str(tmp_path / "out")])
    assert seen == [3]


def written(folder: Path, batch: Any = "n", outputs: tuple[str, ...] = ("y", "z")) -> Path:
    """A file with x [batch, 4] → y = relu(x + 1), z = x·w."""
    net = NetBuilder()
    net.op("Relu", net.op("Add", "x", net.weight(np.ones(4, np.float32))), name="y")
    net.op("MatMul", "x", net.weight(np.eye(4, dtype=np.float32)), name="z")
    return net.save(folder / "net.onnx", {"x": (1, [batch, 4])}, list(outputs), opset=13)


def exported(path: Path, folder: Path, **how: Any) -> Any:
    model = load_model(str(path))
    samples = [Sample({"x": np.full((size, 4), size, np.float32)}, str(size)) for size in (6, 3)]
    program = Program(model.components[0].name, Graph(path))
    (found,) = export_files(model, [program], samples, folder, **how)
    return found


@pytest.mark.parametrize("how", [{}, {"opset": 17}, {"simplify": True}, {"opset": 17, "simplify": True}], ids=str)
def test_a_file_written_again_is_compared_on_all_samples_and_a_second_size(tmp_path: Path, how: dict[str, Any]) -> None:
    path = written(tmp_path)
    found = exported(path, tmp_path / "out", **how)
    assert found.sizes == ("x 6×4", "x 3×4", "x 7×4")  # half of six is no multiple of what strides divide
    assert found.error == 0.0
    assert found.checked_by == "ort"
    assert found.source.path == path
    proto = onnx.load(found.program.graph.path)
    assert found.program.graph.path.parent == tmp_path / "out"
    assert proto.opset_import[0].version == how.get("opset", 13)


def test_a_file_of_fixed_sizes_runs_on_them_alone_and_goes_where_it_is_told(tmp_path: Path) -> None:
    path = written(tmp_path, batch=3)
    model = load_model(str(path))
    name = model.components[0].name
    sample = Sample({"x": np.ones((3, 4), np.float32)}, "s")
    steps: list[Any] = []
    (found,) = export_files(
        model, [Program(name, Graph(path))], [sample], tmp_path / "out", files={name: "other.onnx"},
        on_step=lambda *told: steps.append(told),
    )  # fmt: skip
    assert found.sizes == ("x 3×4",)
    assert found.program.graph.path == tmp_path / "out" / "other.onnx"
    assert steps == [(f"writing {name}", 0, 1)]
    with pytest.raises(InputError, match=r"net\.onnx would replace MODEL itself; expected another folder"):
        export_files(model, [Program(name, Graph(path))], [sample], tmp_path, files={name: "net.onnx"})


def test_another_result_or_signature_is_refused(tmp_path: Path) -> None:
    graph = Graph(written(tmp_path))
    ours = {"y": np.ones(4, np.float32), "z": np.ones(4, np.float32)}
    assert outcome([_checked_run(graph, ours, ours)]) == (0.0, ())
    near = ours | {"z": np.full(4, 1 + 1e-6, np.float32)}
    error, _ = outcome([_checked_run(graph, ours, ours), _checked_run(graph, ours, near)])
    assert error == pytest.approx(1e-6, rel=0.2)
    for strange, says in ((np.full(4, 2, np.float32), r"\[4\], relative L2 1;"), (np.ones(5, np.float32), r"\[5\]")):
        with pytest.raises(InputError, match=f"rewritten, it computes another z than before: {says}"):
            _checked_run(graph, ours, ours | {"z": strange})
    (tmp_path / "other").mkdir()
    fewer = written(tmp_path / "other", outputs=("y",))
    with pytest.raises(InputError, match=r"its outputs are \['y', 'z'\]; rewritten, they would be \['y'\]"):
        _same_signature(fewer, graph)
    assert [v.name for v in _same_signature(graph.path, graph).outputs] == ["y", "z"]
    (tmp_path / "no.onnx").write_bytes(b"no graph")
    with pytest.raises(InputError, match=r"onnx\.checker refuses it"):
        _same_signature(tmp_path / "no.onnx", graph)
