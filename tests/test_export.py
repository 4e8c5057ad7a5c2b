"""Exports: what is folded, what is named how, and what cannot be exported."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn

from cp_debug.backends.determinism import deterministic, read_settings
from cp_debug.errors import InputError
from cp_debug.graph.graph import Graph
from cp_debug.programs import export as export_module
from cp_debug.programs.export import EXPORTERS, _reason, export
from cp_debug.programs.pipeline import choose_export, merge_settings, settings_by_component


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.conv_norm = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)
        self.up, self.up_norm = nn.ConvTranspose2d(4, 4, 2, stride=2, bias=False), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.up_norm(self.up(self.conv_norm(self.conv(x)).relu()))


@pytest.mark.few(2)
@pytest.mark.parametrize(
    ("exporter", "folded", "norms"),
    [("dynamo", True, 0), ("torchscript", True, 1), ("dynamo", False, 2), ("torchscript", False, 2)],
)
def test_folds_batchnorm_as_deployment_does(tmp_path: Path, exporter: str, folded: bool, norms: int) -> None:
    args = (torch.randn(1, 3, 6, 6),)
    path = tmp_path / "new" / "net.onnx"
    made = export(Net().eval(), args, path, input_names=["x"], output_names=["y"], exporter=exporter, folded=folded)
    model = onnx.load(made)
    assert Counter(n.op_type for n in model.graph.node)["BatchNormalization"] == norms
    assert {p.key: p.value for p in model.metadata_props}["cpdebug.exporter"] == exporter
    assert [f.name for f in path.parent.iterdir()] == ["net.onnx"]


@dataclass
class Result:
    second: Tensor
    first: Any


class Nested(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Result:
        return Result(x + y, {"b": [x - y, None], "a": (x * y,)})


@pytest.mark.parametrize("exporter", EXPORTERS)
def test_outputs_keep_their_order_and_axes_stay_free(tmp_path: Path, exporter: str) -> None:
    names = ["sum", "difference", "product"]
    args = (torch.randn(1, 3), torch.randn(1, 3))  # one row: dynamo would take it for a constant
    module = Nested().eval()
    path = export(
        module,
        args,
        tmp_path / "net.onnx",
        input_names=["x", "y"],
        output_names=names,
        dynamic_axes={"x": {0: "rows"}, "y": {0: "rows"}},
        exporter=exporter,
    )
    assert "forward" not in vars(module)
    for rows in (0, 1, 5):
        x, y = np.random.default_rng(rows).standard_normal((2, rows, 3)).astype(np.float32)
        found = ReferenceEvaluator(str(path)).run(names, {"x": x, "y": y})
        for array, expected in zip(found, (x + y, x - y, x * y), strict=True):
            np.testing.assert_allclose(array, expected, rtol=1e-6)


class Branches(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.sum() > 0 else torch.linalg.eigvals(x).real


@pytest.mark.slow
def test_the_exporters_operators_are_read_once_and_anew_where_a_library_adds_some(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    reads: list[int] = []
    registry = ONNXRegistry.from_torchlib(opset_version=18)

    def read(kind: Any, opset_version: int) -> Any:
        reads.append(opset_version)
        return registry

    def exported(name: str, opset: int) -> list[str]:
        module = nn.Sequential(nn.Linear(4, 4), nn.ReLU()).eval()
        path = export(module, (torch.ones(1, 4),), tmp_path / name, input_names=["x"], output_names=["y"], opset=opset)
        return [node.op_type for node in onnx.load(path).graph.node]

    monkeypatch.setattr(ONNXRegistry, "from_torchlib", classmethod(read))
    caches = (export_module._reader_of, export_module._operators)
    for cache in caches:
        cache.cache_clear()
    try:
        assert exported("a.onnx", 18) == exported("b.onnx", 18) == ["Gemm", "Relu"]
        assert reads == [18]
        exported("c.onnx", 20)
        assert reads == [18, 20]
        library = torch.library.Library("cpdebug_made_up", "DEF")
        library.define("twice(Tensor x) -> Tensor")
        exported("d.onnx", 20)
        assert reads == [18, 20, 20]
    finally:
        for cache in caches:
            cache.cache_clear()


def test_what_cannot_be_exported_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    with pytest.raises(InputError, match=r"Branches cannot be exported by dynamo: \w+: \w+"):
        export(Branches().eval(), (torch.ones(2, 2),), path, input_names=["x"], output_names=["y"])
    with pytest.raises(InputError, match=r"outputs are .*; expected \['y', 'z'\]|cannot be exported"):
        export(Net().eval(), (torch.ones(1, 3, 6, 6),), path, input_names=["x"], output_names=["y", "z"])
    with pytest.raises(InputError, match="expected one of dynamo, torchscript"):
        export(Net().eval(), (torch.ones(1, 3, 6, 6),), path, input_names=["x"], output_names=["y"], exporter="jit")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_an_opset_that_dynamo_silently_keeps_is_refused(tmp_path: Path) -> None:
    options: dict[str, Any] = {"input_names": ["x"], "output_names": ["y"], "opset": 13}
    with pytest.raises(InputError, match=r"wrote opset 18 where 13 was asked for"):
        export(Net().eval(), (torch.ones(1, 3, 6, 6),), tmp_path / "a.onnx", **options)
    path = export(Net().eval(), (torch.ones(1, 3, 6, 6),), tmp_path / "b.onnx", exporter="torchscript", **options)
    assert onnx.load(path).opset_import[0].version == 13


@pytest.mark.parametrize("exporter", EXPORTERS)
def test_exports_while_tf32_is_off(tmp_path: Path, exporter: str) -> None:
    with deterministic():
        before = read_settings()
        args = (torch.ones(1, 3, 6, 6),)
        export(Net().eval(), args, tmp_path / "a.onnx", input_names=["x"], output_names=["y"], exporter=exporter)
        assert read_settings() == before


@pytest.mark.parametrize("exporter", EXPORTERS)
def test_is_quiet(tmp_path: Path, exporter: str, capfd: pytest.CaptureFixture[str], recwarn: Any) -> None:
    level = logging.root.manager.disable
    export(
        Net().eval(),
        (torch.ones(1, 3, 6, 6),),
        tmp_path / "a.onnx",
        input_names=["x"],
        output_names=["y"],
        exporter=exporter,
    )
    assert capfd.readouterr() == ("", "")
    assert [str(w.message) for w in recwarn] == []
    assert logging.root.manager.disable == level


def test_ctrl_c_that_the_exporter_turned_into_its_own_error_is_ctrl_c(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While torch imports parts of itself it catches everything, and then fails on what is only half imported."""

    def half_imported(*_: Any, **__: Any) -> None:
        try:
            raise KeyboardInterrupt
        except BaseException:
            raise AttributeError("module 'torch._dynamo' has no attribute 'exc'")  # noqa: B904

    monkeypatch.setattr("torch.onnx.export", half_imported)
    with pytest.raises(KeyboardInterrupt):
        export(Net().eval(), [torch.zeros(1, 3, 8, 8)], tmp_path / "net.onnx", input_names=["x"], output_names=["y"])
    assert not any(tmp_path.iterdir())


