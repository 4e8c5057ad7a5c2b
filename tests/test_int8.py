"""INT8 in the main job: quantized on the fly, healthy layers explained, bad scales found and named."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from extras import needs
from nets import calibrate_graph, second_like
from torch import Tensor, nn
from typer.testing import CliRunner

from cp_debug.backends.base import Program
from cp_debug.backends.ort_backend import OrtBackend, OrtSession
from cp_debug.backends.registry import create
from cp_debug.backends.spec import BackendSpec, parse_backends
from cp_debug.bisect.engine import Options, bisect
from cp_debug.bisect.result import BisectResult, TestResult
from cp_debug.cli.main import app
from cp_debug.errors import BackendUnavailable, InputError
from cp_debug.graph.graph import Graph
from cp_debug.graph.qdq import insert_qdq
from cp_debug.graph.scales import LayerScales, Scales
from cp_debug.graph.surgery import extract
from cp_debug.probes.trace import trace
from cp_debug.programs.pipeline import Export, prepare
from cp_debug.quantization.checkpoint import save_ptq_model
from cp_debug.quantization.ptq import quantize_ptq
from cp_debug.quantization.quantized_programs import Calibration, calibrate, quantized_programs
from cp_debug.recipes.registry import load_model
from cp_debug.recipes.torch_callable import TorchModel
from cp_debug.reports.saved import SavedResult

pytestmark = needs("modelopt")

IN_INT8 = "ort-int8,emu-int8,torch-int8"


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm(self.conv(x)) + x)


class Net(nn.Module):
    """Everything that is quantized: convolutions, one transposed, linear layers, a residual addition."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.blocks = nn.Sequential(Block(16), Block(16))
        self.up, self.up_norm = nn.ConvTranspose2d(16, 8, 2, stride=2), nn.BatchNorm2d(8)
        self.head, self.scores = nn.Conv2d(8, 4, 1), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.blocks(self.stem(x))
        return self.head(torch.relu(self.up_norm(self.up(x)))), self.scores(x.mean((2, 3)))


@pytest.fixture(scope="module")
def model() -> TorchModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Net()
        for part in net.modules():
            if isinstance(part, nn.BatchNorm2d):
                nn.init.uniform_(part.running_var, 0.5, 2)
        return TorchModel("net", net.eval(), torch.randn(2, 3, 32, 32))


@pytest.fixture(scope="module")
def result(model: TorchModel, tmp_path_factory: pytest.TempPathFactory) -> BisectResult:
    return bisect(model, f"torch,{IN_INT8}", options=Options(save=tmp_path_factory.mktemp("saved")))


def departures(test: TestResult) -> list[float]:
    return [
        row.replay.deviation_from_scales
        for row in test.rows
        if row.replay and row.replay.deviation_from_scales is not None
    ]


def test_healthy_layers_introduce_what_int8_must(result: BisectResult) -> None:
    for test in result.tests:
        assert test.guilty == []
        assert any("quantized on the fly: mse on 8 samples" in note for note in test.notes)
        assert len(departures(test)) == 8, (
            test.backend.spec
        )  # four convolutions, one transposed, a linear one, two sums
        assert max(departures(test)) < 1e-3
        for row in test.rows:
            if row.op != "input":
                assert row.replay is not None
                assert row.replay.excess is not None
                assert row.replay.excess < 2
                assert (row.replay.channel_excess or 0) < 2


def test_quantized_layers_tell_step_and_clipping(result: BisectResult) -> None:
    rows = {row.name: row for row in result.tests[0].rows}
    replay = rows["head"].replay
    assert replay is not None
    assert replay.step is not None
    assert 0 < replay.step < 0.2
    assert replay.clipped is not None
    assert replay.clipped < 0.01
    assert replay.declared == pytest.approx(replay.introduced, rel=1e-3)
    other = rows["stem.2"].replay
    assert other is not None
    assert other.step is None
    block = json.loads(json.dumps(result.to_dict()))["tests"][0]["layers"][rows["head"].index]
    assert (block["step"], block["clipped"]) == (replay.step, replay.clipped)


