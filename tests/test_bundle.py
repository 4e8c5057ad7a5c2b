"""The bug bundle: it runs by itself, fails for the reason it names, and holds no more than it needs."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from faults.edits import Editor, clip, scale_weights
from nets import NetBuilder, second_like
from test_knobs import quantized
from test_trt_runner import install
from typer.testing import CliRunner

from cp_debug.backends.base import Backend
from cp_debug.backends.registry import create
from cp_debug.backends.spec import BackendSpec
from cp_debug.bisect.engine import Options, bisect
from cp_debug.cli.main import app
from cp_debug.errors import InputError
from cp_debug.graph.graph import Graph
from cp_debug.reports.bundle.case import Case, Piece
from cp_debug.reports.bundle.make import _complete, bundle
from cp_debug.reports.bundle.redact import holds_source, redact
from cp_debug.reports.files import write_json
from cp_debug.reports.saved import SavedResult


def save(folder: Path, model: Path, backends: str | list[Backend], **options: object) -> Path:
    """A saved bisect."""
    result = bisect(str(model), backends, options=Options(save=folder), **options)
    write_json(result, folder / "result.json")
    return folder


def spoilt(model: Path, edit: Callable[[Editor], None]) -> Path:
    editor = Editor(model)
    edit(editor)
    return editor.save(model.with_name("test.onnx"))


def execute(folder: Path) -> subprocess.CompletedProcess[str]:
    """repro.py in a fresh interpreter that does not see this project."""
    return subprocess.run([sys.executable, "-I", "repro.py"], cwd=folder, capture_output=True, text=True)


@pytest.fixture(scope="module")
def scaled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network whose test program has one convolution with weights 2 % too large."""
    folder = tmp_path_factory.mktemp("scaled")
    model = second_like(folder / "net.onnx", size=16)
    return save(
        folder / "saved", model, "ort,ort-all", test_model=spoilt(model, lambda e: scale_weights(e, "conv_6", 0.02))
    )


