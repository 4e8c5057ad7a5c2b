"""A module against its own export: outputs by position, the operator that was exported wrongly, and what is healthy."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from nets import NetBuilder
from torch import Tensor, nn

from cp_debug.api.diagnose import diagnose
from cp_debug.backends.executor import Executor
from cp_debug.bisect.engine import bisect
from cp_debug.bisect.options import Options
from cp_debug.bisect.result import BisectResult
from cp_debug.errors import InputError
from cp_debug.graph.graph import Graph
from cp_debug.recipes.torch_callable import TorchModel
from cp_debug.recipes.torch_programs import load_callable
from cp_debug.reports.verdict_line import verdict_line


class Around(nn.Module):
    """A linear layer, ``op``, and where ``layers`` is larger as many more layers behind it."""

    def __init__(self, op: Callable[[Tensor], Any], layers: int = 0) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.a, self.op = nn.Linear(6, 16), op
        self.rest = nn.Sequential(*(nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(layers)))

    def forward(self, x: Tensor) -> Any:
        result = self.op(self.a(x))
        return self.rest(result) if len(self.rest) else result


def bisected(op: Callable[[Tensor], Any], layers: int = 0, exporter: str = "torchscript") -> BisectResult:
    """``torch,ort`` of a module around ``op``, which takes and gives [2, 9, 16]."""
    module = Around(op, layers).eval()
    x = torch.randn(2, 9, 6, generator=torch.Generator().manual_seed(0))
    return diagnose(module, "torch,ort", inputs=(x,), options=Options(exporter=exporter, cache=False))


def far_roll(x: Tensor) -> Tensor:
    """The TorchScript exporter writes a roll by more than the length as if nothing moved."""
    return torch.roll(x, 20, 1)


def divided(x: Tensor) -> Tensor:
    """Both exporters lose divisor_override."""
    return F.avg_pool2d(x.unsqueeze(1), (1, 2), stride=1, padding=(0, 1), divisor_override=3)[:, 0, :, :16]


def scattered(x: Tensor, **how: Any) -> Tensor:
    """dynamo's exporter loses the reduction."""
    index = torch.tensor([0, 0, 3, 3, 3, 4, 5, 5, 8]).view(1, 9, 1).expand(2, 9, 16)
    return torch.scatter_reduce(x, 1, index, x * 2, "mean", **how)


def written_late(x: Tensor) -> Tensor:
    """Written through a view after it was made: the TorchScript exporter gives it as it was before."""
    y = x.clone()
    y.transpose(1, 2).add_(torch.arange(9).float())
    return y


@pytest.mark.few(2)
@pytest.mark.parametrize(
    ("op", "outputs"),
    [
        (far_roll, 1),
        (written_late, 1),
        (lambda x: (x * 2, far_roll(x)), 1),
        (lambda x: {"b": x + 1, "a": [x, {"c": written_late(x)}]}, 1),
        (lambda x: (far_roll(x), x, far_roll(x)), 2),
    ],
    ids=["only one", "written", "tuple", "nested", "twice"],
)
def test_an_output_is_what_the_module_returned_and_no_equal_tensor_inside(op: Any, outputs: int) -> None:
    result = bisected(op)
    assert not result.agrees
    wrong = [row for row in result.tests[0].outputs if not row.within]
    assert len(wrong) == outputs
    assert all(row.stats.rel_l2 > 0.1 for row in wrong)


@pytest.mark.few(2)
@pytest.mark.parametrize("exporter", ["dynamo", "torchscript"])
@pytest.mark.parametrize(
    "op",
    [
        lambda x: (x, x),
        lambda x: {"b": x.relu(), "a": (x, [x.relu()])},
        lambda x: x.transpose(1, 2).contiguous(),
        lambda x: (x[0], x.sum(), torch.zeros(3)),
    ],
    ids=["twice", "nested", "view", "constant"],
)
def test_healthy_outputs_agree(op: Callable[[Tensor], Any], exporter: str) -> None:
    result = bisected(op, exporter=exporter)
    assert result.agrees
    assert all(row.within for row in result.tests[0].outputs)