@pytest.mark.slow
def test_the_costliest_layer_is_named_with_the_option_that_spares_it(model: TorchModel) -> None:
    (test,) = bisect(model, "torch,ort-int8", options=Options(rtol=1e-4)).tests
    (finding,) = test.findings
    assert finding.cause == "int8"
    assert finding.effect.share is not None
    assert finding.effect.share > 0.1
    modules = re.findall(r"--skip-layers ([\w.]+)", finding.fix)
    assert finding.fix.startswith("leave unquantized: "), finding.fix
    for module in modules:
        assert isinstance(model.components[0].module.get_submodule(module), nn.Module)
    calibration = Calibration(skip_layers=modules)
    (spared,) = bisect(model, "torch,ort-int8", options=Options(rtol=1e-4, calibration=calibration)).tests
    steps = {row.name: row.replay.step for row in spared.rows if row.replay}
    assert steps[finding.layers[0]] is None


def test_a_saved_result_keeps_the_quantized_files(result: BisectResult) -> None:
    folder = Path(result.programs["Net"])
    assert not folder.is_absolute()
    programs = {test.backend.spec: test.programs["Net"] for test in result.tests}
    assert set(programs.values()) == {"Net.int8.onnx"}


def test_two_backends_in_int8_are_judged_by_what_they_introduce(model: TorchModel) -> None:
    (test,) = bisect(model, "torch-int8,ort-int8").tests
    assert test.agrees
    assert any("both sides are INT8" in note for note in test.notes)
    assert np.isinf(test.atol)
    assert test.to_dict()["tolerance"]["atol"] == "Infinity"


def quantize(model: TorchModel, folder: Path) -> tuple[Program, Program]:
    """(The FP32 program, the same in INT8)."""
    (sample,) = model.samples(1, 0, None)
    plain = prepare(model, sample, folder, how=Export(fused=True))
    parts = calibrate(model, plain, model.samples(4, 0, None), Calibration())
    return plain[0], quantized_programs(model, plain, parts, sample, folder)[0]


def test_torch_and_onnx_runtime_agree_when_fed_the_same_inputs(model: TorchModel, tmp_path: Path) -> None:
    """Layer by layer, ONNX Runtime given torch's values: 60 dB or better."""
    plain, program = quantize(model, tmp_path)
    (sample,) = model.samples(1, 0, None)
    seen = dict(sample.arrays)
    session = create(BackendSpec.parse("torch-int8")).open(program)
    session.run(sample.arrays, lambda name, tensor: seen.__setitem__(name, np.asarray(tensor).copy()))
    assert set(plain.graph.values) - set(seen) <= set(plain.graph.initializers) | {"val_0"}
    levels = {}
    for value in seen.keys() & set(plain.graph.values):
        nodes, starts = program.graph.segment([value], seen.keys() - {value})
        part = extract(program.graph, nodes, [value])
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        made = ort.InferenceSession(part.SerializeToString(), options).run([value], {s: seen[s] for s in starts})[0]
        noise = np.linalg.norm(made - seen[value])
        levels[value] = 20 * np.log10(np.linalg.norm(seen[value]) / noise) if noise else np.inf
    assert min(levels.values()) > 60, levels


def test_a_fake_quantized_layer_is_traced_as_one(model: TorchModel, tmp_path: Path) -> None:
    plain, program = quantize(model, tmp_path)
    (sample,) = model.samples(1, 0, None)
    inputs = {name: torch.from_numpy(array) for name, array in sample.arrays.items()}
    names: list[str] = []
    assert program.module is not None
    record = trace(program.module, inputs, lambda value, tensor: names.append(value.name))
    assert {"stem.0", "blocks.0.conv", "up", "scores"} <= record.leaves.keys()
    assert not [name for name in (*names, *record.leaves, *record.calls) if "quantizer" in name]
    assert plain.alignment is not None


# What is wrong is found: an ONNX file, ReLU after every layer, each weight's channels of very different size.


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = second_like(tmp_path_factory.mktemp("net") / "net.onnx")
    proto = onnx.load(path)
    for weight in proto.graph.initializer:
        array = onnx.numpy_helper.to_array(weight)
        if array.ndim == 4:
            spread = np.geomspace(0.03, 1, len(array), dtype=np.float32).reshape(-1, 1, 1, 1)
            weight.CopyFrom(onnx.numpy_helper.from_array(array * spread, weight.name))
    onnx.save(proto, path)
    return path


