"""Models that a user's file builds, and models whose samples are given."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from onnx import helper

from cp_debug.api.models import to_model
from cp_debug.bisect.both_sides import Side
from cp_debug.bisect.options import Options
from cp_debug.deploy.interface_checks import checked
from cp_debug.errors import InputError
from cp_debug.probes.arrays import is_torch
from cp_debug.programs.export import note_modules
from cp_debug.recipes.abilities import Batches, DetectsBoxes, HasClasses, HasData, TurnsYaw, with_samples
from cp_debug.recipes.base import Sample
from cp_debug.recipes.registry import load_model
from cp_debug.recipes.torch_programs import load_callable

NETWORK = """
from __future__ import annotations
import dataclasses, torch

@dataclasses.dataclass
class Widths:
    hidden: int = 3

class Network(torch.nn.Module):
    def __init__(self, widths: Widths) -> None:
        super().__init__()
        self.widths, self.layer = widths, torch.nn.Linear(2, widths.hidden)
    def forward(self, x):
        return self.layer(x)

def build():
    return Network(Widths()), (torch.ones(1, 2),)
"""


def test_a_file_hides_no_installed_module(tmp_path: Path) -> None:
    file = tmp_path / "pickle.py"
    file.write_text(NETWORK)
    load_callable(f"{file}:build")
    assert sys.modules["pickle"] is pickle
    assert pickle.loads(pickle.dumps([1])) == [1]


def test_what_a_file_defines_can_be_pickled(tmp_path: Path) -> None:
    file = tmp_path / "json.py"
    file.write_text(NETWORK)
    module = load_callable(f"{file}:build").module
    again = pickle.loads(pickle.dumps(module))
    assert again.widths == module.widths
    assert type(again) is type(module)


def test_files_of_one_name_stay_apart(tmp_path: Path) -> None:
    modules = []
    for folder, hidden in (("a", 3), ("b", 5)):
        (tmp_path / folder).mkdir()
        file = tmp_path / folder / "net.py"
        file.write_text(NETWORK.replace("= 3", f"= {hidden}"))
        modules.append(load_callable(f"{file}:build").module)
    assert [pickle.loads(pickle.dumps(module)).widths.hidden for module in modules] == [3, 5]


def test_a_file_that_fails_leaves_no_module(tmp_path: Path) -> None:
    file = tmp_path / "broken_network.py"
    file.write_text("raise ValueError('no')")
    with pytest.raises(InputError, match=r"cannot import .*broken_network\.py: ValueError: no"):
        load_callable(f"{file}:build")
    assert not [name for name in sys.modules if "broken_network" in name]


def test_given_samples_are_all_that_changes() -> None:
    model = load_model("centerpoint:tiny")
    sample = Sample({"points": np.zeros((1, 4), np.float32)}, "given")
    chosen = with_samples(model, [sample])
    assert list(chosen.samples(5, 0, None)) == list(chosen.samples(1, 3, Path("other"))) == [sample]
    assert isinstance(chosen, type(model))
    for ability in (Batches, DetectsBoxes, HasClasses, HasData, TurnsYaw):
        assert isinstance(chosen, ability) == isinstance(model, ability)
    assert next(iter(model.samples(1, 0, None))).source != "given"
    assert list(checked(chosen).samples(1, 0, None)) == [sample]
    other = Sample({}, "other")
    assert list(with_samples(chosen, [other]).samples(1, 0, None)) == [other]
    assert list(chosen.samples(1, 0, None)) == [sample]


@pytest.mark.parametrize(
    ("line", "refused"), [("if not self.done: self.a.weight.data.mul_(2)", False), ("self.a.weight.data.mul_(2)", True)]
)
def test_a_forward_that_changes_its_own_weights_each_time_is_refused(tmp_path: Path, line: str, refused: bool) -> None:
    file = tmp_path / "own_weights.py"
    file.write_text(f"""
import torch
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.done = torch.nn.Linear(4, 4), False
    def forward(self, x):
        {line}
        self.done = True
        return self.a(x)
def build(): return Net(), torch.ones(2, 4)
""")
    if refused:
        with pytest.raises(InputError, match=r"each forward changes its weight 'a.weight', so no two runs"):
            load_callable(f"{file}:build")
    else:
        load_callable(f"{file}:build")


def test_lazy_weights_that_no_forward_reaches_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "lazy.py"
    file.write_text("""
import torch
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = torch.nn.LazyLinear(4), torch.nn.LazyLinear(4)
    def forward(self, x): return self.a(x)
class Whole(Net):
    def forward(self, x): return self.b(self.a(x))
def build(): return Net(), torch.ones(2, 4)
def whole(): return Whole(), torch.ones(2, 4)
""")
    with pytest.raises(InputError, match=r"b.weight has no values: it is of a lazy module that forward never reaches"):
        load_callable(f"{file}:build")
    load_callable(f"{file}:whole")


def test_a_callable_that_returns_something_else_is_told_the_form(tmp_path: Path) -> None:
    file = tmp_path / "three.py"
    file.write_text(
        "from torch import nn\n\ndef build():\n    return nn.ReLU(), ({},), {}\n\ndef other():\n    return 3"
    )
    with pytest.raises(InputError, match=r"returned a tuple of ReLU, tuple, dict; expected \(module, .*keywords"):
        load_callable(f"{file}:build")
    with pytest.raises(InputError, match=r"other\(\) returned int; expected \(module"):
        load_callable(f"{file}:other")
    with pytest.raises(InputError, match=r"<lambda>\(\) is a module without example inputs; expected \(module"):
        to_model(lambda: torch.nn.ReLU())


def test_a_callable_that_returns_a_tuple_that_fails_is_told_so(tmp_path: Path) -> None:
    file = tmp_path / "fails.py"
    file.write_text("""
from torch import nn
class Pair(tuple):
    def __iter__(self): return 1 / 0
def build(): return Pair((nn.ReLU(), 1))
""")
    with pytest.raises(InputError, match=r"build\(\): what was returned raised ZeroDivisionError: division by zero$"):
        load_callable(f"{file}:build")


@pytest.mark.parametrize("named", [None, 3])
def test_a_class_may_have_anything_for_the_name_of_its_module(named: object) -> None:
    linear = type("Odd", (torch.nn.Linear,), {"__module__": named})(3, 2)
    graph = helper.make_graph([helper.make_node("Gemm", ["x", "w"], ["y"], name="/Gemm")], "g", [], [])
    note_modules(proto := helper.make_model(graph), linear)
    (line,) = proto.graph.node[0].metadata_props
    assert line.value.endswith(": Odd.forward")
    assert not is_torch(linear)


@pytest.mark.parametrize("parts", [None, {}, {"net": "in INT8"}])
def test_a_side_says_where_its_int8_is_from(monkeypatch: pytest.MonkeyPatch, parts: Any) -> None:
    monkeypatch.setattr("cp_debug.bisect.both_sides.load_quantized", lambda name, *how: (name, parts))
    side = Side.load("net.onnx", Path("a.pt"), Options())
    assert side.model == "net.onnx"
    assert (side.parts, side.how) == ((parts, "quantized as in a.pt") if parts else (None, ""))