@pytest.mark.parametrize("exporter", ["dynamo", "torchscript"])
def test_an_output_that_is_an_input_is_compared(exporter: str) -> None:
    class Given(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return x, x * 2, x

    result = diagnose(
        Given().eval(), "torch,ort", inputs=(torch.randn(2, 3),), options=Options(exporter=exporter, cache=False)
    )
    assert result.agrees
    assert len(result.tests[0].outputs) == 3


@pytest.mark.few(2)
@pytest.mark.parametrize(
    ("op", "exporter", "cause", "at", "says"),
    [
        (far_roll, "torchscript", "lost-operator", "roll", "leaves `roll(shifts=[20], dims=[1])` out"),
        (divided, "torchscript", "lost-argument", "avg_pool2d", "without divisor_override=3"),
        (divided, "dynamo", "lost-argument", "avg_pool2d", "without divisor_override=3"),
        (scattered, "dynamo", "export", "scatter_reduce", "computes `scatter_reduce(dim=1, reduce='mean')`"),
        (written_late, "torchscript", "lost-operator", "add_", "leaves `add_()` out"),
    ],
)
def test_the_operator_that_was_exported_wrongly_is_named_alone(
    op: Any, exporter: str, cause: str, at: str, says: str
) -> None:
    (test,) = bisected(op, 6, exporter).tests
    (finding,) = test.findings
    assert (finding.side, finding.cause) == ("export", cause)
    assert f"the exported graph does not compute what the module does, at `{at}` (" in finding.says
    assert "test_wrong_exports.py:" in finding.says
    assert says in finding.says
    assert [row.name for row in test.guilty] == finding.layers
    assert len(finding.layers) == 1
    assert "reference" not in finding.headline
    assert test.compared > 10  # the layers behind it are paired


@pytest.mark.parametrize(
    ("op", "layer", "epsilon"),
    [
        (lambda x: x / torch.sqrt((x * x).sum(-1, keepdim=True) + 1e-12), "Sqrt", "1e-12"),
        (lambda x: x / (x.abs().sum(-1, keepdim=True) + 1e-10), "Div", "1e-10"),
        (lambda x: torch.log(torch.softmax(x * 1e3, -1) + 1e-9), "Log", "1e-09"),
    ],
)
def test_an_epsilon_that_the_exporter_left_out_is_named(op: Callable[[Tensor], Any], layer: str, epsilon: str) -> None:
    """dynamo's optimizer takes small constants for 0. Norms are the same without, and 0 ÷ 0 is NaN."""
    module = Around(op).eval()
    nn.init.zeros_(module.a.bias)
    x = torch.randn(2, 9, 6, generator=torch.Generator().manual_seed(0))
    x[0, 0] = 0
    (test,) = diagnose(module, "torch,ort", inputs=(x,), options=Options(exporter="dynamo", cache=False)).tests
    (finding,) = test.findings
    assert (finding.cause, finding.ops, finding.side) == ("lost-operator", [layer], "export")
    assert f"the graph leaves `add(other={epsilon})` out" in finding.says
    assert finding.fix.startswith("--exporter torchscript: tried")


def test_each_of_several_faults_is_found() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = Around(far_roll, 2), nn.Linear(16, 6)
            self.three = Around(divided, 2)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.three(self.two(self.one(x)))
            return y

    options = Options(exporter="torchscript", cache=False)
    (test,) = diagnose(Twice().eval(), "torch,ort", inputs=(torch.randn(2, 9, 6),), options=options).tests
    assert sorted(f.cause for f in test.findings) == ["lost-argument", "lost-operator"]
    assert [row.name for row in test.guilty] == ["one/roll", "three/avg_pool2d"]


def test_the_module_as_the_test_is_told_likewise() -> None:
    module = Around(divided, 3).eval()
    (test,) = diagnose(module, "ort,torch", inputs=(torch.randn(2, 9, 6),), options=Options(cache=False)).tests
    (finding,) = test.findings
    assert (finding.side, finding.cause) == ("export", "lost-argument")


def test_the_other_exporter_is_tried_and_named_where_it_is_right() -> None:
    (finding,) = bisected(far_roll, 2, "torchscript").findings
    assert finding.fix.startswith("--exporter dynamo: tried")
    (finding,) = bisected(divided, 2, "torchscript").findings
    assert "--exporter" not in finding.fix  # both lose it


class Decides(nn.Module):
    """Goes another way where the sum of a layer is negative."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        y = torch.relu(y) if y.sum() > 0 else torch.tanh(y) * 2
        result: Tensor = self.b(y)
        return result


def test_what_dynamo_refuses_torchscript_exports_and_that_is_said() -> None:
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    result = diagnose(Decides().eval(), "torch,ort", inputs=(x,), options=Options(cache=False))
    assert result.agrees
    (note,) = (n for n in result.tests[0].notes if "cannot be exported by dynamo" in n)
    assert note.endswith("; torchscript exported it")
    with pytest.raises(InputError, match="cannot be exported by dynamo"):
        diagnose(Decides().eval(), "torch,ort", inputs=(x,), options=Options(cache=False, exporter="dynamo"))


def test_control_flow_that_tracing_fixed_is_named(tmp_path: Path) -> None:
    module = Decides().eval()
    made = torch.Generator().manual_seed(0)
    samples = [torch.randn(3, 4, generator=made) for _ in range(8)]
    ways = [bool(module.a(x).sum() > 0) for x in samples]
    for name, x in (("0", samples[ways.index(True)]), ("1", samples[ways.index(False)])):
        np.savez(tmp_path / f"{name}.npz", x=x.numpy())
    options = Options(cache=False, exporter="torchscript", samples=2, inputs=tmp_path)
    result = bisect(TorchModel("decides", module, (samples[0],)), "torch,ort", options=options)
    (finding,) = result.findings
    assert (finding.cause, finding.side) == ("control-flow", "export")
    assert "tracing froze a decision of the module at " in finding.says
    assert "if y.sum() > 0 else" in finding.says


def test_backends_that_run_the_wrong_graph_alike_agree() -> None:
    module = Around(divided, 3).eval()
    assert diagnose(module, "emu-fp32,ort", inputs=(torch.randn(2, 9, 6),), options=Options(cache=False)).agrees


@pytest.mark.parametrize("exporter", ["dynamo", "torchscript"])
def test_nobody_is_guilty_of_a_tie(exporter: str) -> None:
    def chosen(x: Tensor) -> Tensor:
        scores = (x * 0)[..., 0]
        best = torch.topk(scores, 5, 1)[1].unsqueeze(-1)
        return x.gather(1, best.expand(-1, -1, 16))

    (test,) = bisected(chosen, 3, exporter).tests
    assert not test.guilty
    assert not test.agrees
    assert test.first_divergent is not None
    assert "ties are broken differently in" in test.first_divergent.why
    line = verdict_line(test).plain
    assert f"✗ ort: ties are broken differently at {test.first_divergent.name} (TopK" in line
    assert re.search(
        r"\) in \d+ places?, the first at \[.*\]: elements \d+ and \d+ are equal, so either choice is right", line
    )
    assert "right and nothing need be mended; final outputs differ by" in line
    assert "divergent" not in line
    assert not test.findings, "of layers that have nothing to do with it"
    if exporter == "dynamo":
        assert f"{Path(__file__).name}:" in line


def test_a_tie_in_a_later_sample_is_one_too(tmp_path: Path) -> None:
    class Chosen(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            best = torch.topk(x[..., 0], 5, 1)[1].unsqueeze(-1)
            return x.gather(1, best.expand(-1, -1, 4)) * 2

    made = torch.Generator().manual_seed(0)
    samples = [torch.randn(2, 60, 4, generator=made) for _ in range(2)]
    samples[1][..., 0] = 0.5
    for index, x in enumerate(samples):
        np.savez(tmp_path / f"{index}.npz", x=x.numpy())
    options = Options(cache=False, samples=2, inputs=tmp_path)
    (test,) = bisect(TorchModel("chosen", Chosen().eval(), (samples[0],)), "torch,ort", options=options).tests
    assert not test.guilty
    assert not test.agrees
    assert any(row.why.endswith("so either choice is right and nothing need be mended") for row in test.rows)
    [note] = [note for note in test.notes if "ties" in note or "flip" in note]  # what lies behind is told with it
    assert note.partition("; for that reason ")[2].endswith(" differ, too"), note


@pytest.mark.parametrize("exporter", ["dynamo"])
def test_wholly_masked_rows_are_laid_at_the_mask(exporter: str) -> None:
    def attended(x: Tensor) -> Tensor:
        mask = torch.ones(9, 9, dtype=torch.bool)
        mask[6:] = False
        x = x.unsqueeze(1)
        return F.scaled_dot_product_attention(x, x, x, attn_mask=mask).squeeze(1)

    (finding,) = bisected(attended, 3, exporter).findings
    assert (finding.side, finding.cause) == ("export", "lost-argument")
    assert "a mask of -3.4e+38 where the module has −Inf" in finding.says


def test_torch_prints_nothing_where_an_export_fails(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError, match="ONNX does not support mean reduction"):
        bisected(scattered)
    assert "graph(" not in capfd.readouterr().out


def test_packed_weights_are_said_in_words() -> None:
    quantized = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(4, 4), nn.ReLU()).eval(), {nn.Linear})
    with pytest.raises(InputError, match="quantized weights in torch's packed form"):
        diagnose(quantized, "torch,ort", inputs=(torch.randn(2, 4),), options=Options(cache=False))


def test_what_is_left_in_train_mode_is_named() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.BatchNorm1d(4)).eval()
    module[3].train()
    (note,) = TorchModel("part", module, (torch.randn(5, 4),)).notes
    assert note.startswith("of the module, 3 was passed in train mode")


def test_a_file_imports_what_stands_beside_it_and_holds_modules(tmp_path: Path) -> None:
    (tmp_path / "standing_beside_it.py").write_text("WIDTH = 4\n")
    text = "import torch\nfrom standing_beside_it import WIDTH\nnet = torch.nn.Linear(WIDTH, 2).eval()\n"
    text += "make = lambda: net\n"
    (tmp_path / "own.py").write_text(text)
    np.savez(tmp_path / "x.npz", input=np.zeros((3, 4), np.float32))
    for name in ("net", "make"):
        loaded = load_callable(f"{tmp_path}/own.py:{name}", inputs=tmp_path / "x.npz")
        assert loaded.components[0].input_names == ["input"]
        with pytest.raises(InputError, match="a module without example inputs; expected them with --inputs"):
            load_callable(f"{tmp_path}/own.py:{name}")


@pytest.mark.parametrize(
    ("shape", "kernel", "attributes"),
    [
        ([2, 3, 9, 16], [2, 2], {"strides": [2, 2]}),
        ([2, 2, 9, 7], [3, 2], {"strides": [2, 1], "pads": [1, 0, 1, 1], "ceil_mode": 1}),
        ([2, 2, 9], [3], {"pads": [1, 1], "dilations": [2]}),
        ([1, 2, 5, 6, 7], [2, 3, 2], {"strides": [1, 2, 1], "pads": [0, 1, 0, 1, 1, 1]}),
    ],
)
def test_places_of_a_max_pool_are_those_of_onnx_runtime(
    tmp_path: Path, shape: list[int], kernel: list[int], attributes: dict[str, Any]
) -> None:
    net = NetBuilder()
    net.op("MaxPool", "x", outputs=2, name="y", kernel_shape=kernel, **attributes)
    net.op("Cast", "y_1", name="places", to=1)
    path = net.save(tmp_path / "net.onnx", {"x": (1, shape)}, ["y_0", "places"])
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    right = onnxruntime.InferenceSession(path).run(["places"], {"x": x})[0]
    given = Executor(Graph(path)).run({"x": torch.from_numpy(x)})["places"]
    np.testing.assert_array_equal(given.numpy(), right)
