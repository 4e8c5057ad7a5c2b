"""The torch backends: precisions, names, probes, refusals."""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import pytest
import torch
from stress import OUTPUTS, make_stress
from torch import nn

from cp_debug.backends import torch_backend
from cp_debug.backends.base import Program
from cp_debug.backends.capabilities import FreesMemory
from cp_debug.backends.determinism import deterministic, read_settings
from cp_debug.backends.registry import create
from cp_debug.backends.spec import BackendSpec
from cp_debug.errors import BackendUnavailable, InputError, ModuleFailed
from cp_debug.graph.graph import Graph
from cp_debug.probes.module_state import copied_to
from cp_debug.programs.align import align
from cp_debug.programs.export import export

SPECS = {"torch": torch.float32, "torch-fp64": torch.float64, "torch-bf16": torch.bfloat16, "torch-fp16": torch.float16}


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> tuple[Program, dict[str, np.ndarray]]:
    module, image = make_stress()
    path = tmp_path_factory.mktemp("net") / "net.onnx"
    graph = Graph(export(module, (image,), path, input_names=["x"], output_names=OUTPUTS))
    return Program("net", graph, module, align(graph, module, (image,))), {"x": image.numpy()}


def run(
    spec: str, program: Program, inputs: Any, **options: Any
) -> tuple[dict[str, np.ndarray], dict[str, torch.Tensor]]:
    values: dict[str, torch.Tensor] = {}
    session = create(BackendSpec.parse(spec)).open(program)
    return session.run(inputs, lambda n, t: values.update({n: t.clone()}), **options), values


def test_the_copy_of_a_large_module_is_there_only_while_it_runs(program: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    program, inputs = program
    made: list[weakref.ref[nn.Module]] = []

    def counted(*args: Any) -> nn.Module:
        copy: nn.Module = copied_to(*args)
        made.append(weakref.ref(copy))
        return copy

    def alive() -> int:
        return sum(copy() is not None for copy in made)

    monkeypatch.setattr(torch_backend, "copied_to", counted)
    session = create(BackendSpec.parse("torch-bf16")).open(program)
    assert isinstance(session, FreesMemory)
    first = session.run(inputs)
    session.free_memory()
    assert alive() == 1, "a small one stays"
    session.close()
    monkeypatch.setattr(torch_backend, "LARGE", 1)
    session = create(BackendSpec.parse("torch-bf16")).open(program)
    assert alive() == 0
    session.run(inputs)
    assert alive() == 1
    session.free_memory()  # type: ignore[attr-defined]
    assert alive() == 0
    again = session.run(inputs)
    assert alive() == 1
    assert all(np.array_equal(first[name], again[name]) for name in first)
    own = create(BackendSpec.parse("torch")).open(program)
    own.free_memory()  # type: ignore[attr-defined]
    assert own.run(inputs).keys() == first.keys(), "the module itself is not its to free"


@pytest.mark.parametrize("spec", SPECS)
def test_runs_the_module_in_its_precision(spec: str, program: Any) -> None:
    program, inputs = program
    session = create(BackendSpec.parse(spec)).open(program)
    before = read_settings()
    outputs, values = run(spec, program, inputs)
    assert read_settings() == before
    assert list(outputs) == OUTPUTS
    assert list(values) == [v for v in program.graph.values if v in values] or set(values) == set(session.exposed)
    assert values["map"].dtype == SPECS[spec]
    with deterministic():
        exact = program.module(torch.from_numpy(inputs["x"]))["map"].numpy()
    error = np.linalg.norm(outputs["map"].astype(np.float64) - exact) / np.linalg.norm(exact)
    low, high = {"torch": (0, 0), "torch-fp64": (0, 1e-6), "torch-bf16": (1e-3, 0.2), "torch-fp16": (1e-4, 0.02)}[spec]
    assert low <= error <= high
    if spec == "torch-fp64":
        assert error > 0
    untouched = session.run(inputs)
    assert all(np.array_equal(untouched[n], outputs[n]) for n in OUTPUTS)
    assert next(program.module.parameters()).dtype == torch.float32


def test_values_carry_the_names_of_the_graph(program: Any) -> None:
    program, inputs = program
    _, values = run("torch", program, inputs)
    expected: dict[str, Any] = {}
    run_graph = create(BackendSpec.parse("torch")).open(Program("net", program.graph))
    run_graph.run(inputs, lambda n, t: expected.update({n: t}))
    assert len(values) > 60
    for name, tensor in values.items():
        assert tensor.shape == expected[name].shape, name
        assert (tensor - expected[name]).norm() <= 1e-5 * expected[name].norm(), name
    assert set(values) == set(create(BackendSpec.parse("torch")).open(program).exposed)


def test_probes_narrow_what_is_handed_out(program: Any) -> None:
    program, inputs = program
    _, values = run("torch", program, inputs, probes={"map", "gelu"})
    assert list(values) == ["gelu", "map"]


def test_a_graph_without_a_module_runs_in_fp32_and_fp64_only(program: Any) -> None:
    program, inputs = program
    bare = Program("net", program.graph)
    single, values = run("torch", bare, inputs)
    double, _ = run("torch-fp64", bare, inputs)
    assert double["map"].dtype == np.float64
    assert 0 < np.abs(double["map"] - single["map"]).max() < 1e-5
    assert list(values) == program.graph.values
    for precision in ("fp16", "bf16"):
        with pytest.raises(BackendUnavailable, match=f"emu-{precision}"):
            create(BackendSpec.parse(f"torch-{precision}")).open(bare)


def test_what_this_machine_lacks_is_refused_with_the_nearest() -> None:
    with pytest.raises(BackendUnavailable, match="emu-tf32"):
        create(BackendSpec.parse("torch-tf32@cpu"))
    with pytest.raises(BackendUnavailable, match="nearest backend that works here: torch-fp16@cpu"):
        create(BackendSpec.parse("torch-fp16@cuda:99"))
    if not torch.cuda.is_available():
        with pytest.raises(BackendUnavailable, match="emu-tf32"):
            create(BackendSpec.parse("torch-tf32"))


def test_bad_inputs_and_a_failing_module(program: Any) -> None:
    program, inputs = program
    session = create(BackendSpec.parse("torch")).open(program)
    with pytest.raises(InputError, match="missing input 'x'"):
        session.run({})
    with pytest.raises(InputError, match="shape"):
        session.run({"x": inputs["x"][0]})
    broken = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Linear(3, 3))
    with pytest.raises(ModuleFailed, match="module '1' raised"):
        create(BackendSpec.parse("torch")).open(Program("net", program.graph, broken)).run(inputs)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_tf32_is_on_only_where_it_is_asked_for() -> None:
    x, weight = torch.randn(1, 64, 32, 32).cuda(), torch.randn(64, 64, 3, 3).cuda()
    exact = nn.functional.conv2d(x.double(), weight.double())
    errors = []
    for tf32 in (False, True):
        with deterministic(tf32=tf32):
            errors.append(float((nn.functional.conv2d(x, weight) - exact).norm() / exact.norm()))
    assert errors[0] < 1e-5 < 1e-4 < errors[1]