@pytest.fixture(scope="module")
def bundled(scaled: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("out") / "bundle"
    bundle(SavedResult.open(scaled), target)
    return target


def test_the_script_fails_for_the_named_reason_and_passes_without_the_fault(bundled: Path, tmp_path: Path) -> None:
    done = execute(bundled)
    assert done.returncode == 1
    assert "FAULT" in done.stdout
    assert not done.stderr
    repaired = shutil.copytree(bundled, tmp_path / "repaired")
    shutil.copy(repaired / "reference.onnx", repaired / "model.onnx")
    done = execute(repaired)
    assert done.returncode == 0, "the reference's piece gives what is expected"
    assert "FAULT" not in done.stdout


def test_names_are_no_commands_in_what_the_script_prints(bundled: Path, tmp_path: Path) -> None:
    """A log of GitHub's obeys lines that begin with ``::``, and ``##[`` anywhere."""
    folder, name = shutil.copytree(bundled, tmp_path / "named"), "::error::\x1b[2J ##[error]é"
    model = onnx.load(folder / "model.onnx")
    old = model.graph.output[0].name
    for node in model.graph.node:
        node.output[:] = [name if output == old else output for output in node.output]
    model.graph.output[0].name = name
    onnx.save(model, folder / "model.onnx")
    with np.load(folder / "expected.npz") as expected:
        arrays = {name if key == old else key: expected[key] for key in expected}
    np.savez(folder / "expected.npz", **arrays)
    script = (folder / "repro.py").read_text()
    assert f"{old!r}: " in script
    (folder / "repro.py").write_text(script.replace(f"{old!r}: ", f"{name!r}: "))
    done = execute(folder)
    assert (done.returncode, done.stderr) == (1, "")
    assert "output ::error::\\x1b[2J ## [error]\\xe9: max |error|" in done.stdout
    assert not any(line.startswith("::") for line in done.stdout.splitlines())


def test_what_is_left_is_one_small_convolution(bundled: Path) -> None:
    model = onnx.load(bundled / "model.onnx")
    onnx.checker.check_model(model, full_check=True)
    assert [node.name for node in model.graph.node] == ["node_conv_6"]
    assert [(p.key, p.value) for p in model.graph.node[0].metadata_props] == [("made_by", "NetBuilder")]
    with np.load(bundled / "inputs.npz") as inputs:
        assert {name: array.shape for name, array in inputs.items()} == {"relu_5": (1, 32, 1, 1)}
    assert sum(f.stat().st_size for f in bundled.iterdir()) < 150_000


def test_the_page_tells_what_was_printed_and_measured(bundled: Path) -> None:
    page = (bundled / "README.md").read_text()
    assert execute(bundled).stdout.strip() in page
    assert "# Conv gives a wrong result on ort-all (layer node_relu_8)" in page
    assert "The program differs from the reference's" in page
    assert "1 of the component's 36 nodes" in page
    assert "**Cause**: Conv weights are scaled by 1.02" in page
    assert "Fix: use the same " in page
    assert "polygraphy run model.onnx --onnxrt" in page
    assert str(bundled) not in page


@pytest.mark.slow
def test_polygraphy_sees_the_fault_with_the_command_of_the_page(bundled: Path) -> None:
    command = next(line for line in (bundled / "README.md").read_text().splitlines() if line.startswith("polygraphy "))
    arguments = command.split()[1:]
    run = [sys.executable, "-c", "import sys; from polygraphy.tools import main; sys.exit(main())", *arguments]
    done = subprocess.run(run, cwd=bundled, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "oracle | Passed: 0/1" in done.stdout + done.stderr
    loose = [*run[: run.index("--atol") + 1], "1.0"]
    assert subprocess.run(loose, cwd=bundled, capture_output=True).returncode == 0


def test_a_fault_that_isolation_hides_takes_its_neighbours_along(tmp_path: Path) -> None:
    """The bias is quantized only where a QuantizeLinear follows the convolution, so the layer alone is innocent.

    Their levels are 8 apart, those of what the convolution gives 1: the biases are several of these levels off.
    """
    model = quantized(tmp_path / "net.onnx", largest=1, weight=8.0, data=1.0, bias=10, y=25)
    saved = save(tmp_path / "saved", model, "ort-none,ort-all")
    bundle(SavedResult.open(saved), tmp_path / "out")
    operators = [node.op_type for node in onnx.load(tmp_path / "out" / "model.onnx").graph.node]
    assert {"Conv", "QuantizeLinear"} <= set(operators)
    assert len(operators) <= 6
    assert not (tmp_path / "out" / "reference.onnx").exists()
    assert "the layer alone does not fail" in (tmp_path / "out" / "README.md").read_text()
    page = (tmp_path / "out" / "repro.py").read_text()
    assert "ORT_ENABLE_ALL" in page
    assert execute(tmp_path / "out").returncode == 1


def test_an_inserted_operator_is_cut_out_with_inputs_that_both_programs_know(tmp_path: Path) -> None:
    model = second_like(tmp_path / "net.onnx", size=16)
    saved = save(
        tmp_path / "saved", model, "ort,ort-none@cpu", test_model=spoilt(model, lambda e: clip(e, "relu_8", 0.5))
    )
    bundle(SavedResult.open(saved), tmp_path / "out")
    assert [n.op_type for n in onnx.load(tmp_path / "out" / "model.onnx").graph.node] == ["Relu", "Clip"]
    assert [n.op_type for n in onnx.load(tmp_path / "out" / "reference.onnx").graph.node] == ["Relu"]
    with np.load(tmp_path / "out" / "inputs.npz") as inputs:
        assert list(inputs) == ["batchnormalization_7"]


def test_redaction_keeps_the_fault_and_none_of_the_values(tmp_path: Path) -> None:
    model = second_like(tmp_path / "net.onnx", size=16)
    saved = save(
        tmp_path / "saved",
        model,
        "ort,ort-none@cpu",
        test_model=spoilt(model, lambda e: clip(e, "batchnormalization_7", 0.5)),
    )
    bundle(SavedResult.open(saved), tmp_path / "out", redact=True)
    assert execute(tmp_path / "out").returncode == 1
    theirs = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(tmp_path / "net.onnx").graph.initializer}
    model = onnx.load(tmp_path / "out" / "model.onnx")
    tensors = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    big = {name: array for name, array in tensors.items() if array.size > 1}
    assert big
    for name, array in big.items():
        assert np.mean(array == theirs[name]) < 0.1
        assert (array.min(), array.max()) >= (theirs[name].min(), -np.inf)
        assert array.max() <= theirs[name].max()
    assert not any(node.metadata_props for node in model.graph.node)
    assert "weights and inputs are random" in (tmp_path / "out" / "README.md").read_text()


def test_redacted_inputs_and_weights_are_random_within_the_range_of_the_real_ones(tmp_path: Path) -> None:
    graph = Graph(second_like(tmp_path / "net.onnx", size=16))
    rng = np.random.default_rng(0)
    real = {
        "x": rng.uniform(2, 3, (1, 16, 16, 16)).astype(np.float32),
        "levels": rng.integers(-100, 100, 300).astype(np.int8),
        "gap": np.where(np.arange(200) % 5, rng.normal(5, 1, 200), [np.nan, np.inf] * 100).astype(np.float32),
        "indices": np.arange(50),
        "one": np.array([7.0]),
    }
    piece = Piece(onnx.load(graph.path), graph)
    answers = iter([False, True])
    accepts_second: Any = SimpleNamespace(accepts=lambda case: next(answers))
    made = redact(Case(piece, piece, real, {"heatmap": "heatmap"}), accepts_second)
    for name in ("x", "levels", "gap"):
        ours, theirs = made.inputs[name], real[name]
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
        finite = np.isfinite(theirs)
        assert np.mean(ours[finite] == theirs[finite]) < 0.1, name
        assert np.array_equal(np.isfinite(ours), finite)
        assert theirs[finite].min() <= ours[finite].min() <= ours[finite].max() <= theirs[finite].max()
        assert ours[finite].mean() == pytest.approx(theirs[finite].mean(), abs=0.3 * float(theirs[finite].std()))
        assert ours[finite].std() > 0.5 * theirs[finite].std()
    assert np.array_equal(made.inputs["indices"], real["indices"])  # they say where, not what
    assert made.inputs["one"] == 7.0
    assert made.reference is made.program
    weights = {t.name: onnx.numpy_helper.to_array(t) for t in piece.model.graph.initializer}
    for tensor in made.program.model.graph.initializer:
        if weights[tensor.name].size > 100:
            assert np.mean(onnx.numpy_helper.to_array(tensor) == weights[tensor.name]) < 0.1


def traced(node: onnx.NodeProto) -> onnx.NodeProto:
    """The node with what torch's dynamo exporter writes about its source."""
    trace = 'File "/home/me/secret/net.py", line 8, in forward\n    return secret_formula(x)'
    node.metadata_props.add(key="pkg.torch.onnx.stack_trace", value=trace)
    node.doc_string = "/home/me/secret/net.py(8): forward"
    return node


def test_redaction_reaches_everything_that_can_hold_a_weight_or_a_source_line(tmp_path: Path) -> None:
    helper, tensor = onnx.helper, onnx.numpy_helper.from_array
    secrets: list[np.ndarray] = []

    def secret() -> np.ndarray:
        secrets.append(np.linspace(len(secrets) + 3, len(secrets) + 3.5, 64).astype(np.float32))
        return secrets[-1]

    def constant(name: str) -> onnx.NodeProto:
        return traced(helper.make_node("Constant", [], [name], value=tensor(secret(), "")))

    value = helper.make_tensor_value_info("b", 1, [64])
    value.doc_string = "/home/me/secret/net.py(8): forward"
    branches = [
        helper.make_graph([constant("c"), traced(helper.make_node("Add", ["c", "w"], ["b"]))], "g", [], [value], [each])
        for each in (tensor(secret(), "w"), tensor(secret(), "w"))
    ]
    listed = traced(helper.make_node("Constant", [], ["l"], value_floats=secret().tolist()))
    scaled = helper.make_node("Scaler", ["l"], ["s"], domain="ai.onnx.ml", offset=secret().tolist(), scale=[1.0])
    chosen = traced(helper.make_node("If", ["k"], ["y"], then_branch=branches[0], else_branch=branches[1]))
    summed, called = helper.make_node("Sum", ["y", "s"], ["t"]), helper.make_node("F", ["t"], ["z"], domain="own")
    function = helper.make_function(
        "own", "F", ["x"], ["r"], [constant("i"), traced(helper.make_node("Add", ["x", "i"], ["r"]))],
        [helper.make_opsetid("", 18)],
    )  # fmt: skip
    function.doc_string = "/home/me/secret/net.py(8): forward"
    graph = helper.make_graph(
        [listed, scaled, chosen, summed, called], "net",
        [helper.make_tensor_value_info("k", 9, [])], [helper.make_tensor_value_info("z", 1, [64])],
    )  # fmt: skip
    opsets = [helper.make_opsetid(*each) for each in (("", 18), ("own", 1), ("ai.onnx.ml", 3))]
    model = helper.make_model(graph, functions=[function], opset_imports=opsets, ir_version=9)
    onnx.checker.check_model(model)
    piece = Piece(model, Graph(second_like(tmp_path / "net.onnx", size=16)))
    assert holds_source(Case(piece, piece, {}, {"z": "z"}))
    accepts: Any = SimpleNamespace(accepts=lambda case: True)
    made = redact(Case(piece, piece, {}, {"z": "z"}), accepts)
    assert not holds_source(made)
    onnx.checker.check_model(made.program.model)
    written = made.program.model.SerializeToString()
    assert b"secret" in model.SerializeToString()
    assert b"secret" not in written
    for numbers in secrets:
        assert numbers[5].tobytes() in model.SerializeToString()
        assert not any(number.tobytes() in written for number in numbers[1:-1])


@pytest.mark.slow
def test_a_bundle_that_quotes_source_lines_says_so(tmp_path: Path) -> None:
    model = second_like(tmp_path / "net.onnx", size=16)
    proto = onnx.load(model)
    for node in proto.graph.node:
        traced(node)
    onnx.save(proto, model)
    saved = save(
        tmp_path / "saved",
        model,
        "ort,ort-none@cpu",
        test_model=spoilt(model, lambda e: clip(e, "batchnormalization_7", 0.5)),
    )
    said = "quote source lines and paths"
    bundle(SavedResult.open(saved), tmp_path / "open")
    assert said in (tmp_path / "open" / "README.md").read_text()
    assert b"secret_formula" in (tmp_path / "open" / "model.onnx").read_bytes()
    bundle(SavedResult.open(saved), tmp_path / "redacted", redact=True)
    assert said not in (tmp_path / "redacted" / "README.md").read_text()
    assert not any(b"secret" in file.read_bytes() for file in (tmp_path / "redacted").iterdir())


def test_redaction_refuses_where_the_weights_are_the_fault(scaled: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--redact: the fault is a difference in the weights"):
        bundle(SavedResult.open(scaled), tmp_path / "out", redact=True)
    assert list(tmp_path.iterdir()) == []


def test_an_innocent_layer_is_refused_and_nothing_is_left(scaled: Path, tmp_path: Path) -> None:
    same = save(tmp_path / "saved", second_like(tmp_path / "net.onnx", size=16, depth=0), "ort,ort-all")
    with pytest.raises(InputError, match="no layer of ort-all is guilty"):
        bundle(SavedResult.open(same), tmp_path / "out")
    with pytest.raises(InputError, match="no cut around the layer fails by itself"):
        bundle(SavedResult.open(same), tmp_path / "out", layer="node_relu_2")
    with pytest.raises(InputError, match="has no layer, node or value 'nobody'"):
        bundle(SavedResult.open(same), tmp_path / "out", layer="nobody")
    with pytest.raises(InputError, match="no node computes it"):
        bundle(SavedResult.open(same), tmp_path / "out", layer="x")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["net.onnx", "saved"]


def test_a_result_without_captures_is_refused(scaled: Path, tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text((scaled / "result.json").read_text())
    with pytest.raises(InputError, match="holds no capture of ort-all"):
        bundle(SavedResult.open(tmp_path / "result.json"), tmp_path / "out")


def test_only_the_slice_of_external_weights_travels(tmp_path: Path) -> None:
    net = NetBuilder(0)
    x = net.op("Relu", net.conv("x", 4, 8, name="first"))
    net.conv(x, 8, 8, name="y")
    secret = net.weight(np.full(5000, 7.0, np.float32), "secret")
    net.op("Add", net.op("ReduceMean", x, keepdims=0), secret, name="other")
    path = net.save(tmp_path / "net.onnx", {"x": (1, [1, 4, 8, 8])}, ["y", "other"])
    onnx.save(onnx.load(path), path, save_as_external_data=True, location="net.data", size_threshold=0)
    editor = Editor(path)
    scale_weights(editor, "first", 0.05)
    test = tmp_path / "spoilt" / "test.onnx"
    test.parent.mkdir()
    onnx.save(editor.model, test, save_as_external_data=True, location="test.data", size_threshold=0)
    saved = save(tmp_path / "saved", path, "ort,ort-all", test_model=test)
    bundle(SavedResult.open(saved), tmp_path / "out")
    model = onnx.load(tmp_path / "out" / "model.onnx", load_external_data=False)
    assert {t.name for t in model.graph.initializer} < {"first.1.spoilt", "w_0", "w_1"}
    assert not any(t.external_data for t in model.graph.initializer)
    assert sum(f.stat().st_size for f in (tmp_path / "out").iterdir()) < 20_000


@pytest.mark.slow
def test_emulated_faults_say_so(tmp_path: Path) -> None:
    """FP16 overflow: the emulation's, and the page says it."""
    net = NetBuilder(0)
    big = net.weight(np.float32(40000.0).reshape(1))
    net.op("Mul", net.op("Relu", net.conv("x", 4, 4)), big, name="y")
    net.nodes[-1].name = "<script>alert(1)</script>"
    saved = save(tmp_path / "saved", net.save(tmp_path / "net.onnx", {"x": (1, [1, 4, 8, 8])}, ["y"]), "ort,emu-fp16")
    printed = bundle(SavedResult.open(saved), tmp_path / "out")
    assert "emulated: emu-fp16" in printed
    assert "NaN or Inf 1" in printed
    page = (tmp_path / "out" / "README.md").read_text()
    assert "**This is an emulation.**" in page
    assert "(layer &lt;script&gt;alert(1)&lt;/script&gt;)" in page.splitlines()[0]
    assert "<script>" not in re.sub("`[^`]*`", "", page)


def test_tensorrt_bundles_bring_the_runner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against recorded TensorRT, here and in the fresh process."""
    monkeypatch.delenv("CPDEBUG_TRT_PYTHON", raising=False)
    install("10.3.0", monkeypatch)
    net = NetBuilder(0)
    net.conv(net.op("Relu", net.conv("x", 3, 4, name="c1")), 4, 4, name="y")
    path = net.save(tmp_path / "net.onnx", {"x": (1, [1, 3, 8, 8])}, ["y"])
    saved = save(
        tmp_path / "saved", path, "ort,trt-fp16", test_model=spoilt(path, lambda e: scale_weights(e, "y", 0.5))
    )
    site = tmp_path / "site"
    site.mkdir()
    tests = str(Path(__file__).parent)
    (site / "tensorrt.py").write_text(
        f"import sys\nsys.path.append({tests!r})\nimport fake_tensorrt, trt_runner\n"
        "trt_runner.Cuda = fake_tensorrt.FakeCuda\nsys.modules['tensorrt'] = fake_tensorrt.fake_tensorrt('10.3.0')\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(site))
    printed = bundle(SavedResult.open(saved), tmp_path / "out")
    assert "tensorrt 10.3.0" in printed
    assert (tmp_path / "out" / "trt_runner.py").is_file()
    page = (tmp_path / "out" / "README.md").read_text()
    assert "polygraphy run model.onnx --trt --fp16" in page
    assert "trt_runner.py" in page
    ast.parse((tmp_path / "out" / "repro.py").read_text(), feature_version=(3, 8))


def test_command_line_writes_a_zip(scaled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "bug.zip"
    done = CliRunner().invoke(app, ["bundle", str(scaled), "-o", str(target)])
    assert done.exit_code == 0, done.output
    assert "FAULT" in done.output
    with zipfile.ZipFile(target) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path)
    assert {"bug/README.md", "bug/repro.py", "bug/model.onnx"} <= set(names)
    assert execute(tmp_path / "bug").returncode == 1
    monkeypatch.setattr("cp_debug.reports.bundle.make.Cutter", None)  # they are refused before anything long
    for given, why in ((target, "exists"), ("-", "expected the name of a new folder or .zip")):
        again = CliRunner().invoke(app, ["bundle", str(scaled), "-o", str(given)])
        assert isinstance(again.exception, InputError)
        assert why in str(again.exception)


@pytest.mark.skipif(sys.platform == "darwin", reason="its file systems take text alone")
def test_a_folder_whose_name_is_no_text_holds_a_script_that_runs(scaled: Path, tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"\xff\xfe")
    bundle(SavedResult.open(scaled), folder)
    assert execute(folder).returncode == 1
    for name, inside in ((b"\xff\xfe.zip", "bundle"), (b"n\xff.zip", "n")):
        with _complete(tmp_path / os.fsdecode(name)) as made:
            (made / "a").touch()
        with zipfile.ZipFile(tmp_path / os.fsdecode(name)) as archive:
            assert f"{inside}/a" in archive.namelist()


def test_what_a_script_raised_is_told_in_a_line(scaled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cp_debug.reports.bundle.make.repro", lambda *given: "print('begun')\n1 / 0\n")
    with pytest.raises(InputError) as refused:
        bundle(SavedResult.open(scaled), tmp_path / "out")
    assert str(refused.value).endswith("It said:\nbegun\nZeroDivisionError: division by zero")


def test_a_script_that_shows_nothing_leaves_nothing(
    scaled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cp_debug.reports.bundle.make._limit", lambda output, backend: 1.0)
    with pytest.raises(InputError, match=r"(?s)does not show the fault.*relative L2"):
        bundle(SavedResult.open(scaled), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_reference_at_fault_is_bundled_as_the_accused(tmp_path: Path) -> None:
    model = second_like(tmp_path / "net.onnx", size=16, depth=0)
    reference = create(BackendSpec.parse("emu-fp32"), overrides={"node_conv_3": "bf16"})
    saved = save(tmp_path / "saved", model, [reference, create(BackendSpec.parse("ort"))])
    assert [(row.name, row.side) for row in SavedResult.open(saved).result.tests[0].guilty] == [
        ("node_conv_3", "reference")
    ]
    bundle(SavedResult.open(saved), tmp_path / "out")
    assert [n.name for n in onnx.load(tmp_path / "out" / "model.onnx").graph.node] == ["node_conv_3"]
    page = (tmp_path / "out" / "README.md").read_text()
    assert "# Conv gives a wrong result on emu-fp32" in page
    assert "found in a comparison with ort" in page


def test_without_time_the_layer_is_bundled_as_it_is(scaled: Path, tmp_path: Path) -> None:
    """Where a run is a build of minutes nothing is made smaller, but that it fails is verified, once, and shown."""
    printed = bundle(SavedResult.open(scaled), tmp_path / "bundle", seconds=0.0)
    assert "FAULT" in printed
    page = (tmp_path / "bundle" / "README.md").read_text()
    assert "stopped after 0 s" in page
    assert "1 runs, each verified" in page
    assert execute(tmp_path / "bundle").returncode == 1


@pytest.mark.parametrize("operators", [("Sqrt", "Log"), ("Reciprocal", "Sigmoid")])
def test_a_smaller_case_fails_in_no_other_way(operators: tuple[str, str], tmp_path: Path) -> None:
    """Of zeros, which the network never has, these make Inf: not what was wrong."""
    files = []
    for operator in operators:
        net = NetBuilder()
        positive = net.op("Add", net.op("Abs", net.op("Relu", "x")), net.weight(np.full(1, 0.1, np.float32)), name="p")
        files.append(
            net.save(tmp_path / f"{operator}.onnx", {"x": (1, [2, 8])}, [net.op(operator, positive, name="y")])
        )
    saved = save(tmp_path / "saved", files[0], "ort,ort", test_model=files[1])
    bundle(SavedResult.open(saved), tmp_path / "bundle", layer="y")
    printed = execute(tmp_path / "bundle").stdout
    assert "NaN or Inf 0: FAULT" in printed
    assert "inf," not in printed
    page = (tmp_path / "bundle" / "README.md").read_text()
    (line,) = [line for line in page.splitlines() if line.startswith("| `p` |")]
    assert line.endswith("| captured, then cut, set to zero or rounded |")