def test_settings_of_all_components_stand_once() -> None:
    settings = {"a": {"threads": 1, "level": "all", "fast": True}, "b": {"threads": 1, "level": "none"}}
    merged = merge_settings(settings)
    assert merged == {"threads": 1, "components": {"a": {"level": "all", "fast": True}, "b": {"level": "none"}}}
    assert settings_by_component(merged) == settings
    assert merge_settings({"a": {"threads": 1}, "b": {"threads": 1}}) == {"threads": 1}
    assert settings_by_component({"threads": 1}) == {"": {"threads": 1}}


def test_an_export_is_what_the_oldest_reader_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    backends: Any = [SimpleNamespace(spec=name, opset=opset) for name, opset in (("a", None), ("b", 17), ("c", 13))]
    monkeypatch.setattr("cp_debug.programs.pipeline.wants_int8", lambda backend: backend.spec == "b")
    monkeypatch.setattr("cp_debug.programs.pipeline.largest_opset", lambda backend: backend.opset)
    plain, nothing = choose_export(backends[:1], None)
    assert (plain.exporter, plain.fused, nothing) == ("dynamo", False, None)
    chosen, note = choose_export(backends, None)
    assert (chosen.exporter, chosen.opset, chosen.fused) == ("torchscript", 13, True)
    assert note == "exported with torchscript at opset 13, the newest that c reads"
    assert choose_export(backends, "dynamo")[0].exporter == "dynamo"
    assert choose_export([backends[0], backends[2]], None)[0].fused is False


def test_the_reason_of_a_failed_export_is_its_first_cause() -> None:
    error = RuntimeError("outer")
    error.__cause__ = ValueError("\n  inner  \nmore")
    assert _reason(error) == "ValueError: inner"
    assert _reason(ValueError("")) == "ValueError"


@pytest.mark.parametrize("exporter", EXPORTERS)
def test_a_weight_that_the_exporter_transposes_keeps_its_parameter_s_name(tmp_path: Path, exporter: str) -> None:
    """A Linear of three axes is a MatMul of the transposed weight."""
    module = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 6)).eval()
    path = export(
        module,
        (torch.randn(2, 3, 6),),
        tmp_path / "net.onnx",
        input_names=["x"],
        output_names=["y"],
        exporter=exporter,
        folded=True,
    )
    graph = Graph(path)
    assert {"0.weight.T", "2.weight.T"} <= set(graph.initializers)
    for place in (0, 2):
        np.testing.assert_array_equal(graph.initializer(f"{place}.weight.T"), module[place].weight.detach().T)
    onnx.checker.check_model(onnx.load(path), full_check=True)
