"""Modules that keep state between forwards: every run starts from what was given, the caller's stays as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cp_debug
from cp_debug.probes.module_state import ModuleState, state_kept
from cp_debug.probes.trace import trace


class Stateful(nn.Module):
    """A product whose factor is read from what earlier forwards left behind, in the manner of ``step``."""

    def __init__(self, step: Callable[[Any], Any] = lambda module: 1.0) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.register_buffer("n", torch.ones(()))
        self.count, self.seen, self.memo, self.cache = 0, [], {}, torch.zeros(1)
        self.step = step

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)) * self.step(self))


def buffer_in_place(module: Any) -> Tensor:
    module.n += 1
    return module.n


def buffer_data(module: Any) -> Tensor:
    module.n.data.mul_(0.9)  # past the counter of versions
    return module.n


def buffer_anew(module: Any) -> Tensor:
    module.n = module.n + 1
    return module.n


def number(module: Any) -> float:
    module.count += 1
    return float(module.count)


def elements(module: Any) -> float:
    module.seen.append(1)
    return float(len(module.seen))


def keys(module: Any) -> float:
    module.memo[len(module.memo)] = 1
    return float(len(module.memo))


def tensor(module: Any) -> Tensor:
    module.cache.add_(1)
    return module.cache


def longer(module: Any) -> Tensor:
    module.cache = torch.cat([module.cache, torch.ones(1)])
    return module.cache.sum()


def new(module: Any) -> float:
    module.late = getattr(module, "late", 0) + 1
    return float(module.late)


STEPS = {
    buffer_in_place: "n",
    buffer_anew: "n",
    number: "count",
    elements: "seen",
    keys: "memo",
    longer: "cache",
    new: "late",
}


@pytest.mark.few(2)
@pytest.mark.parametrize(
    "step",
    [s if s in (buffer_in_place, number) else pytest.param(s, marks=pytest.mark.slow) for s in STEPS],
)
def test_what_forward_changes_is_named_and_accuses_nobody(step: Callable[[Any], Any]) -> None:
    torch.manual_seed(0)
    module = Stateful(step).eval()
    state, attributes = ModuleState(module), set(vars(module))
    buffer = module.n
    result = cp_debug.diagnose(module, "torch,ort", inputs=torch.ones(2, 4))
    assert result.agrees, result.tests[0].findings
    assert "observer gap" not in str(result)
    (note,) = (note for note in result.tests[0].notes if "each forward changes" in note)
    assert note.startswith(f"each forward changes {STEPS[step]} of the module")
    assert not state.changed(), "the caller's module is as it was"
    assert set(vars(module)) == attributes
    assert module.n is buffer


@pytest.mark.parametrize(("step", "name"), STEPS.items())
def test_every_change_is_named_and_put_back(step: Callable[[Any], Any], name: str) -> None:
    module = Stateful(step).eval()
    before, x = ModuleState(module), torch.ones(2, 4)
    attributes, buffer = set(vars(module)), module.n
    with state_kept(module) as state:
        module(x)
        assert state.changed() == [name]
    assert not before.changed()
    assert set(vars(module)) == attributes
    assert module.n is buffer
    first, second = (trace(module, {"x": x}).tensors[0] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("step", [buffer_data, tensor])
def test_what_exporters_do_not_take_is_put_back(step: Callable[[Any], Any]) -> None:
    """``.data`` goes past torch's counter of versions, and its exporter ends with a segmentation fault on it."""
    module = Stateful(step).eval()
    x = {"x": torch.ones(2, 4)}
    first, second = (trace(module, x).tensors[0] for _ in range(2))
    assert torch.equal(first, second)
    assert (float(module.n), float(module.cache)) == (1.0, 0.0)


def test_modules_inside_are_named_by_their_paths() -> None:
    module = nn.Sequential(nn.Linear(4, 4), Stateful(buffer_in_place))
    with state_kept(module) as state:
        module(torch.ones(1, 4))
        assert state.changed() == ["1.n"]
    assert float(module[1].n) == 1.0


def test_a_module_whose_results_do_not_change_has_no_note() -> None:
    """What is only written down, as the last features, is no state that a result depends on."""

    def remembers(module: Any) -> float:
        module.count += 1
        return 1.0

    result = cp_debug.diagnose(Stateful(remembers).eval(), "torch,ort", inputs=torch.ones(2, 4))
    assert not any("each forward changes" in note for note in result.tests[0].notes)


def test_a_module_that_raises_is_put_back() -> None:
    def raises(module: Any) -> float:
        module.n += 1
        raise ValueError("mine")

    module = Stateful(raises)
    with pytest.raises(cp_debug.InputError, match="mine"):
        trace(module, {"x": torch.ones(1, 4)})
    assert float(module.n) == 1.0


def test_lazy_modules_are_made_by_their_first_forward() -> None:
    module = nn.Sequential(nn.LazyLinear(4), nn.LazyBatchNorm1d()).eval()
    with state_kept(module) as state:
        module(torch.ones(2, 3))
        assert not state.changed()
    assert module[0].weight.shape == (4, 3)
    assert module[1].running_mean.shape == (4,)


def test_nan_in_a_buffer_is_no_change_and_scripts_are_put_back() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("n", torch.zeros(1))
            self.register_buffer("unused", torch.tensor([float("nan")]))

        def forward(self, x: Tensor) -> Tensor:
            self.n.add_(1)
            return x * self.n

    script = torch.jit.script(Counting())
    with state_kept(script) as state:
        script(torch.ones(1))
        assert state.changed() == ["n"]
    assert float(script.n) == 0.0
    assert not state.changed()


def test_a_buffer_that_did_not_change_is_not_written() -> None:
    module = nn.Linear(4, 4)
    module.register_buffer("fixed", torch.ones(4))
    version = module.fixed._version
    with state_kept(module):
        module(torch.ones(1, 4))
    assert module.fixed._version == version
