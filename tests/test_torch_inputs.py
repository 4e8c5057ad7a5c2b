"""Models and example inputs of every kind that a Python program holds."""

from __future__ import annotations

import copy
import dataclasses
import json
import sys
import warnings
import zipfile
from collections import deque
from pathlib import Path
from textwrap import dedent
from typing import Any, NamedTuple

import numpy as np
import onnx
import pytest
import torch
from extras import needs
from nets import second_like
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from typer.testing import CliRunner

import cp_debug
from cp_debug.api.models import to_model
from cp_debug.cli.main import app
from cp_debug.errors import CpdebugError, InputError
from cp_debug.probes.trace import trace
from cp_debug.programs.align import module_digest
from cp_debug.programs.export import export
from cp_debug.recipes import torch_callable
from cp_debug.recipes.registry import load_model
from cp_debug.recipes.torch_callable import TorchModel, flat_inputs
from cp_debug.recipes.torch_programs import load_callable


class Pair(NamedTuple):
    left: Tensor
    right: Tensor


@dataclasses.dataclass
class Batch:
    image: Tensor
    levels: list[Tensor]
    scale: float = 2.0


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 8)
        self.head = nn.Linear(8, 2)

    def forward(self, batch: Any, pair: Pair | None = None, *, gain: Tensor) -> dict[str, Tensor]:
        image, extra = (batch.image, batch.levels[0]) if isinstance(batch, Batch) else (batch["image"], 0)
        hidden = torch.relu(self.body(image)) + extra
        if pair is not None:
            hidden = hidden * pair.left - pair.right
        return {"scores": self.head(hidden) * gain}


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.drop, self.head = nn.Linear(4, 8), nn.Dropout(), nn.Linear(8, 2)

    def forward(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        y = self.head(self.drop(torch.relu(self.body(x))))
        return y if shift is None else y + shift


def seeded(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


IMAGE = seeded(3, 4)
CALLS = {
    "mapping": ({"batch": {"image": IMAGE}, "gain": seeded(1)}, ["batch.image", "gain"]),
    "dataclass": (
        {"batch": Batch(IMAGE, [seeded(8)]), "gain": seeded(1)},
        ["batch.image", "batch.levels.0", "gain"],
    ),
    "named tuple": (
        {"gain": seeded(1), "pair": Pair(seeded(8), seeded(3, 8)), "batch": {"image": IMAGE}},
        ["batch.image", "pair.left", "pair.right", "gain"],
    ),
}


@pytest.mark.parametrize("call", CALLS)
def test_containers_become_flat_tensors(call: str) -> None:
    given, names = CALLS[call]
    net = Net().eval()
    flat = flat_inputs("net", net, given)
    assert flat.names == names
    torch.testing.assert_close(flat.module(*flat.tensors), net(**given), rtol=0, atol=0)
    assert type(net) is Net  # the caller's module is as it was
    assert [*flat.module.state_dict()] == [*net.state_dict()]


def test_a_deep_copy_of_a_flat_module_runs_its_own_weights() -> None:
    """A method bound to the first copy would go on with the FP32 weights of the original."""
    given, _ = CALLS["dataclass"]
    flat = flat_inputs("net", Net().eval(), given)
    half = copy.deepcopy(flat.module).to(torch.float64)
    assert half(*(tensor.double() for tensor in flat.tensors))["scores"].dtype == torch.float64


@pytest.mark.few(1)
@pytest.mark.parametrize("call", CALLS)
def test_a_module_with_containers_is_diagnosed(call: str) -> None:
    given, names = CALLS[call]
    result = cp_debug.diagnose(Net().eval(), "torch,ort,torch-bf16", inputs=given)
    assert result.agrees
    assert all(test.compared == test.total for test in result.tests)
    assert {"body", "head"} <= {row.name for row in result.tests[0].rows}
    assert [row.name for row in result.tests[0].rows if row.op == "input"] == names


def test_an_empty_input_beside_another_is_one() -> None:
    """As the cache of an attention that has seen nothing yet."""
    module = torch.nn.Identity()
    module.forward = lambda past, x: torch.cat([past, x], 1)  # type: ignore[assignment, method-assign]
    tensors = flat_inputs("cat", module, (torch.zeros(1, 0, 4), torch.ones(1, 2, 4))).tensors
    assert [tuple(tensor.shape) for tensor in tensors] == [(1, 0, 4), (1, 2, 4)]


def test_example_inputs_that_do_not_fit_are_refused() -> None:
    net = Net()
    for given, says in (
        ({"image": IMAGE}, "'image' is not a parameter of forward.batch, pair, gain"),
        ({"batch": {"image": "x.png"}, "gain": 1.0}, "hold no tensor"),
        ({"batch": object()}, "'batch' is object; expected a tensor"),
        ((torch.randn(2, 2).to_sparse(),), "expected a dense tensor"),
        ((torch.nested.nested_tensor([torch.ones(2)]),), "is nested torch.float32 on cpu; expected a dense tensor"),
        ((torch.zeros(0, 4),), "'batch' has the shape .0, 4.: it holds no element"),
        (3, "the example inputs are int"),
    ):
        with pytest.raises(cp_debug.InputError, match=says):
            flat_inputs("net", net, given)


class Options(nn.Module):
    """Takes what an exporter's example inputs may mean in two ways."""

    def forward(self, x: Any, mask: Tensor | None = None, *rest: Tensor, scale: Any = 1.0, **more: Tensor) -> Tensor:
        y = x["image"] if isinstance(x, dict) else x[0] if isinstance(x, tuple) else x
        y = y if mask is None else y * mask
        y = y * (scale["by"] if isinstance(scale, dict) else scale)
        return sum((*rest, *more.values()), y)


HALF, TWICE = torch.full((3, 4), 0.5), torch.full((3, 4), 2.0)
TORCH_CALLS = {
    "keywords last": ((IMAGE, {"mask": HALF}), ["x", "mask"], IMAGE * 0.5),
    "keywords beside a tuple": (((IMAGE,), {"mask": HALF}), ["x", "mask"], IMAGE * 0.5),
    "keywords alone": (({"x": IMAGE, "mask": HALF},), ["x", "mask"], IMAGE * 0.5),
    "in another order": ((IMAGE, {"scale": TWICE, "mask": HALF}), ["x", "mask", "scale"], IMAGE),
    "only by name": ((IMAGE, HALF, TWICE, {"scale": TWICE}), ["x", "mask", "input_2", "scale"], IMAGE + TWICE),
    "any name": ((IMAGE, HALF, {"bias": TWICE}), ["x", "mask", "bias"], IMAGE * 0.5 + TWICE),
    "a mapping among them": ((IMAGE, {"scale": {"by": TWICE}}), ["x", "scale.by"], IMAGE * 2),
    "no keywords": ((IMAGE, {}), ["x"], IMAGE),
    "a mapping is the argument": (({"image": IMAGE},), ["x.image"], IMAGE),
    "a mapping, and that there are no keywords": (({"image": IMAGE}, {}), ["x.image"], IMAGE),
}


@pytest.mark.parametrize("call", TORCH_CALLS)
def test_keyword_arguments_stand_where_torch_has_them(call: str) -> None:
    given, names, result = TORCH_CALLS[call]
    flat = flat_inputs("net", Options(), given)
    assert flat.names == names
    torch.testing.assert_close(flat.module(*flat.tensors), result, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore")
def test_keyword_arguments_of_programs_and_their_diagnosis() -> None:
    program = torch.export.export(Plain().eval(), (IMAGE,), {"shift": seeded(2)})
    for model in (Plain().eval(), program, torch.jit.trace(Plain().eval(), (IMAGE, seeded(2)))):
        prepared = to_model(model, (IMAGE, {"shift": seeded(2)}))[0]
        assert list(prepared.components[0].input_names) == ["x", "shift"]
    assert cp_debug.diagnose(Plain().eval(), inputs=((IMAGE,), {"shift": seeded(2)})).agrees


def test_a_mapping_that_forward_cannot_use_is_told() -> None:
    with pytest.raises(
        cp_debug.InputError, match=r"the mapping at the end is an argument; forward\(x, shift\) has no parameter 'shft'"
    ):
        cp_debug.diagnose(Plain().eval(), inputs=(IMAGE, {"shft": seeded(2)}))


class Sparse(nn.Module):
    """Makes a sparse tensor on its way, and returns one if asked."""

    def __init__(self, returns: bool) -> None:
        super().__init__()
        self.inner, self.returns = nn.Linear(2, 2), returns

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.inner(x)
        sparse = y.to_sparse_csr()
        return sparse if self.returns else y


@pytest.mark.filterwarnings("ignore")
def test_sparse_tensors_inside_are_left_out_and_returned_ones_are_refused() -> None:
    given = (torch.ones(1, 2),)
    seen: list[str] = []
    trace(Sparse(False), {"x": given[0]}, lambda value, tensor: seen.append(str(tensor.layout)))
    assert seen
    assert set(seen) == {"torch.strided"}
    with pytest.raises(
        cp_debug.InputError, match=r"'output' as torch\.sparse_csr torch\.float32 on cpu; expected dense"
    ):
        TorchModel("net", Sparse(True), given)


class Grudging(nn.Module):
    def train(self, mode: bool = True) -> Grudging:
        raise ValueError("never")


def test_what_others_say_is_made_safe_in_errors_of_python_too() -> None:
    class Rude(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise ValueError("\x1b[2Jgone\u202e")

    with pytest.raises(cp_debug.InputError, match=r"ValueError: \\x1b\[2Jgone\\u202e") as caught:
        cp_debug.diagnose(Rude(), "torch,ort", inputs=torch.ones(2), progress=False)
    assert str(caught.value).isprintable()


def test_a_module_of_files_may_refuse_its_own_names(tmp_path: Path) -> None:
    path = tmp_path / "shy.py"
    path.write_text("def __getattr__(name): raise RuntimeError('not yet')")
    with pytest.raises(cp_debug.InputError, match=r"shy\.py:build raised RuntimeError: not yet"):
        cp_debug.diagnose(f"{path}:build", "torch,ort", progress=False)


def test_what_a_callable_gives_may_raise_anything(tmp_path: Path) -> None:
    circle: list[object] = [torch.ones(1)]
    circle.append(circle)
    for module, given, says in (
        (Grudging(), (torch.ones(1),), "ValueError: never"),
        (nn.Identity(), (circle,), "RecursionError"),
    ):
        with pytest.raises(cp_debug.InputError, match=says):
            TorchModel("net", module, given)
    (tmp_path / "net.py").write_text("class Own(BaseException): pass\nraise Own('no')\n")
    with pytest.raises(cp_debug.InputError, match="Own: no"):
        load_callable(f"{tmp_path / 'net.py'}:make")


PROGRAMS = """
import torch
def net():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.ReLU(), torch.nn.Linear(5, 3)), torch.randn(2, 4)
def traced():
    module, x = net()
    return torch.jit.trace(module, x), x
def scripted():
    module, x = net()
    return torch.jit.script(module), x
def alone():
    module, x = net()
    return torch.export.export(module, (x,))
def exported():
    return alone(), None
def of_an_export():
    return alone().module(), net()[1]
"""


@pytest.mark.few(2)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["traced", "scripted", "alone", "exported", "of_an_export"])
def test_a_callable_may_return_what_torch_made_of_a_module(kind: str, tmp_path: Path) -> None:
    (tmp_path / "nets.py").write_text(PROGRAMS)
    result = cp_debug.diagnose(f"{tmp_path / 'nets.py'}:{kind}", "torch,ort")
    assert result.agrees
    assert result.tests[0].compared == result.tests[0].total == 4


def test_an_exported_program_takes_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "nets.py").write_text(PROGRAMS)
    torch.save({}, tmp_path / "weights.pth")
    with pytest.raises(cp_debug.InputError, match="alone\\(\\) returned an exported program, which has its weights"):
        load_callable(f"{tmp_path / 'nets.py'}:alone", tmp_path / "weights.pth")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_exported_and_scripted_programs_keep_their_layers(tmp_path: Path) -> None:
    net = Plain().eval()
    program = torch.export.export(net, (IMAGE,), {"shift": seeded(2)})
    torch.export.save(program, tmp_path / "net.pt2")
    for model in (to_model(program)[0], load_model(str(tmp_path / "net.pt2"))):
        assert list(model.components[0].input_names) == ["x", "shift"]
        result = cp_debug.diagnose(model)
        assert result.agrees
        assert {"body", "head"} <= {row.name for row in result.tests[0].rows}
    scripted = cp_debug.diagnose(torch.jit.trace(net, IMAGE), inputs=IMAGE)
    assert scripted.agrees
    assert scripted.tests[0].compared == scripted.tests[0].total == 4


@pytest.mark.filterwarnings("ignore")
def test_a_torchscript_file_is_fed_with_arrays(tmp_path: Path) -> None:
    path = tmp_path / "net.pt"
    torch.jit.save(torch.jit.trace(Plain().eval(), (IMAGE, seeded(2))), path)
    np.savez(tmp_path / "x.npz", x=IMAGE.numpy(), shift=seeded(2).numpy())
    assert cp_debug.diagnose(str(path), inputs=tmp_path / "x.npz").agrees
    with pytest.raises(cp_debug.InputError, match=r"which has no shapes; expected one \.npz file with inputs"):
        cp_debug.diagnose(str(path))


@pytest.mark.filterwarnings("ignore")
def test_torchscript_that_cannot_be_converted_is_refused_in_a_line() -> None:
    with pytest.raises(cp_debug.InputError, match="converting TorchScript raised") as caught:
        cp_debug.diagnose(torch.jit.script(Plain().eval()), inputs={"x": IMAGE, "shift": seeded(2)})
    assert len(str(caught.value).splitlines()) == 1


def test_files_that_hold_no_program_are_refused(tmp_path: Path) -> None:
    torch.save(Plain().state_dict(), tmp_path / "weights.pt")
    (tmp_path / "text.pt2").write_text("nothing")
    (tmp_path / "net.ort").write_text("ORTM")
    for name, says in (
        ("weights.pt", "holds weights or a pickled module"),
        ("text.pt2", "not an archive of torch.export"),
        ("net.ort", "in ONNX Runtime's own format"),
        ("gone.pt2", "no such file"),
    ):
        with pytest.raises(cp_debug.InputError, match=says):
            cp_debug.diagnose(str(tmp_path / name))
    for name in ("test.ort", "renamed.onnx"):
        (tmp_path / name).write_bytes(b"\x18\0\0\0ORTM" + bytes(40))
        with pytest.raises(cp_debug.InputError, match=r"in ONNX Runtime's own format.*expected the .onnx file"):
            cp_debug.diagnose(torch.nn.ReLU(), "torch,ort", inputs=torch.ones(1), test_model=tmp_path / name)


def test_a_program_of_another_torch_is_refused_with_both_versions(tmp_path: Path) -> None:
    program = torch.export.export(torch.nn.Linear(2, 2), (torch.ones(1, 2),))
    torch.export.save(program, tmp_path / "own.pt2")
    with zipfile.ZipFile(tmp_path / "own.pt2") as own, zipfile.ZipFile(tmp_path / "other.pt2", "w") as other:
        for name in own.namelist():
            content = own.read(name)
            if name.endswith("models/model.json"):
                document = json.loads(content)
                document["schema_version"]["major"], document["torch_version"] = 99, "9.9.1"
                content = json.dumps(document).encode()
            other.writestr(name, content)
    with pytest.raises(cp_debug.InputError, match=r"torch 9\.9\.1 saved it, this is torch 2.*: export it again"):
        cp_debug.diagnose(tmp_path / "other.pt2")
    assert cp_debug.diagnose(tmp_path / "own.pt2", "torch,emu-fp32").agrees


def test_torchscript_that_calls_a_custom_operator_says_what_to_do(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.script(torch.nn.ReLU()), tmp_path / "relu.ts")
    with zipfile.ZipFile(tmp_path / "relu.ts") as own, zipfile.ZipFile(tmp_path / "custom.ts", "w") as other:
        for name in own.namelist():
            other.writestr(name, own.read(name).replace(b"torch.relu(input)", b"ops.mine.twice(input)"))
    np.savez(tmp_path / "x.npz", input=np.ones((1, 3), np.float32))
    with pytest.raises(cp_debug.InputError, match=r"calls a custom operator; expected file\.py:callable"):
        cp_debug.diagnose(tmp_path / "custom.ts", inputs=tmp_path / "x.npz")


def test_a_proto_and_arrays(tmp_path: Path) -> None:
    path = second_like(tmp_path / "net.onnx", depth=1, size=8)
    proto = onnx.load(path)
    made = to_model(str(path))[0]
    arrays = [next(iter(made.samples(1, seed, None))).arrays for seed in (0, 1)]
    result = cp_debug.diagnose(proto, "ort-none,ort-basic", inputs=arrays)
    assert result.samples == ["inputs[0]", "inputs[1]"]
    assert result.agrees
    name = made.components[0].input_names[0]
    with pytest.raises(cp_debug.InputError, match="inputs: unknown input 'nothing'"):
        cp_debug.diagnose(proto, "ort", inputs={"nothing": arrays[0][name]}, test_model=path)


def test_a_function_is_a_model_unless_it_hides_a_module() -> None:
    result = cp_debug.diagnose(lambda a, b: torch.softmax(a @ b, -1), inputs=(IMAGE, seeded(4, 4)))
    assert result.agrees
    assert result.tests[0].total == 4
    net = Plain().eval()
    with pytest.raises(cp_debug.InputError, match="calls the module 'net'"):
        cp_debug.diagnose(lambda x: net(x), inputs=IMAGE)


def test_the_mode_of_the_callers_module_is_kept() -> None:
    net = Plain().train()
    net.body.eval()
    assert cp_debug.diagnose(net, inputs=IMAGE).agrees
    assert net.training
    assert net.drop.training
    assert not net.body.training


class Branching(nn.Module):
    """Keeps where it ran; ``by_value`` makes it look at its numbers."""

    def __init__(self, by_value: bool) -> None:
        super().__init__()
        self.layer, self.by_value = nn.Linear(3, 2), by_value
        self.places: deque[str] = deque()  # no list, whose elements are put back after each run

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        self.places.append(str(x.device))
        if self.by_value and x.sum() > 1e9:
            return {"never": x}
        return {"left": self.layer(x), "right": x.new_zeros(2)}


@pytest.mark.parametrize("by_value", [False, True])
def test_a_large_module_is_run_without_numbers_where_shapes_tell_its_outputs(
    by_value: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_callable, "_LARGE", 1)
    module = Branching(by_value)
    weight = module.layer.weight
    model = TorchModel("net", module, (torch.ones(4, 3),))
    assert not module.places  # before somebody asks for the names
    assert list(model.components[0].output_names) == ["left", "right"]
    assert list(module.places) == (["cpu"] if by_value else [])
    assert module.layer.weight is weight
    seen: list[str] = []
    module.layer.register_forward_hook(lambda m, given, made: seen.append(str(made.device)))
    assert torch_callable._names_alone(module, [torch.ones(4, 3)]) is None  # a hook may keep what it sees


def test_parameters_that_have_gradients_are_told_apart_without_a_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        before = torch_callable._weights(Plain())
    assert before.keys() == {"body.weight", "body.bias", "head.weight", "head.bias"}


def test_what_was_compiled_is_loaded_and_exported_as_it_is_written(tmp_path: Path) -> None:
    """A compiler would take half a minute, and leave its kernels among temporary files."""
    compiled: list[object] = []

    def backend(graph: torch.fx.GraphModule, _: object) -> object:
        compiled.append(graph)
        return graph.forward

    net = torch.compile(nn.Sequential(nn.Linear(4, 6), nn.ReLU()), backend=backend)
    assert TorchModel("net", net, (torch.randn(2, 4),)).components
    export(net, (torch.randn(2, 4),), tmp_path / "net.onnx", input_names=["x"], output_names=["y"])
    assert not compiled


def test_a_weight_that_was_exchanged_while_the_module_was_exported_is_told() -> None:
    net = nn.Linear(4, 2)
    with FakeTensorMode():
        net.late = nn.Linear(2, 2)
    with pytest.raises(InputError, match=r"'late\.weight' has no values any more"):
        module_digest(net)


def test_a_users_file_leaves_no_compiled_one_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    (tmp_path / "helped.py").write_text("make = None\n")
    lines = ("import sys, torch", f"sys.path.insert(0, {str(tmp_path)!r})", "import helped")
    make = "def build(): return torch.nn.ReLU(), torch.ones(1)"
    (tmp_path / "own.py").write_text("\n".join([*lines, make, ""]))
    load_callable(f"{tmp_path / 'own.py'}:build")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["helped.py", "own.py"]
    assert not sys.dont_write_bytecode


@pytest.mark.few(1)
@pytest.mark.parametrize("goes", ["import", "forward"])
def test_what_is_written_lies_where_it_was_asked_for_wherever_the_users_code_goes(
    goes: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The code itself stays where it went: a file that goes to its data reads them in its forward, too."""
    there = tmp_path / "there"
    there.mkdir()
    (there / "factor.txt").write_text("2")
    (tmp_path / "goes.py").write_text(
        dedent(f"""\
        import os, torch

        def move():
            os.chdir({str(there)!r})

        class Net(torch.nn.Linear):
            def forward(self, x):
                move() if {goes == "forward"} else None
                return super().forward(x) * float(open("factor.txt").read())

        move() if {goes == "import"} else None

        def build():
            return Net(4, 3), torch.ones(2, 4)
        """)
    )
    monkeypatch.chdir(tmp_path)
    flags = ["-b", "torch,emu-fp16", "--no-cache", "--save", "kept", "--json", "o.json", "--html", "o.html"]
    ran = CliRunner().invoke(app, ["bisect", "goes.py:build", *flags])
    assert ran.exit_code == 0, (ran.output, ran.exception)
    assert (
        CliRunner().invoke(app, ["export", "goes.py:build", "-o", "made", "--exporter", "torchscript"]).exit_code == 0
    )
    assert [path.name for path in there.iterdir()] == ["factor.txt"]
    assert {"kept", "made", "o.json", "o.html"} <= {path.name for path in tmp_path.iterdir()}
    assert (tmp_path / "kept" / "result.json").is_file()


def test_methods_of_a_class_that_hide_torchs_own_are_not_called() -> None:
    class Hides(nn.Linear):
        def register_forward_hook(self, *_: Any, **__: Any) -> Any:
            raise ValueError("mine")

        register_forward_pre_hook = register_forward_hook

    assert trace(Hides(4, 2), {"x": torch.ones(1, 4)}).leaves


def test_two_modules_of_other_classes_are_compared() -> None:
    class Other(Plain):
        pass

    torch.manual_seed(0)
    ours, theirs = Plain(), Other()
    theirs.load_state_dict(ours.state_dict())
    x = torch.ones(2, 4)
    result = cp_debug.diagnose(ours, "torch,torch", inputs=x, test_model=theirs)
    assert result.agrees


def test_a_damaged_program_is_refused_without_words_about_python(tmp_path: Path) -> None:
    path = tmp_path / "p.pt2"
    torch.save({"weight": torch.ones(2)}, path)
    with pytest.raises(cp_debug.InputError, match=r"p\.pt2: torch\.export\.load cannot load it") as caught:
        load_model(str(path))
    assert "RuntimeError" not in str(caught.value)


STRANGE = ["(y, y)", "y.to_sparse()", "y.to('meta')", "torch.nested.nested_tensor([y[0]])", "1 / 0"]


@pytest.mark.few(3)
@pytest.mark.few(8)
@pytest.mark.parametrize(
    ("returned", "nth"),
    [
        *(("None", nth) for nth in range(2, 7)),
        *((returned, 3) for returned in STRANGE),
        *(pytest.param(r, nth, marks=pytest.mark.slow) for r in STRANGE for nth in (2, 4, 5, 6)),
    ],
)
@pytest.mark.parametrize(
    "command",
    [
        "bisect -b torch-fp64,torch --no-replay",
        "bench -b torch -n 2 --warmup 1",
        pytest.param("quantize ptq -o q --batches 2", marks=needs("modelopt")),
    ],
)
def test_a_forward_that_returns_something_else_than_the_one_before_is_bad_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, returned: str, nth: int
) -> None:
    """Whoever runs the module sees it: no command ends with an exception of torch's or of Python's own."""
    (tmp_path / "moody.py").write_text(
        dedent(f"""\
        import torch

        class Moody(torch.nn.Linear):
            calls = 0

            def forward(self, x):
                y = super().forward(x)
                Moody.calls += 1
                return ({returned}) if Moody.calls == {nth} else y

        def build():
            return Moody(4, 3), torch.ones(2, 4)
        """)
    )
    monkeypatch.chdir(tmp_path)
    verb, _, rest = command.partition(" -")
    ran = CliRunner().invoke(app, [*verb.split(), "moody.py:build", *f"-{rest}".split()])
    if Path("q").exists() or ran.exit_code == 0:
        assert ran.exception is None  # that forward is not one of this command's, or its result is of no account
    else:
        assert isinstance(ran.exception, CpdebugError), ran.exception
        assert ran.exception.exit_code == 2
