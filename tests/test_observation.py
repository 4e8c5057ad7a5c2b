"""Noise floor and observer gap of backends whose noise is known: which runs are compared, and which of two is told."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from nets import NetBuilder

from cp_debug.backends.base import Program, Sink, Tensor
from cp_debug.backends.capabilities import BuildInfo
from cp_debug.backends.spec import BackendSpec
from cp_debug.bisect import assemble
from cp_debug.bisect.observe import Observation, gap, observe
from cp_debug.graph.graph import Graph
from cp_debug.probes.capture import Capture, CaptureWriter
from cp_debug.programs.pipeline import Key, Pipeline
from cp_debug.recipes.base import Component, Sample

X = np.array([[3.0, 4.0]], np.float32)


class Fake:
    """A backend that adds known errors to ``mid`` (x) and to ``y`` (x): by thread count, by run, with probes."""

    emulated, precision, device = False, "fp32", "cpu"
    spec = BackendSpec("ort")

    def __init__(
        self, *, threads: float = 0.0, runs: float = 0.0, probes: float = 0.0, mid: float = 0.0, info: Any = None
    ) -> None:
        self.by_threads, self.by_run, self.by_probes, self.mid, self.info = threads, runs, probes, mid, info
        self.count: int | None = None
        self.taken: Iterator[int] = itertools.count()
        self.log: list[tuple[int | None, bool]] = []

    def with_threads(self, count: int | None) -> Fake:
        other = copy.copy(self)
        other.count = count
        return other

    def open(self, program: Program) -> FakeSession:
        return FakeSession(self)

    def versions(self) -> dict[str, str]:
        return {}


class FakeSession:
    settings: Mapping[str, Any] = {}
    exposed: Collection[str] = ("mid", "y")

    def __init__(self, backend: Fake) -> None:
        self.backend = backend
        self.build_info = backend.info

    def run(
        self, inputs: Mapping[str, np.ndarray], sink: Sink | None = None, probes: Collection[str] | None = None
    ) -> dict[str, np.ndarray]:
        backend, number = self.backend, next(self.backend.taken)
        backend.log.append((backend.count, sink is not None))
        error = number * backend.by_run + (backend.by_threads if backend.count else 0.0)
        if sink is not None:
            sink("mid", inputs["x"] + np.float32([0, backend.mid * bool(error)]))
        y = inputs["x"] + np.float32([0, error + (backend.by_probes if sink else 0.0)])
        if sink is not None:
            sink("y", y)
        return {"y": y}

    def close(self) -> None:
        pass


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Program:
    net = NetBuilder()
    net.op("Identity", net.op("Identity", "x", name="mid"), name="y")
    return Program("net", Graph(net.save(tmp_path_factory.mktemp("net") / "n.onnx", {"x": (1, [1, 2])}, ["y"])))


Shown = Callable[[Key, Tensor], tuple[Key, Tensor]]


def as_it_is(key: Key, tensor: Tensor) -> tuple[Key, Tensor]:
    return key, tensor


def observed(
    folder: Path, program: Program, backend: Fake, shown: Shown = as_it_is
) -> tuple[Observation, dict[Key, float]]:
    """What a run with probes and ``observe`` behind it find out; values are captured as ``shown`` gives them."""
    component = Component("net", ["x"], ["y"])
    model: Any = SimpleNamespace(components=[component], feed=lambda component, sample, results: {"x": X})
    sample = Sample({"x": X}, "s")
    with Pipeline(model, [program], backend) as pipeline, CaptureWriter(folder / "c", {}) as writer:

        def put(key: Key, tensor: Tensor) -> None:
            key, tensor = shown(key, tensor)
            writer.put(key.value, tensor, component=key.component)

        probed = pipeline.run(sample, put)
    with Pipeline(model, [program], backend) as pipeline:
        return observe(pipeline, sample, probed, Capture.open(folder / "c"), shown)


def test_a_backend_that_repeats_itself_costs_one_run(tmp_path: Path, program: Program) -> None:
    backend = Fake()
    found, floors = observed(tmp_path, program, backend)
    assert found == Observation(noise_floor=0.0, observer_gap=0.0, runs=1)
    assert floors == {}
    # The one further run has no probes, and another thread count than torch has here.
    assert backend.log[1:] == [(torch.get_num_threads() + 1, False)]


def test_noise_of_another_thread_count_is_no_gap_of_the_observer(tmp_path: Path, program: Program) -> None:
    backend = Fake(threads=0.5, mid=0.25)
    found, floors = observed(tmp_path, program, backend)
    assert found.noise_floor == pytest.approx(0.1)
    assert found.observer_gap == 0
    assert found.repeats
    assert found.first_unsteady == "mid"
    assert floors == {Key("net", "mid"): pytest.approx(0.05), Key("net", "y"): pytest.approx(0.1)}
    assert backend.log[-1] == (torch.get_num_threads() + 1, True)
    assert found.runs == len(backend.log) - 1


def test_noise_is_measured_on_values_as_they_were_captured_under_their_names(tmp_path: Path, program: Program) -> None:
    """The values [3, 4] and [3, 4.25] are kept under other names, and a number smaller: [2, 3] and [2, 3.25]."""

    def shown(key: Key, tensor: Tensor) -> tuple[Key, Tensor]:
        return Key(key.component, f"of {key.value}"), np.asarray(tensor) - 1

    _, floors = observed(tmp_path, program, Fake(threads=0.5, mid=0.25), shown)
    assert floors == {
        Key("net", "of mid"): pytest.approx(0.25 / 13**0.5),
        Key("net", "of y"): pytest.approx(0.5 / 13**0.5),
    }


def test_a_value_whose_size_the_noise_decides_is_infinitely_far_from_itself(tmp_path: Path, program: Program) -> None:
    """``mid`` is kept as whether its numbers are above 4.1, ``y`` as those that are."""

    def shown(key: Key, tensor: Tensor) -> tuple[Key, Tensor]:
        above = np.asarray(tensor) > 4.1
        return key, above if key.value == "mid" else np.asarray(tensor)[above]

    _, floors = observed(tmp_path, program, Fake(threads=0.5, mid=0.25), shown)
    assert floors == {Key("net", "mid"): np.inf, Key("net", "y"): np.inf}


def test_a_gap_of_the_observer_is_no_noise(tmp_path: Path, program: Program) -> None:
    found, floors = observed(tmp_path, program, Fake(probes=0.5))
    assert found.noise_floor == 0
    assert found.observer_gap == pytest.approx(0.1, rel=0.2)
    assert found.repeats
    assert floors == {}


def test_both_are_told_apart(tmp_path: Path, program: Program) -> None:
    found, _ = observed(tmp_path, program, Fake(threads=0.05, probes=0.5))
    assert found.noise_floor == pytest.approx(0.01, rel=1e-3)
    assert found.observer_gap == pytest.approx(0.1, rel=0.2)


def test_runs_that_part_are_not_blamed_on_threads(tmp_path: Path, program: Program) -> None:
    """Every run is off by 0.05 more than the one before; the probed one was the first."""
    found, floors = observed(tmp_path, program, Fake(runs=0.05, threads=0.5))
    assert not found.repeats
    # The second plain run against the first with more threads: one run apart, and the threads.
    assert found.noise_floor == pytest.approx(0.09, rel=0.05)
    # The largest of what the runs showed: the last one had other threads, too.
    assert floors[Key("net", "y")] == pytest.approx((5 * 0.05 + 0.5) / 5, rel=0.05)
    assert found.runs == 5


def test_the_largest_of_several_runs_is_the_floor(tmp_path: Path, program: Program) -> None:
    """The first further run with probes is off by 4 · 0.5, the last, whose threads take 2.4 off, by 5 · 0.5 − 2.4."""
    _, floors = observed(tmp_path, program, Fake(runs=0.5, threads=-2.4))
    assert floors[Key("net", "y")] == pytest.approx(2.0 / 5)


def test_engines_know_their_own_noise(tmp_path: Path, program: Program) -> None:
    infos = [BuildInfo(rebuild_floor=0.125, observer_gap=0.5), BuildInfo(rebuild_floor=0.25, observer_gap=0.0)]
    assert observed(tmp_path, program, Fake(info=infos[0]))[0] == Observation(0.125, 0.5, runs=2)
    several: Any = SimpleNamespace(
        sessions={n: SimpleNamespace(build_info=i) for n, i in zip("ab", infos, strict=True)}
    )
    nothing: Any = None
    assert observe(several, nothing, nothing, nothing)[0] == Observation(0.25, 0.5, runs=2)


def test_emulation_is_not_run_again(tmp_path: Path, program: Program) -> None:
    backend = Fake(runs=1.0)
    backend.emulated = True
    assert observed(tmp_path, program, backend)[0] == Observation(0.0, 0.0, runs=0)
    assert len(backend.log) == 1


def test_a_gap_is_that_of_the_worst_output_of_the_last_component() -> None:
    def outputs(first: float, a: float, b: float) -> dict[str, dict[str, np.ndarray]]:
        return {"early": {"e": np.array([first])}, "late": {"a": np.array([3.0, a]), "b": np.array([3.0, b])}}

    ours = outputs(1.0, 4.0, 4.0)
    assert gap(ours, outputs(1.0, 4.0, 4.0)) == 0
    assert gap(ours, outputs(1.0, 4.5, 4.05)) == pytest.approx(0.1)
    assert gap(ours, outputs(1.0, 4.05, 4.5)) == pytest.approx(0.1)
    assert 0 < gap(ours, outputs(2.0, 4.0, 4.0)) < 1e-300  # not equal, and not at the end
    assert gap(outputs(1.0, np.nan, 4.0), outputs(1.0, np.nan, 4.0)) == 0
    assert gap(ours, {"early": ours["early"], "late": {"a": np.zeros(3), "b": np.zeros(2)}}) == np.inf


def observation(**fields: Any) -> Observation:
    return Observation(**{"noise_floor": 0.0, "observer_gap": 0.0, "first_unsteady": None} | fields)


def test_notes_of_an_observation() -> None:
    def notes(kind: Any, **fields: Any) -> list[str]:
        return list(kind("ort", observation(**fields), draws=False))

    def gap(spec: str, of: Observation | None, *, draws: bool) -> Iterator[str]:
        return assemble.observation_notes(spec, None, of, draws=draws)

    def noise(spec: str, of: Observation, *, draws: bool) -> Iterator[str]:
        return assemble.observation_notes(spec, of, None, draws=draws)

    assert notes(gap, observer_gap=0.2, noise_floor=0.1)[0].startswith("observer gap 0.2: with probes ort runs")
    assert notes(gap, observer_gap=0.1, noise_floor=0.1) == []
    assert list(gap("ort", observation(observer_gap=0.2), draws=True)) == []
    assert list(gap("ort", None, draws=False)) == []
    told = notes(noise, first_unsteady="conv", noise_floor=0.125, repeats=True)
    assert told == ["ort: another thread count changes its sums, first at conv (noise floor 0.12)"]
    assert "it is not deterministic" in notes(noise, first_unsteady="conv", repeats=False)[0]
    assert "draws random numbers" in next(iter(noise("ort", observation(first_unsteady="c"), draws=True)))
    assert notes(noise) == []
    assert assemble._standing_out(observation(observer_gap=0.3, noise_floor=0.1)) == (pytest.approx(0.2), 0.1)
    assert assemble._standing_out(observation(observer_gap=0.1, noise_floor=0.3)) == (0, 0.3)