@pytest.fixture(scope="module")
def scales(net: Path) -> Scales:
    return calibrate_graph(Graph(net), (s.arrays for s in load_model(str(net)).samples(4, 0, None)))


LAYER = 2  # as many channels go in as come out


def changed(scales: Scales, **parts: object) -> tuple[str, dict[str, LayerScales]]:
    """One layer with other scales, and its name."""
    name = list(scales.layers)[LAYER]
    return name, {**scales.layers, name: dataclasses.replace(scales.layers[name], **parts)}


def worst(net: Path, test_model: Path) -> tuple[list[str], str]:
    (test,) = bisect(str(net), "ort,ort-int8", test_model=test_model).tests
    producer = Graph(net).producer
    cause = next((f.cause for f in test.findings if set(f.layers) & {row.name for row in test.guilty}), "")
    return [producer[row.onnx].name for row in test.guilty], cause


@pytest.mark.few(2)
@pytest.mark.parametrize(
    ("cause", "parts"),
    [
        ("", lambda old: {}),
        ("int8-clipped", lambda old: {"input": old.input / 6}),
        ("int8-coarse", lambda old: {"input": old.input * 16}),
        ("int8-per-tensor", lambda old: {"weight": old.weight.max(keepdims=True)}),
        ("int8-weights", lambda old: {"weight": old.weight / 3}),
    ],
)
def test_a_bad_scale_is_guilty(net: Path, scales: Scales, tmp_path: Path, cause: str, parts) -> None:
    name, layers = changed(scales, **parts(list(scales.layers.values())[LAYER]))
    file = insert_qdq(Graph(net), layers, tmp_path / "int8.onnx")
    assert worst(net, file) == ([name] if cause else [], cause)


@pytest.mark.few(1)
@pytest.mark.parametrize("backend", ["ort", "ort-int8"])
def test_the_fix_for_a_file_that_came_quantized_quantizes_it_again(
    net: Path, scales: Scales, tmp_path: Path, backend: str
) -> None:
    """No flag of the command that compares reaches the pairs of such a file; what is offered runs as it is written."""
    name, layers = changed(scales, input=list(scales.layers.values())[LAYER].input / 6)
    file = insert_qdq(Graph(net), layers, tmp_path / "int8.onnx")
    (test,) = bisect(str(net), f"ort,{backend}", test_model=file).tests
    (fix,) = (f.fix for f in test.findings if f.cause == "int8-clipped")
    calibrating, _, skipping = fix.partition("(")[2].partition("), or leave it unquantized: ")
    data = tmp_path / "data.npz"
    np.savez(data, **next(iter(load_model(str(net)).samples(1, 0, None))).arrays)
    for command, quantized in ((calibrating, True), (skipping, False)):
        folder = tmp_path / f"again-{quantized}"
        words = command.replace("FOLDER", str(folder)).replace("DATA", str(data)).split()
        ran = CliRunner().invoke(app, [*words[1:], "--batches", "1"])
        assert ran.exit_code == 0, ran.output
        (made,) = folder.glob("*.onnx")
        inputs = {node.name: node.input[0] for node in onnx.load(made).graph.node}
        assert inputs[name].endswith("dequantized") == quantized


def test_scales_along_the_wrong_axis_are_guilty(net: Path, scales: Scales, tmp_path: Path) -> None:
    name, layers = changed(scales)
    proto = onnx.load(insert_qdq(Graph(net), layers, tmp_path / "int8.onnx"))
    weight = next(node for node in proto.graph.node if node.name == name).input[1]
    pair = [node for node in proto.graph.node if weight in node.output]
    pair += [node for node in proto.graph.node if pair[0].input[0] in node.output]
    for node in pair:
        node.attribute[0].i = 1
    onnx.save(proto, tmp_path / "axis.onnx")
    assert worst(net, tmp_path / "axis.onnx") == ([name], "int8-axis")


class Disobedient(OrtBackend):
    """Runs another file than the one it is given."""

    file: Path

    def open(self, program: Program) -> OrtSession:
        return super().open(dataclasses.replace(program, graph=Graph(self.file)))


