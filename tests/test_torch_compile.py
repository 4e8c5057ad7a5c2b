"""torch.compile as a backend: values inside, names, graphs that break, refusals, faults of the compiler."""

from __future__ import annotations

import logging
import operator
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from stress import OUTPUTS, make_stress
from torch import Tensor, nn

from cp_debug.backends import torch_compile
from cp_debug.backends.base import Program
from cp_debug.backends.capabilities import HasRemarks, kernels_of
from cp_debug.backends.registry import create
from cp_debug.backends.spec import BackendSpec, CompileOptions, parse_backends
from cp_debug.bisect.engine import Options, bisect
from cp_debug.bisect.finding import MISSING_CASTS, ROUNDED_SCALAR
from cp_debug.bisect.special_values import TURNED
from cp_debug.errors import BackendUnavailable, InputError, ModuleFailed
from cp_debug.graph.graph import Graph
from cp_debug.programs.align import align
from cp_debug.programs.export import export
from cp_debug.recipes.torch_callable import TorchModel
from cp_debug.reports.verdict_line import verdict_line


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    yield
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


def program_of(module: nn.Module, args: tuple[Tensor, ...], folder: Path, **options: Any) -> Program:
    names = [f"x{i}" for i in range(len(args))]
    options.setdefault("output_names", ["y"])
    graph = Graph(export(module, args, folder / "net.onnx", input_names=names, **options))
    example = {name: tensor.numpy() for name, tensor in zip(names, args, strict=True)}
    return Program("net", graph, module, align(graph, module, args), example=example)


@pytest.fixture(scope="module")
def stress(tmp_path_factory: pytest.TempPathFactory) -> Program:
    module, image = make_stress()
    return program_of(module, (image,), tmp_path_factory.mktemp("net"), output_names=OUTPUTS)


def run(spec: str, program: Program, inputs: Any = None, **options: Any) -> tuple[Any, dict[str, Tensor]]:
    values: dict[str, Tensor] = {}
    session = create(BackendSpec.parse(spec)).open(program)
    given = program.example if inputs is None else inputs
    outputs = session.run(given, lambda n, t: values.update({n: t.clone()}), **options)
    session.close()
    return outputs, values


def test_specs_have_one_spelling_each() -> None:
    assert [str(s) for s in parse_backends("torch-compile:dynamic:aot_eager,torch-compile-bf16:casts@cpu")] == [
        "torch-compile:aot_eager:dynamic",
        "torch-compile-bf16:casts@cpu",
    ]
    assert CompileOptions.parse(":max-autotune:casts") == CompileOptions(mode="max-autotune", casts=True)
    for text, says in {
        "torch-compile:aot_eage": "did you mean",
        "torch-compile:eager:casts": "remove eager",
        "torch-compile:eager:inductor": "repeats",
        "torch:dynamic": "no options",
    }.items():
        with pytest.raises(InputError, match=says):
            BackendSpec.parse(text)


@pytest.mark.slow
@pytest.mark.parametrize("compiler", ["aot_eager", "eager"])
def test_all_values_have_the_names_and_numbers_of_eager(compiler: str, stress: Program) -> None:
    exact, expected = run("torch", stress)
    outputs, values = run(f"torch-compile:{compiler}", stress)
    assert list(outputs) == OUTPUTS
    for name in OUTPUTS:
        np.testing.assert_allclose(outputs[name], exact[name], rtol=1e-5, atol=1e-6)
    assert len(values) > 40
    for name, tensor in values.items():  # in-place ReLUs among them, which overwrite what is shown
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-6, msg=name)
    inner = {link.onnx for link in stress.alignment.links if link.torch is not None and ":" not in link.torch}  # type: ignore[union-attr]
    assert inner - set(values) <= {"x0"}, "only values inside a function of torch are left out"


