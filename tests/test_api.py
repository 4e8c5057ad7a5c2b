"""``import cp_debug`` gives every name, however often it is asked."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from nets import second_like
from onnx import numpy_helper

import cp_debug
from cp_debug.errors import InputError


@pytest.mark.slow
@pytest.mark.parametrize("order", ["", pytest.param("reversed", marks=pytest.mark.slow)])
def test_a_name_is_the_same_the_second_time(order: str) -> None:
    """In a fresh process: an import in between must not put a folder in the place of a function."""
    code = f"""
import types, cp_debug
names = [*{order}(cp_debug.__all__)]
first = {{name: getattr(cp_debug, name) for name in names}}
for name in names:
    assert getattr(cp_debug, name) is first[name], name
    assert not isinstance(first[name], types.ModuleType), name
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_diagnose_and_open_result(tmp_path: Path) -> None:
    path = second_like(tmp_path / "net.onnx", depth=1, size=8)
    result = cp_debug.diagnose(str(path), "ort-none,ort-basic", options=cp_debug.Options(save=tmp_path / "kept"))
    assert isinstance(result, cp_debug.BisectResult)
    assert result.agrees
    with pytest.raises(cp_debug.InputError, match="no such file"):
        cp_debug.open_result(tmp_path / "nothing")


def test_the_package_is_typed() -> None:
    assert (Path(cp_debug.__file__).parent / "py.typed").exists()


def small(tmp_path: Path, name: str = "net.onnx", factor: float = 1.0) -> Path:
    path = second_like(tmp_path / name, depth=1, size=8)
    scaled(path, factor)
    return path


def scaled(path: Path, factor: float) -> None:
    """Multiply the first convolution's weight."""
    proto = onnx.load(path)
    weight = next(tensor for tensor in proto.graph.initializer if len(tensor.dims) == 4)
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * np.float32(factor), weight.name))
    onnx.save(proto, path)


def test_a_result_prints_its_verdict_and_keeps_numbers(tmp_path: Path) -> None:
    result = cp_debug.diagnose(small(tmp_path), "ort-none,ort-basic")
    lines = str(result).splitlines()
    assert len(lines) <= 4
    assert lines[1].startswith("✓ ort-basic: agrees")
    assert len(repr(result)) < 200
    assert result.layers["sqnr_db"].dtype == float  # of equal layers infinite, which JSON writes as text
    assert math.isinf(result.layers["sqnr_db"].max())
    assert list(result.layers)[:5] == ["index", "name", "op", "max_abs", "rel_l2"]
    assert {result.layers[key].dtype.kind for key in ("step", "clipped", "share", "excess", "count")} <= {"f", "i"}
    row = result.tests[0].rows[1]
    assert repr(row) == f"<LayerRow {row.name} ({row.op}): ok>"


def test_assert_agree_says_who_why_and_what_to_do(tmp_path: Path) -> None:
    paths = [small(tmp_path), small(tmp_path, "other.onnx", 1.05)]
    assert cp_debug.assert_agree(paths[0], "ort,ort", test_model=paths[0]).agrees
    with pytest.raises(AssertionError) as caught:
        cp_debug.assert_agree(paths[0], "ort,ort", test_model=paths[1])
    said = str(caught.value)
    assert len(said.splitlines()) <= 10
    assert "guilty" in said
    assert "fix:" in said
    assert ".show()" in said
    with pytest.raises(AssertionError) as caught:
        cp_debug.assert_agree(paths[0], "ort,ort,ort-basic,ort-all,torch,emu-tf32,emu-fp32", test_model=paths[1])
    said = str(caught.value)
    assert len(said.splitlines()) == 10
    assert said.count("✗") + int(said.split("\nand ")[1].split(" more that")[0]) == 6
    assert "fix:" in said.partition("✗ ort-basic")[0]


def test_compare_tensors_by_name() -> None:
    a = np.arange(4.0)
    compared = cp_debug.compare_tensors({"a": a, "b": a, "only": a}, {"b": a + 1, "a": a, "more": a})
    assert list(compared) == ["a", "b"]
    assert compared.worst == "b"
    assert compared["b"].max_abs == 1
    assert (compared.missing, compared.extra) == (["only"], ["more"])
    assert compared.frame["max_abs"].tolist() == [0, 1]
    assert "only in the test: more" in str(compared)
    with pytest.raises(cp_debug.InputError, match="no name in common: a against b"):
        cp_debug.compare_tensors({"a": a}, {"b": a})
    assert cp_debug.compare_tensors({"a": [1, 2, 3]}, {"a": a[1:]})["a"].equal