def test_a_backend_that_does_not_do_what_its_scales_say_is_told_apart(
    net: Path, scales: Scales, tmp_path: Path
) -> None:
    name, layers = changed(scales, input=scales.layers[list(scales.layers)[LAYER]].input / 6)
    good = insert_qdq(Graph(net), scales.layers, tmp_path / "good.onnx")
    backend = Disobedient(BackendSpec.parse("ort-int8"))
    backend.file = insert_qdq(Graph(net), layers, tmp_path / "bad.onnx")
    (test,) = bisect(str(net), [create(BackendSpec("ort")), backend], test_model=good).tests
    (row,) = test.guilty
    assert Graph(net).producer[row.onnx].name == name
    assert "does not follow its scales" in row.why
    (obeyed,) = bisect(str(net), "ort,ort-int8", test_model=backend.file).tests
    assert "although it follows its scales" in obeyed.guilty[0].why


def test_an_onnx_file_is_quantized_by_itself(net: Path) -> None:
    skip = next(iter(Graph(net).producer.values())).name
    options = Options(calibration=Calibration(method="max", samples=3, skip_layers=[skip]))
    result = bisect(str(net), "ort,ort-int8,emu-int8", options=options)
    for test in result.tests:
        assert test.guilty == []
        assert "quantized on the fly: max on 3 samples" in test.notes
        assert test.rows[1].replay is not None
        assert test.rows[1].replay.step is None
        assert test.rows[1].replay.introduced < 1e-5
    with pytest.raises(BackendUnavailable, match="emu-int8"):
        bisect(str(net), "ort,torch-int8")


def test_a_component_without_a_quantized_layer_still_runs(net: Path) -> None:
    result = bisect(str(net), "ort,emu-int8,ort-int8", options=Options(calibration=Calibration(skip_layers=["*"])))
    assert result.tests[0].agrees
    assert result.tests[1].agrees


def test_integer_kernels_are_missed(net: Path) -> None:
    (test,) = bisect(str(net), "ort,ort-int8-qlinear", options=Options(explain=False)).tests
    assert any("no integer kernel ran" in note for note in test.notes)


def test_a_quantized_checkpoint_is_taken_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(
        "import sys\nfrom pathlib import Path\nimport torch\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\nfrom test_int8 import Net\n"
        "def build():\n    torch.manual_seed(1)\n    return Net().eval(), torch.randn(1, 3, 16, 16)\n"
    )
    torch.manual_seed(0)
    batch = torch.randn(1, 3, 16, 16)
    quantized = quantize_ptq(Net().eval(), [torch.randn(8, 3, 16, 16), batch], skip_layers=["head"])
    name = TorchModel("net", Net(), batch).components[0].name
    save_ptq_model({name: quantized}, tmp_path / "out.pt")
    options = Options(checkpoint=tmp_path / "out.pt")
    result = bisect(f"{tmp_path / 'net.py'}:build", f"torch,{IN_INT8}", options=options)
    for test in result.tests:
        assert test.guilty == []
        assert f"quantized as in {tmp_path / 'out.pt'}" in test.notes
        steps = {row.name: row.replay.step for row in test.rows if row.replay}
        assert steps["head"] is None
        assert steps["scores"] is not None


@pytest.mark.parametrize("spec", ["ort-int8", "emu-int8", "torch-int8"])
def test_a_model_that_is_not_quantized_is_refused(spec: str, net: Path) -> None:
    with pytest.raises((InputError, BackendUnavailable), match="quantize the model first"):
        create(BackendSpec.parse(spec)).open(Program("net", Graph(net)))


def test_the_specs_are_known() -> None:
    assert [s.variant for s in parse_backends("torch-int8,ort-int8,ort-int8-qlinear@cpu")][-1] == "int8-qlinear"


def test_a_saved_result_can_be_opened_again(result: BisectResult, tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text(json.dumps(result.to_dict()))
    again = SavedResult.open(tmp_path).result
    for old, new in zip(result.tests, again.tests, strict=True):
        assert new.programs == old.programs
        assert departures(new) == departures(old)