@pytest.mark.slow
def test_narrow_types_and_probes(stress: Program) -> None:
    _, expected = run("torch-bf16", stress)
    _, values = run("torch-compile-bf16:aot_eager", stress, probes={"gelu", "map"})
    assert list(values) == ["gelu", "map"]
    assert values["gelu"].dtype == torch.bfloat16
    torch.testing.assert_close(values["gelu"], expected["gelu"])


class Broken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).sigmoid()
        torch._dynamo.graph_break()
        x = self.first(x).sigmoid()
        return self.second(x * 2 if x.sum().item() > 0 else x)


def test_each_piece_between_graph_breaks_is_judged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    program = program_of(Broken().eval(), (torch.randn(3, 8),), tmp_path, exporter="torchscript")
    session = create(BackendSpec.parse("torch-compile:aot_eager")).open(program)
    values: dict[str, Tensor] = {}
    session.run(program.example or {}, lambda n, t: values.update({n: t.clone()}))
    _, expected = run("torch", program)
    assert expected.keys() - values.keys() <= {"x0"}
    for name, tensor in values.items():
        torch.testing.assert_close(tensor, expected[name])
    assert isinstance(session, HasRemarks)
    (note,) = session.notes
    assert note.startswith("torch.compile breaks the module into 3 graphs: test_torch_compile.py:")
    assert "graph_break" in note
    assert "Tensor.item()" in note
    warned = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert not warned, "what dynamo says of breaks is in the note"


@pytest.mark.slow
def test_other_shapes_are_looked_at_afresh(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, x = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 2)).eval(), torch.randn(3, 8)
    program = program_of(module, (x,), tmp_path, dynamic_axes={"x0": {0: "n"}})
    session = create(BackendSpec.parse("torch-compile:aot_eager")).open(program)
    for size in (3, 5, 7):
        inputs, values = {"x0": np.random.default_rng(size).standard_normal((size, 8), np.float32)}, dict[str, Tensor]()
        session.run(inputs, lambda n, t, values=values: values.update({n: t.clone()}))  # type: ignore[misc]
        _, expected = run("torch", program, inputs)
        assert expected.keys() - values.keys() <= {"x0"}
        for name, tensor in values.items():
            torch.testing.assert_close(tensor, expected[name], msg=f"{name} of {size}")


@pytest.mark.slow
def test_random_numbers_are_drawn_as_eager_draws_them(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 2)).eval()
    program = program_of(module, (torch.randn(3, 8),), tmp_path)
    module.train()
    exact, _ = run("torch", program)
    outputs, _ = run("torch-compile:aot_eager", program)
    (name,) = exact
    assert np.count_nonzero(exact[name])
    np.testing.assert_array_equal(outputs[name], exact[name])


def _wrong(monkeypatch: pytest.MonkeyPatch, op: Any, instead: Callable[..., Any]) -> None:
    """Let the compiler aot_eager compute something else for the calls of ``op``."""
    real = torch._dynamo.lookup_backend

    def compiler(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        for node in graph.graph.nodes:
            if node.target is op:
                node.target = instead
        graph.recompile()
        return real("aot_eager")(graph, inputs)

    monkeypatch.setattr(torch._dynamo, "lookup_backend", lambda name: compiler)


def test_the_operator_that_a_compiler_gets_wrong_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 16), nn.SiLU(), nn.Linear(16, 4)).eval()
    model = TorchModel("net", module, torch.randn(5, 8))
    assert not bisect(model, "torch,torch-compile:aot_eager").tests[0].guilty
    _wrong(monkeypatch, nn.functional.silu, nn.functional.hardswish)
    (test,) = bisect(model, "torch,torch-compile:aot_eager").tests
    (guilty,) = test.guilty
    assert guilty.name.startswith("3")
    assert guilty.side == "test"