def test_compare_tensors_says_where_nothing_was_compared() -> None:
    """Tensors without an element agree about nothing: beside others that is told, alone it is no comparison."""
    empty, nan, ones = np.ones((0, 8), np.float32), np.full(3, np.nan), np.ones(3)
    both = cp_debug.compare_tensors({"a": empty, "b": ones}, {"a": empty, "b": ones + 1})
    assert str(both).splitlines()[0] == "a  nothing to compare: without an element on both sides"
    assert both.worst == "b"
    said = str(cp_debug.compare_tensors({"a": nan}, {"a": nan}))
    assert said.startswith("a  no number to compare; NaN and Inf are alike on both sides")
    with pytest.raises(InputError, match="nothing was compared: a, c without an element on both sides"):
        cp_debug.compare_tensors({"a": empty, "c": []}, {"a": empty, "c": []})
    assert "shapes differ" in str(cp_debug.compare_tensors({"a": empty}, {"a": empty.T}))


def test_compare_tensors_tells_nan_and_inf_from_large_differences() -> None:
    reference, test = np.array([1, np.nan, np.inf, 2]), np.array([1.5, 2, np.inf, np.inf])
    said = str(cp_debug.compare_tensors({"a": reference}, {"a": test}))
    assert "2 of 4 values meet NaN or Inf" in said
    assert "reference: 1 NaN, 1 Inf; test: 0 NaN, 2 Inf" in said
    assert "max |Δ| 0.5" in said
    alike = str(cp_debug.compare_tensors({"a": reference}, {"a": reference}))
    assert "NaN and Inf are alike on both sides (reference: 1 NaN, 1 Inf; test: 1 NaN, 1 Inf)" in alike


@pytest.mark.parametrize("wrong", ["text", None, [[1], [1, 2]], object(), 1j * np.ones(3), {"b": 1}])
def test_compare_tensors_refuses_what_is_no_tensor(wrong: object) -> None:
    with pytest.raises(cp_debug.InputError, match="'a'"):
        cp_debug.compare_tensors({"a": wrong}, {"a": np.ones(3)})
    with pytest.raises(cp_debug.InputError, match=r"^test: .*expected a mapping"):
        cp_debug.compare_tensors({"a": np.ones(3)}, wrong if not isinstance(wrong, dict) else 5)  # type: ignore[arg-type]


def test_errors_name_arguments_of_python_not_flags(tmp_path: Path) -> None:
    net, linear = str(small(tmp_path)), torch.nn.Linear(2, 2)
    wrong = {
        r"^model: Linear: example input 'y'": lambda: cp_debug.diagnose(linear, inputs={"y": torch.ones(1, 2)}),
        r"^test_model: 'nothing.xyz'": lambda: cp_debug.diagnose(net, test_model="nothing.xyz"),
        r"^backends: 'ort' names 1": lambda: cp_debug.diagnose(net, "ort"),
        r"^options\.optimizer_blame: ": lambda: cp_debug.diagnose(
            net, "ort,torch", options=cp_debug.Options(optimizer_blame=True)
        ),
        r"^options\.maps pairs .* give another with test_model": lambda: cp_debug.diagnose(
            net, "ort,torch", options=cp_debug.Options(maps=["a=b"])
        ),
        r"^precision: no precision 'fp12'": lambda: cp_debug.predict(net, "fp12"),
        r"^goal: no figure": lambda: cp_debug.search(net, "ort,emu-fp16", "foo<1"),
        r"give inputs$": lambda: cp_debug.assert_agree(net, test_tensors={"y": np.ones(3)}),
    }
    for message, call in wrong.items():
        with pytest.raises(cp_debug.InputError, match=message):
            call()


@pytest.mark.parametrize(
    ("name", "arguments", "says"),
    [
        ("diagnose", {"backends": 3}, "backends: int; expected text or a list of texts or a list of backends"),
        (
            "diagnose",
            {"backends": ["ort", 3]},
            "backends: list; expected text or a list of texts or a list of backends",
        ),
        ("diagnose", {"backends": []}, "backends: '' names 0 backends; expected a reference and some tests"),
        ("diagnose", {"options": {"samples": 3}}, "options: dict; expected Options"),
        ("diagnose", {"inputs": object()}, "inputs: object holds no arrays; expected a mapping by input name"),
        ("diagnose", {"inputs": {"x": torch.ones(1, device="meta")}}, "inputs: 'x' is not an array"),
        ("diagnose", {"inputs": {"x": torch.ones(2).to_sparse()}}, "inputs: 'x' is not an array"),
        ("diagnose", {"channels_last": "yes"}, "channels_last: str; expected True or False"),
        ("verify", {"options": torch.ones(2)}, "options: Tensor; expected VerifyOptions"),
        (
            "verify",
            {"options": cp_debug.VerifyOptions(tolerances=...)},
            "options.tolerances: ellipsis; expected numbers",
        ),
        (
            "verify",
            {"options": cp_debug.VerifyOptions({"y": "x"})},
            "options.tolerances: dict; expected numbers by name",
        ),
        ("evaluate", {"options": cp_debug.EvaluationOptions(region=(0.0, 1.0))}, "expected a tuple of four numbers"),
        ("diagnose", {"options": cp_debug.Options(reading=3)}, "options.reading: int; expected Reading"),
        (
            "diagnose",
            {"options": cp_debug.Options(reading=cp_debug.Reading(shapes=1.5))},
            "options.reading.shapes: float; expected a list of whole numbers by input",
        ),
        (
            "diagnose",
            {"options": cp_debug.Options(reading=cp_debug.Reading(shapes={"x": "2x8"}))},
            "options.reading.shapes: dict; expected a list of whole numbers by input",
        ),
        ("diagnose", {"options": cp_debug.Options(maps=3)}, "options.maps: int; expected a list of texts"),
        ("verify", {"samples": True}, "samples: bool; expected a whole number"),
        ("search", {"goal": 1.0}, "goal: float; expected text or Goal"),
        ("evaluate", {"backends": lambda: 0}, "backends: function; expected"),
        ("predict", {"precision": None}, "precision: NoneType; expected text"),
        ("quantize", {"output": None}, "output: NoneType; expected text or a path"),
        ("quantize", {"output": "o", "skip_layers": "conv"}, "skip_layers: str; expected a list of texts"),
    ],
)
def test_arguments_of_other_types_are_refused_by_name(
    tmp_path: Path, name: str, arguments: dict[str, object], says: str
) -> None:
    with pytest.raises(cp_debug.InputError) as refused:
        getattr(cp_debug, name)(small(tmp_path), **arguments)
    assert says in str(refused.value)


@pytest.mark.parametrize(
    "call",
    [
        lambda: cp_debug.open_result(None),
        lambda: cp_debug.Capture.open({}),
        lambda: cp_debug.compare_tensors({3: np.ones(2)}, {3: np.ones(2)}),
        lambda: cp_debug.diff_results("kept", "kept-today"),
        lambda: cp_debug.compare(torch.ones(2).to_sparse(), torch.ones(2)),
        lambda: cp_debug.compare(None, np.ones(2)),
        lambda: cp_debug.compare(torch.nn.ReLU(), np.ones(2)),
    ],
)
def test_what_is_no_result_and_no_tensor_is_refused(call: Callable[[], object]) -> None:
    with pytest.raises(cp_debug.InputError):
        call()


def test_a_page_has_a_path(tmp_path: Path) -> None:
    result = cp_debug.diagnose(small(tmp_path), "ort,ort-all", progress=False)
    for wrong in (object(), 3, [], b"x"):
        with pytest.raises(cp_debug.InputError, match=r"^path: \w+; expected the path of a file"):
            result.show(wrong)  # type: ignore[arg-type]


def test_the_page_of_a_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    page = cp_debug.diagnose(small(tmp_path), "ort-none,ort-basic").show(tmp_path / "page.html")
    assert opened == [page.as_uri()]
    assert "<html" in page.read_text(encoding="utf-8")


def test_a_result_says_what_two_models_it_is_about(tmp_path: Path) -> None:
    right = second_like(tmp_path / "right.onnx", depth=1, size=8)
    proto = onnx.load(right)
    weights = next(each for each in proto.graph.initializer if len(each.dims) == 4)
    weights.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weights) * np.float32(1.02), weights.name))
    onnx.save(proto, tmp_path / "wrong.onnx")
    two = cp_debug.diagnose(right, "ort,ort", test_model=tmp_path / "wrong.onnx")
    assert str(two).startswith(f"{right} against {tmp_path / 'wrong.onnx'}: ort against ort (wrong.onnx)\n")
    assert two.findings == two.tests[0].findings != []
    assert cp_debug.diagnose(right, "ort,ort-all").test_model == ""


def test_a_folder_for_a_result_is_answered_with_how_to_read_it() -> None:
    with pytest.raises(cp_debug.InputError, match=r"before: a path; expected a result, as open_result\('kept'\) reads"):
        cp_debug.diff_results("kept", "today")  # type: ignore[arg-type]


def test_a_type_is_no_model() -> None:
    with pytest.raises(InputError, match="int's parameters are unknown"):
        cp_debug.diagnose(int, inputs=torch.ones(2))


@pytest.mark.parametrize("document", [dict, None, [], 3])
def test_a_document_that_is_no_object_is_refused(document: object) -> None:
    with pytest.raises(cp_debug.InputError, match="a document is a JSON object"):
        cp_debug.BisectResult.fields_from(document)  # type: ignore[arg-type]


def test_a_function_without_a_signature_needs_inputs() -> None:
    with pytest.raises(
        cp_debug.InputError, match=r"inputs: sin\(\) does not say what it takes; expected example inputs"
    ):
        cp_debug.diagnose(torch.sin, "torch,ort", progress=False)


@pytest.mark.slow
def test_print_tells_the_notes_that_the_command_tells_once_for_all_tests() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Dropout())  # in train mode
    result = cp_debug.diagnose(module, "torch,ort,ort-all", inputs=torch.ones(1, 4))
    text = str(result)
    assert text.count("note: the module was passed in train mode and runs in eval mode") == 1
    assert set(result.tests[0].notes) <= {line.strip().removeprefix("note: ") for line in text.splitlines()}
    result.tests[1].notes = [f"number {i}" for i in range(9)]
    lines = str(result).splitlines()
    assert "  note: number 5" in lines
    assert lines[-1] == "  and 3 more notes: result.tests[1].notes"