def test_what_cannot_run_is_refused_in_a_sentence(
    stress: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._inductor import config

    with pytest.raises(BackendUnavailable, match="comes without a torch module") as refused:
        create(BackendSpec.parse("torch-compile:eager")).open(Program("net", stress.graph))
    assert refused.value.exit_code == 3
    with (
        config.patch({"cpp.cxx": ("/nowhere/g++",)}),
        pytest.raises(BackendUnavailable, match="with a C++ compiler, and none is here".replace("+", "[+]")),
    ):
        create(BackendSpec.parse("torch-compile"))

    class Looped(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            for _ in range(2):
                torch._dynamo.graph_break()
                x = x.sin()
            return x

    program = program_of(Looped(), (torch.randn(3),), tmp_path, exporter="torchscript")
    with pytest.raises(InputError, match="captured no graph of the module and left it eager"):
        run("torch-compile:eager", program)

    def fails(graph: Any, inputs: Any) -> Any:
        raise ValueError("no graph is good enough")

    monkeypatch.setattr(torch._dynamo, "lookup_backend", lambda name: fails)
    with pytest.raises(ModuleFailed, match=r"torch\.compile failed: .*no graph is good enough"):
        run("torch-compile:eager", stress)


def test_what_takes_the_values_raises_its_own_error(stress: Program) -> None:
    def full(name: str, tensor: Any) -> None:
        raise OSError("no space is left")

    session = create(BackendSpec.parse("torch-compile:eager")).open(stress)
    with pytest.raises(OSError, match="no space is left"):
        session.run(stress.example or {}, full, probes={"gelu"})


@pytest.mark.slow
def test_inductor_shows_all_of_fp32_and_what_its_kernels_write_of_bf16(stress: Program) -> None:
    exact, expected = run("torch", stress)
    session = create(BackendSpec.parse("torch-compile")).open(stress)
    values: dict[str, Tensor] = {}
    outputs = session.run(stress.example or {}, lambda n, t: values.update({n: t.clone()}))
    plain = session.run(stress.example or {})
    assert len(values) > 40
    for name, tensor in values.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-5, msg=name)
    for name in OUTPUTS:
        np.testing.assert_allclose(outputs[name], exact[name], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(outputs[name], plain[name], rtol=1e-4, atol=1e-5)
    assert any(kernel.startswith("cpp_fused_") for kernel in kernels_of(session).values())
    session.close()
    session = create(BackendSpec.parse("torch-compile-bf16")).open(stress)
    narrow: dict[str, Tensor] = {}
    outputs = session.run(stress.example or {}, lambda n, t: narrow.update({n: t.clone()}))
    plain = session.run(stress.example or {})
    assert all(np.array_equal(outputs[name], plain[name]) for name in OUTPUTS), "the same kernels ran"
    assert 10 < len(narrow) < len(values)
    session.close()


class Cancels(nn.Module):
    """Adds a large number and takes it off again: what is left depends on whether the sum was rounded."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x).sigmoid() + 100.0
        return self.second(y - 100.0)


@pytest.mark.slow
def test_casts_that_inductor_leaves_out_are_the_cause_and_the_nearer_side_is_told() -> None:
    torch.manual_seed(0)
    model = TorchModel("net", Cancels().eval(), torch.randn(5, 8))
    options = Options(optimizer_blame=True)
    (test,) = bisect(model, "torch-bf16,torch-compile-bf16", options=options).tests
    (found,) = test.findings
    assert found.cause == MISSING_CASTS
    assert found.evidence["with_casts"] == 0 < 0.05 < found.evidence["difference"]
    assert re.search(r"torch-compile-bf16 is \d+ times nearer", found.says)
    assert found.fix.endswith("here torch-compile-bf16:casts")
    assert {row.onnx for row in test.rows}.isdisjoint({"add", "sigmoid"}), "no kernel writes them"
    line = verdict_line(test).plain
    assert line.startswith("✗ torch-compile-bf16: inductor leaves out casts that eager makes; beyond rtol 0.05")
    blame = test.optimizer_blame
    assert blame is not None
    assert [c.optimizer for c in blame.responsible] == ["emulate_precision_casts = True"]
    assert blame.level == "inductor"
    assert blame.fix == "torch._inductor.config.emulate_precision_casts = True"
    assert bisect(model, "torch-bf16,torch-compile-bf16:casts").tests[0].agrees


class Squares(nn.Module):
    """FP32, but for one square that is made in FP16, where it overflows in eager."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(16, 32), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        square = (torch.tanh(self.first(x)) * 400).half() ** 2
        return self.last(1 / (1 + 1e-5 * square.float()))


@pytest.mark.slow
def test_casts_that_an_fp32_network_makes_itself_are_missing_casts_and_name_the_layer() -> None:
    torch.manual_seed(0)
    (test,) = bisect(TorchModel("net", Squares().eval(), torch.randn(64, 16)), "torch,torch-compile").tests
    (found,) = test.findings
    assert (found.cause, found.layers) == (MISSING_CASTS, [row.name for row in test.guilty])
    assert found.evidence["with_casts"] == 0 < 0.1 < found.evidence["difference"]
    assert not any("could be tried" in note for note in test.notes)


class Reciprocals(nn.Module):
    """1 ÷ (−0 + 0) is Inf; inductor leaves the addition of 0 out."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 32)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.first(x))
        return torch.exp(torch.reciprocal(torch.ceil(y) + torch.zeros_like(y)))


@pytest.mark.slow
def test_the_layer_is_guilty_whose_zeros_differ_in_sign() -> None:
    torch.manual_seed(0)
    (test,) = bisect(TorchModel("net", Reciprocals().eval(), torch.randn(64, 16)), "torch,torch-compile").tests
    (guilty,) = test.guilty
    assert (guilty.name, guilty.side) == ("/add", "test")
    (found,) = test.findings
    assert (found.cause, found.layers, found.evidence["read_by"]) == (TURNED, ["/add"], "/reciprocal")
    assert re.fullmatch(r"the sign of \d+ zeros differs, which /reciprocal \(Reciprocal\) reads", found.says)


@pytest.mark.slow
@pytest.mark.parametrize(("backends", "side"), [("torch,{}", "test"), ("{},torch", "reference")])
def test_who_reads_the_sign_of_a_zero_is_innocent(monkeypatch: pytest.MonkeyPatch, backends: str, side: str) -> None:
    """``ceil`` gives +0 for −0.5 on one side; atan2, which is right, makes π of it or −π."""

    class Angles(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(16, 32), nn.Linear(32, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = torch.ceil(torch.tanh(self.first(x)))
            return self.last(torch.atan2(y, -torch.ones_like(y)))

    torch.manual_seed(0)
    _wrong(monkeypatch, torch.ceil, lambda x: torch.ceil(x) + 0.0)
    model = TorchModel("net", Angles().eval(), torch.randn(64, 16))
    (test,) = bisect(model, backends.format("torch-compile:aot_eager")).tests
    ((name, guilty),) = [(row.name, row.side) for row in test.guilty]
    assert name.startswith("/ceil")
    assert guilty == side


class Remainder(nn.Module):
    """BF16's 1.7 by 1.7: eager rounds the divisor, inductor does not, and the remainders are 0, or nearly 0 or 1.7."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(16, 32), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.remainder(torch.sign(self.first(x)) * 1.703125, 1.7))


@pytest.mark.slow
def test_shares_of_a_divergence_are_known_where_the_oracle_leaves_bf16_in_numpy() -> None:
    torch.manual_seed(0)
    model = TorchModel("net", Remainder().eval(), torch.randn(64, 16))
    (test,) = bisect(model, "torch-bf16,torch-compile-bf16").tests
    assert test.first_divergent is not None
    assert "remainder" in test.first_divergent.name
    assert not any("unknown" in note for note in test.notes)
    (found,) = test.findings
    assert not test.guilty
    assert (found.cause, found.layers) == (ROUNDED_SCALAR, ["/remainder"])
    assert found.evidence == {"scalar": 1.7, "rounded": "1.70312", "rounded_by": "reference"}
    assert "one side alone rounds a scalar, at /remainder; beyond" in verdict_line(test).plain


@pytest.mark.slow
@pytest.mark.parametrize("half", [False, True])
def test_a_scalar_that_eager_alone_rounds_is_told(monkeypatch: pytest.MonkeyPatch, half: bool) -> None:
    """In a network in FP16, and where one in FP32 casts to it: the operators behind it are innocent."""

    class Far(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(16, 32), nn.Linear(32, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = torch.sign(self.first(x)) * 2.30078125
            y = torch.fmod(y.half() if half else y, 2.3) * 3.0
            return self.last(y.float() if half else y)

    torch.manual_seed(0)
    _wrong(monkeypatch, torch.fmod, lambda x, by: torch.fmod(x.float(), by).to(x.dtype))
    backends = "torch,torch-compile:aot_eager" if half else "torch-fp16,torch-compile-fp16:aot_eager"
    (test,) = bisect(TorchModel("net", Far().eval(), torch.randn(64, 16)), backends).tests
    (found,) = test.findings
    assert (found.cause, found.layers, found.evidence["rounded_by"]) == (ROUNDED_SCALAR, ["/fmod"], "reference")
    assert not test.guilty


@pytest.mark.slow
def test_what_a_compiler_decomposes_otherwise_is_its_fault_although_the_export_does_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Far(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(16, 32), nn.Linear(32, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = torch.tanh(self.first(x))
            return self.last(torch.remainder(torch.relu(y), torch.exp(y * 1e-9 + 200)))

    torch.manual_seed(0)
    _wrong(monkeypatch, torch.remainder, lambda x, by: x - torch.floor(x / by) * by)
    (test,) = bisect(TorchModel("net", Far().eval(), torch.randn(64, 16)), "torch,torch-compile:aot_eager").tests
    assert [(row.name, row.side) for row in test.guilty] == [("/remainder", "test")]
    (found,) = test.findings
    assert (found.cause, found.layers) == ("decomposition", ["/remainder"])


class Delay(nn.Module):
    """A line of past frames that is moved on in place."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor, line: Tensor) -> Tensor:
        line[1:] = line[:-1].clone()
        return self.last(torch.relu(self.first(x) + line))


@pytest.mark.slow
def test_what_is_written_in_place_is_a_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    line = torch.randn(16, 16)
    before = line.clone()
    model = TorchModel("net", Delay().eval(), (torch.randn(16, 16), line))
    assert bisect(model, "torch,torch-compile:aot_eager").tests[0].agrees

    def overlaps(into: Tensor, where: Any, what: Tensor) -> None:
        for row in range(1, len(into)):
            into[row] = into[row - 1]

    _wrong(monkeypatch, operator.setitem, overlaps)
    (test,) = bisect(model, "torch,torch-compile:aot_eager").tests
    assert [row.name for row in test.guilty] == ["/setitem"]
    assert torch.equal(line, before), "the caller's inputs are nobody's to write to"


@pytest.mark.slow
def test_a_rounding_that_makes_whole_numbers_flip_is_the_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    class Sums(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(16, 32), nn.Linear(32, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = torch.tanh(self.first(x))
            return self.last(y + torch.floor(torch.sum(torch.softmax(y, -1), -1, keepdim=True)))

    torch.manual_seed(0)
    _wrong(monkeypatch, torch.sum, lambda x, d, keepdim: torch.ones_like(x.sum(d, keepdim)))
    (test,) = bisect(TorchModel("net", Sums().eval(), torch.randn(64, 16)), "torch,torch-compile:aot_eager").tests
    assert not test.guilty
    (found,) = test.findings
    assert (found.cause, found.layers, found.evidence["flips"]) == ("fp32", ["/sum"], "/floor")
    assert re.search(r"where /sum \(ReduceSum\) is 1 for 0\.999999\d+; /sum", found.says)
    assert not any("flip" in note for note in test.notes), "told once"
    assert "the rounding of /sum makes whole numbers flip; beyond" in verdict_line(test).plain


@pytest.mark.slow
def test_a_wrong_decomposition_is_named_by_its_layer_and_by_the_knobs(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor.decomposition import decompositions

    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 16), nn.SiLU(), nn.Linear(16, 4)).eval()
    model = TorchModel("net", module, torch.randn(5, 8))
    silu = torch.ops.aten.silu.default
    monkeypatch.setitem(decompositions, silu, lambda x: x * nn.functional.hardsigmoid(x))
    (test,) = bisect(model, "torch,torch-compile", options=Options(optimizer_blame=True)).tests
    (guilty,) = test.guilty
    assert guilty.name.startswith("3")
    assert any("torch is far nearer" in note for note in test.notes)
    blame = test.optimizer_blame
    assert blame is not None
    assert [c.optimizer for c in blame.responsible] == ["decomposition of aten.silu"]
    assert blame.difference_without < 1e-6 < blame.difference_with
    monkeypatch.undo()
    assert bisect(model, "torch,torch-compile").tests[0].agrees, "nothing wrong is taken from a cache"


def test_knobs_are_those_of_inductor() -> None:
    model = TorchModel("net", Cancels().eval(), torch.randn(5, 8))
    with pytest.raises(InputError, match="--knobs: expected ort-basic, ort-all, torch-compile or openvino"):
        bisect(model, "torch,torch-compile:aot_eager", options=Options(optimizer_blame=True))


class Fused(nn.Module):
    """Many operators that inductor puts into one kernel, between two products."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        y = torch.sigmoid(x) * 1.5 + torch.cos(x)
        y = torch.tanh(y) * x + torch.exp(-x * x)
        return self.second(torch.relu(y) - 0.25 * x)


@pytest.mark.slow
def test_a_fused_kernel_is_judged_as_a_region(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor.lowering import lowerings

    torch.manual_seed(0)
    model = TorchModel("net", Fused().eval(), torch.randn(16, 8))
    assert not bisect(model, "torch,torch-compile-bf16").tests[0].guilty
    sigmoid, tanh = (getattr(torch.ops.aten, name).default for name in ("sigmoid", "tanh"))
    monkeypatch.setitem(lowerings, tanh, lowerings[sigmoid])
    (guilty,) = bisect(model, "torch,torch-compile-bf16").tests[0].guilty
    assert guilty.region is not None
    assert guilty.region.layer.startswith("cpp_fused_")
    assert "tanh" in guilty.region.layer
    assert len(guilty.region.nodes) > 8
    assert guilty.name.startswith("fused region of ")


def test_what_dynamo_cannot_run_is_told_in_a_line() -> None:
    def mixed(x: Tensor) -> Tensor:
        return x + torch.zeros(4, device="meta")

    with pytest.raises(Exception, match="device") as refused:
        torch.compile(mixed, backend="eager")(torch.ones(4))
    assert "two devices, cpu and meta" in torch_compile._reason(refused.value)
    assert "\n" not in torch_compile._reason(refused.value)
    assert "Hint" not in torch_compile._reason(refused.value)


def test_an_operators_own_error_is_told_without_what_stands_around_it() -> None:
    """As dynamo of torch 2.11 words it; an error without any words is told by its type."""
    text = "RuntimeError when making fake tensor call\n  Explanation: Dynamo failed to run FX node: got RuntimeError"
    error = RuntimeError(f"{text}('two devices: cpu, cuda:0')\n  Hint: move them")
    assert torch_compile._reason(error) == "two devices: cpu, cuda:0"
    assert torch_compile._reason(NotImplementedError()).startswith("NotImplementedError")
