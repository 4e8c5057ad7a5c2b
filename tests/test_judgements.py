"""Verdicts and their words, from figures that are given: each threshold, each side, each name in a sentence."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from nets import NetBuilder, node_of

from cp_debug.backends.arithmetic import FP64
from cp_debug.backends.executor import Executor
from cp_debug.bisect import perturbation
from cp_debug.bisect.assemble import Collected, both_inexact, observation_notes
from cp_debug.bisect.observe import Observation
from cp_debug.bisect.perturbation import DRAWS, FEW, doubt
from cp_debug.bisect.remainder import _rounding, not_replayed, remainder
from cp_debug.bisect.replayed import EXCESS, Replay
from cp_debug.bisect.result import LayerRow, Remainder, check_not_empty, has_no_elements
from cp_debug.bisect.standards import int8_notes
from cp_debug.bisect.verdict import Judgement, judge, oracle_is_alone
from cp_debug.errors import InputError
from cp_debug.graph.graph import Graph
from cp_debug.probes.statistics import TensorStats, compare
from cp_debug.programs.pipeline import Key
from cp_debug.programs.precision import PRECISIONS
from cp_debug.recipes.base import Sample
from cp_debug.recipes.registry import load_model

FP16, FP32 = PRECISIONS["fp16"], PRECISIONS["fp32"]
TOLERANCE = {"rtol": 1e-3, "atol": 1e-4}
HEALTHY = Replay(introduced=5e-8, inherited=1e-8, expected=6e-8, excess=5 / 6)


def stats(*test: float, reference: tuple[float, ...] = (1.0, 2.0)) -> TensorStats:
    return compare(np.array(reference), np.array(test))


APART = stats(1.0, 2.5)


def judged(
    replay: Replay | None,
    found: TensorStats = APART,
    floor: float = 0.0,
    precision: str = "fp32",
    floor_read: float = 0.0,
) -> Judgement:
    return judge(found, replay, PRECISIONS[precision], **TOLERANCE, floor=floor, floor_read=floor_read)


@pytest.mark.parametrize(("off", "within"), [(2.05e-3, True), (2.15e-3, False)])
def test_the_tolerance_is_an_absolute_part_and_one_of_the_largest_reference(off: float, within: bool) -> None:
    """1e-4 + 1e-3 · 2; the test's own values do not widen it."""
    assert judged(None, stats(1.0, 2.0 + off)) == Judgement("ok" if within else "divergent", within)
    assert judged(HEALTHY, stats(1.0, 2.0 + off)) == Judgement("ok" if within else "inherited", within)
    assert not judged(None, stats(1e9, 2.0)).within


def test_a_tolerance_without_its_absolute_part_is_relative() -> None:
    assert judge(stats(1.0, 2.0 + 1.9e-3), None, FP32, 1e-3, 0.0, 0.0).within
    assert not judge(stats(1.0, 2.0 + 2.1e-3), None, FP32, 1e-3, 0.0, 0.0).within
    assert judge(stats(1.0, 2.9), None, FP32, 0.0, 1.0, 0.0).within


def test_another_shape_says_which_side_has_which() -> None:
    found = judged(HEALTHY, stats(1.0, 2.0, 3.0))
    assert (found.verdict, found.within) == ("shape", False)
    assert found.why == "the shape is [3], the reference's [2]"


GUILTY = Replay(introduced=0.2, inherited=0.01, expected=1e-3, excess=200.0)


@pytest.mark.parametrize(("excess", "verdict"), [(EXCESS, "inherited"), (1.01 * EXCESS, "guilty"), (0.2, "inherited")])
def test_a_layer_is_guilty_beyond_the_limit_of_its_excess(excess: float, verdict: str) -> None:
    found = judged(replace(GUILTY, excess=excess))
    assert found.verdict == verdict
    assert found.side == "test"
    assert ("FP32 explains" in found.why) == (verdict == "guilty")


@pytest.mark.parametrize("channels", [False, True])
def test_what_is_no_larger_than_the_noise_between_two_runs_is_nobodys_fault(channels: bool) -> None:
    replay = replace(GUILTY, excess=1.0, channel_excess=200.0) if channels else GUILTY
    assert judged(replay, floor=0.19).verdict == "guilty"
    assert judged(replay, floor=0.21).verdict == "inherited"
    assert judged(replay, floor=1.3, floor_read=0.79).verdict == "inherited"
    assert judged(replay, floor=1.3, floor_read=0.81).verdict == "guilty"  # two runs differ before they come here


def test_what_both_sides_have_and_what_nobody_reads_is_innocent() -> None:
    assert judged(GUILTY, stats(1.0, 2.0)).verdict == "ok"
    assert judged(replace(GUILTY, unread=True)).verdict == "inherited"
    assert judged(replace(GUILTY, unread=True, new_nonfinite=3)).verdict == "inherited"
    assert judged(replace(GUILTY, unread=True), stats(1.0, 2.0001)).verdict == "ok"


def test_the_worst_channels_are_named_as_such() -> None:
    found = judged(replace(GUILTY, excess=1.0, channel_excess=9.0))
    assert (found.verdict, found.why) == ("guilty", "its worst channels introduce 9× what FP32 explains")
    assert judged(replace(GUILTY, excess=1.0, channel_excess=3.9)).verdict == "inherited"


@pytest.mark.parametrize(
    ("deviation", "says"), [(0.09, ", although it follows its scales"), (0.11, ", and does not follow its scales")]
)
@pytest.mark.parametrize("channels", [False, True])
def test_a_layer_in_int8_does_what_its_scales_say_or_not(deviation: float, says: str, channels: bool) -> None:
    replay = replace(GUILTY, deviation_from_scales=deviation)
    replay = replace(replay, excess=1.0, channel_excess=9.0) if channels else replay
    assert judged(replay, precision="int8").why.endswith("what INT8 explains" + says)
    quantized = judge(APART, replay, PRECISIONS["fp32"], 1e-4, 1e-6, 0.0, kind="int4")  # by its own nodes, on FP32
    assert quantized.why.endswith("what INT4 explains" + says)


def test_born_infinities_tell_how_far_the_reference_reaches() -> None:
    born = replace(GUILTY, excess=0.0, new_nonfinite=2)
    beyond = stats(1.0, np.inf, reference=(1.0, 70000.0))
    found = judged(born, beyond, precision="fp16")
    assert found.verdict == "guilty"
    assert found.why == "NaN or Inf appears here in 2 values: the reference reaches 70000, FP16 ends at 65504"
    assert judged(born, beyond).why == "NaN or Inf appears here in 2 values"  # FP32 holds 70000
    assert judged(born, stats(1.0, np.inf), precision="fp16").why == "NaN or Inf appears here in 2 values"


@pytest.mark.parametrize(("roundoffs", "guilty"), [(1.0, False), (20.0, True)])
def test_an_overflow_that_the_result_does_not_show_is_none(roundoffs: float, guilty: bool) -> None:
    """A kernel may keep a constant beyond FP16 in FP32: then the layer is off by a rounding alone."""
    off = roundoffs * FP16.roundoff
    replay = replace(HEALTHY, introduced=off, expected=off, excess=1.0, range_loss=float("inf"))
    assert (judged(replay, precision="fp16").verdict == "guilty") == guilty


@pytest.mark.parametrize(("roundoffs", "verdict"), [(7.5, "inherited"), (8.5, "guilty")])
def test_a_loss_of_range_is_measured_in_roundoffs(roundoffs: float, verdict: str) -> None:
    found = judged(replace(HEALTHY, range_loss=roundoffs * FP16.roundoff), precision="fp16")
    assert found.verdict == verdict
    assert ("leave the range of FP16" in found.why) == (verdict == "guilty")


def test_a_reference_at_fault_is_named_as_the_side() -> None:
    found = judged(replace(HEALTHY, reference_excess=50.0))
    assert (found.verdict, found.side) == ("guilty", "reference")
    assert "the reference introduces 50×" in found.why
    assert judged(replace(HEALTHY, reference_excess=EXCESS)).verdict == "inherited"
    assert judged(replace(GUILTY, reference_excess=50.0)).side == "test"


def test_an_oracle_is_alone_only_where_both_sides_agree_and_are_far_from_it() -> None:
    near = stats(1.0, 2.0 + 4e-7)  # relative L2 1.8e-7
    alone = Replay(introduced=0.1, expected=6e-8, excess=0.1 / 6e-8)
    assert oracle_is_alone(near, alone)
    assert judged(alone, near).verdict == "ok"
    assert not oracle_is_alone(stats(1.0, 2.0 + 1e-5), alone)  # the sides do not agree
    assert not oracle_is_alone(near, replace(alone, introduced=6e-7))  # not far beyond what they differ by
    assert not oracle_is_alone(stats(1.0, 2.0 + 1e-12), replace(alone, introduced=2e-7))  # within the precision
    assert not oracle_is_alone(stats(np.nan, 2.0 + 4e-7), alone)
    assert not oracle_is_alone(near, replace(alone, expected=None))
    assert oracle_is_alone(near, replace(alone, introduced=1e-7, new_nonfinite=1))


# Figures of a replay ------------------------------------------------------------------------------------------------


def test_figures_of_a_replay_are_relative_to_the_exact_result() -> None:
    exact, captured = torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.5])
    found = Replay.of(captured, exact, [torch.tensor([3.0, 4.25])], FP32)
    assert found.introduced == pytest.approx(0.1)
    assert found.expected == pytest.approx(0.05)
    assert found.excess == pytest.approx(2.0)


def test_the_largest_allowance_counts() -> None:
    exact, captured = torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.5])
    correct = [torch.tensor([3.0, 4.25]), torch.tensor([3.0, 4.0]), torch.tensor([3.0, 3.0])]
    assert Replay.of(captured, exact, correct, FP32).excess == pytest.approx(0.5)
    assert Replay.of(captured, exact, correct[:2], FP32, lambda shown: 2.0).excess == pytest.approx(0.25)
    # Half a roundoff of the whole result may always be introduced.
    one_rounding = Replay.of(captured, exact, [exact], FP16)
    assert one_rounding.expected == pytest.approx(FP16.roundoff / 2)
    assert one_rounding.excess == pytest.approx(0.1 / (FP16.roundoff / 2))


def test_numbers_that_are_born_are_counted_in_the_captured_result_only() -> None:
    exact, captured = torch.tensor([1.0, np.inf, 2.0, np.nan]), torch.tensor([np.nan, 1.0, np.inf, 5.0])
    assert Replay.of(captured, exact, [exact], FP32).new_nonfinite == 2


def test_a_replay_of_another_shape_says_both() -> None:
    found = Replay.of(torch.zeros(2), torch.zeros(3), [], FP32)
    assert found.skipped == "the shape is [2], the oracle's [3]"
    assert found.excess is None


# The worst of several samples ---------------------------------------------------------------------------------------


def row(name: str = "conv", **fields: Any) -> LayerRow:
    given: dict[str, Any] = {"stats": APART, "verdict": "ok", "within": True, "replay": HEALTHY} | fields
    return LayerRow(0, "net", name, name, "Conv", **given)


@pytest.mark.parametrize("order", [1, -1])
def test_of_several_samples_the_worst_row_of_each_layer_is_kept(order: int) -> None:
    collected = Collected()
    rows = [
        {Key("net", "a"): row("a", sample=0), Key("net", "b"): row("b", verdict="guilty", sample=0)},
        {Key("net", "a"): row("a", replay=replace(HEALTHY, excess=3.0), sample=1), Key("net", "b"): row("b", sample=1)},
    ]
    for of_sample in rows[::order]:
        collected.add(of_sample)
    assert [r.sample for r in (collected.rows[Key("net", "a")], collected.rows[Key("net", "b")])] == [1, 0]


def test_only_a_sample_worse_than_all_before_is_explained() -> None:
    collected = Collected()
    mild, bad = {Key("net", "a"): row("a")}, {Key("net", "a"): row("a", verdict="guilty")}
    assert collected.is_worst(mild)
    collected.add(mild)
    assert collected.is_worst(bad)
    collected.add(bad)
    assert not collected.is_worst(mild)
    assert not collected.is_worst({})


def observed(*samples: tuple[float, float]) -> Collected:
    """What was seen in samples with these noise floors and observer gaps."""
    collected = Collected()
    for place, (floor, gap) in enumerate(samples):
        collected.observe(Observation(floor, gap, first_unsteady=f"conv_{place}" if floor else None))
    return collected


def test_the_observation_with_the_largest_gap_is_kept() -> None:
    found = observed((0.0, 0.1), (0.0, 0.3), (0.0, 0.2)).observation
    assert found is not None
    assert found.observer_gap == 0.3


@pytest.mark.parametrize("order", [1, -1])
def test_a_gap_is_judged_by_the_noise_of_its_own_sample(order: int) -> None:
    # The larger gap is no more than the noise of its sample, the smaller one is not explained by any.
    collected = observed(*[(0.5, 0.4), (0.0, 0.01)][::order])
    assert collected.observation is not None
    assert (collected.observation.noise_floor, collected.observation.observer_gap) == (0.0, 0.01)
    noise, gap = collected.notes("ort")
    assert "(noise floor 0.5)" in noise
    assert gap.startswith("observer gap 0.01: ")


@pytest.mark.parametrize("order", [1, -1])
def test_noise_that_only_one_sample_shows_is_told(order: int) -> None:
    collected = observed(*[(0.0, 0.0), (0.02, 0.0)][::order])
    (noise,) = collected.notes("ort")
    assert noise.endswith("(noise floor 0.02)")
    assert collected.observation is not None
    assert collected.observation.noise_floor == 0.02
    assert collected.first_observation is not None
    assert collected.first_observation.noise_floor == (0.0 if order > 0 else 0.02)


def test_what_was_not_emulated_or_not_replayed_is_counted_and_named() -> None:
    collected = Collected()
    names = "abcdefg"
    rows = {Key("net", n): row(n, replay=replace(HEALTHY, not_emulated=("node",))) for n in names}
    rows |= {Key("net", f"s{i}"): row(f"s{i}", replay=Replay(skipped="it draws")) for i in range(3)}
    rows[Key("net", "plain")] = row("plain", stats=stats(1.0, 2.0), replay=GUILTY)
    collected.add(rows)
    collected.unexplained["a share is not known"] = None
    collected.ways["an If went another way"] = None
    notes = collected.notes("ort")
    assert "7 layers not emulated, so their expected error is unknown: a, b, c, d, e and 2 more" in notes
    assert "3 layers not replayed: it draws" in notes
    assert {"a share is not known", "an If went another way"} <= set(notes)
    assert any(note.startswith("1 layer has the same bits on both sides") for note in notes)


def test_layers_that_are_inexact_on_both_sides_are_told_with_the_worst() -> None:
    same = stats(1.0, 2.0)
    rows = [row(n, stats=same, replay=replace(GUILTY, excess=e)) for n, e in (("a", 7.0), ("b", 70.0), ("c", 3.0))]
    (said,) = both_inexact(rows)
    assert said.startswith("2 layers have the same bits on both sides, but both are inexact, up to 70×")
    assert said.endswith("what precision explains (b): a, b")
    assert both_inexact(rows[2:]) == []
    (said,) = both_inexact([row("e", stats=same, replay=replace(GUILTY, excess=0.0, new_nonfinite=3))])
    assert said.endswith("but both have NaN or Inf where exact arithmetic has others, or numbers: e")
    (doubt,) = both_inexact([row("d", stats=stats(1.0, 2.0 + 4e-7), replay=replace(GUILTY, expected=6e-8, excess=1e6))])
    assert doubt.startswith("1 layer agrees on both sides")
    assert doubt.endswith("may itself be wrong there: d")


@pytest.mark.parametrize("off", [0.0, 4e-7])
def test_a_result_that_does_not_follow_from_what_was_captured_is_no_doubt_of_the_oracle(off: float) -> None:
    torn = row("relu", stats=stats(1.0, 2.0 + off), replay=replace(GUILTY, contradicted=("u",)))
    (said,) = both_inexact([torn])
    assert said.startswith("the captured values contradict each other: relu has the reference's result")
    assert "follow from u as captured" in said
    assert judge(torn.stats, torn.replay, PRECISIONS["fp32"], 1e-4, 1e-6, 0.0).verdict in ("ok", "inherited")


def noted(observation: Observation | None, *, draws: bool = False) -> list[str]:
    return list(observation_notes("ort", observation, observation, draws=draws))


def test_a_backend_that_differs_from_itself_says_why_where_and_by_how_much() -> None:
    unsteady = Observation(0.02, 0.01, first_unsteady="conv_3")
    (said,) = noted(unsteady)
    assert said == "ort: another thread count changes its sums, first at conv_3 (noise floor 0.02)"
    (said,) = noted(replace(unsteady, repeats=False))
    assert "it is not deterministic: runs differ, first at conv_3" in said
    (said,) = noted(replace(unsteady, observer_gap=9.0), draws=True)
    assert "it draws random numbers: runs differ, first at conv_3" in said
    assert noted(Observation(0.02, 0.02)) == []
    assert noted(None) == []


def test_probes_that_change_a_program_are_told_beside_its_noise() -> None:
    (said,) = noted(Observation(0.01, 0.011))
    assert said.startswith("observer gap 0.011: with probes ort runs a different program")
    assert noted(Observation(0.01, 0.009)) == []


def test_a_node_is_covered_by_a_replay_that_knows_what_to_expect(tmp_path: Path) -> None:
    net = NetBuilder()
    net.op("Neg", net.op("Exp", net.op("Neg", "x", name="a"), name="b"), name="c")
    graph = Graph(net.save(tmp_path / "net.onnx", {"x": (1, [1, 4])}, ["c"]))
    known = {n: Replay(nodes=(f"node_{n}",), introduced=0.0) for n in "abc"}
    assert not_replayed(graph, known) == {}
    unknown = known | {"b": Replay(nodes=("node_b",), introduced=0.1, not_emulated=("node_b",))}
    assert not_replayed(graph, unknown) == {"node_b": "its precision is not emulated"}
    assert not_replayed(graph, known | {"c": Replay(skipped="why")}) == {"node_c": "why"}
    assert not_replayed(graph, {n: known[n] for n in "ac"}) == {"node_b": "no probe shows what it computes"}


def test_the_layer_that_agrees_least_with_its_scales_is_named() -> None:
    backend: Any = SimpleNamespace(precision="int8", spec="ort-int8", emulated=False)
    pipeline: Any = SimpleNamespace(backend=backend, programs=[], sessions={})
    reference: Any = SimpleNamespace(backend=SimpleNamespace(precision="fp32", spec="ort", emulated=False), programs=[])
    rows = [
        LayerRow(i, "net", name, name, "Conv", APART, "ok", True, replay=replace(HEALTHY, deviation_from_scales=off))
        for i, (name, off) in enumerate((("near", 1e-6), ("far", 1e-3), ("exact", 0.0)))
    ]
    (note,) = int8_notes(reference, pipeline, rows, {})
    assert note.endswith(
        "every layer computes what its scales say from its own inputs, to 60 dB or better, the least at far"
    )
    other = replace(GUILTY, introduced=0.3, deviation_from_scales=0.2)
    rows.append(LayerRow(3, "net", "other", "other", "Conv", APART, "guilty", False, replay=other))
    (note,) = int8_notes(reference, pipeline, rows, {})
    assert "every layer but other computes what its scales say from its own inputs, to 60 dB or better" in note
    (note,) = int8_notes(reference, pipeline, rows[3:], {})
    assert note.endswith("no layer computes what its scales say from its own inputs: other")


def lone(monkeypatch: pytest.MonkeyPatch, missing: dict[str, str], emulated: bool) -> Remainder:
    """The remainder of a run whose one output is off by half of what it should be."""
    monkeypatch.setattr("cp_debug.bisect.remainder.not_replayed", lambda graph, replays: missing)
    monkeypatch.setattr("cp_debug.bisect.remainder._rounding", lambda run, sample: 0.25)
    model = SimpleNamespace(components=[SimpleNamespace(name="net")])
    run: Any = SimpleNamespace(
        pipeline=SimpleNamespace(model=model, backend=SimpleNamespace(emulated=emulated)),
        programs={"net": SimpleNamespace(graph=None)},
    )
    ours, theirs = np.full((1, 4), 2, np.float32), np.full((1, 4), 3, np.float32)
    sample: Any = None
    return remainder(run, sample, {"net": {"y": theirs}}, {"net": {"y": ours}}, {})


def test_what_rounding_makes_is_told_where_all_was_replayed_and_nothing_was_emulated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert lone(monkeypatch, {}, emulated=False).rounding == 0.25
    assert lone(monkeypatch, {}, emulated=False).divergence == pytest.approx(0.5)
    assert lone(monkeypatch, {}, emulated=True).rounding is None
    assert lone(monkeypatch, {"a": "why"}, emulated=False).rounding is None
    assert lone(monkeypatch, {"a": "why"}, emulated=False).not_replayed == {"a": "why"}


def test_what_rounding_makes_is_relative_to_the_oracle(tmp_path: Path) -> None:
    """FP16 has 10⁻¹⁰ as 0: all of the output is gone."""
    net = NetBuilder()
    net.op("Mul", "x", net.weight(np.full(4, 1e-5, np.float32)), name="y")
    path = net.save(tmp_path / "net.onnx", {"x": (1, [1, 4])}, ["y"])
    model = load_model(str(path))
    sample = Sample({"x": np.full((1, 4), 1e-5, np.float32)}, "s")
    graph = Graph(path)
    run: Any = SimpleNamespace(
        pipeline=SimpleNamespace(model=model), precision=PRECISIONS["fp16"], oracle="fp32", device="cpu",
        programs={c.name: SimpleNamespace(graph=graph) for c in model.components}, graphs={"net": graph},
    )  # fmt: skip
    assert _rounding(run, sample) == pytest.approx(1.0)


@pytest.mark.parametrize(("count", "draws"), [(FEW, DRAWS), (FEW - 1, 4 * DRAWS)])
def test_few_elements_take_more_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int, draws: int) -> None:
    """The norm is the root of the mean square over the draws, on top of the last node's own."""
    net = NetBuilder()
    net.op("Neg", net.op("Tanh", "x", name="mid"), name="y")
    graph = Graph(net.save(tmp_path / "net.onnx", {"x": (1, [1, count])}, ["y"]))
    asked: list[str] = []

    def known(oracle: Any, nodes: Any, exact: Any, spreads: Any, generator: Any) -> Any:
        asked.append("y")
        return {"y": exact["y"] + 1e-3 * (len(asked) % 2) * (torch.arange(count) < 4)}

    monkeypatch.setattr("cp_debug.bisect.perturbation._noisy", known)
    found = doubt(Executor(graph, FP64), graph.nodes, {"x": torch.ones(1, count)}, "y")
    assert len(asked) == draws
    assert found == pytest.approx(2e-3 / 2**0.5, rel=1e-3)


def test_a_rounding_is_measured() -> None:
    for kind in (torch.float16, torch.bfloat16):
        measured = perturbation._roundoff(lambda x, kind=kind: x.to(kind).float())
        assert measured == torch.finfo(kind).eps / 2
    assert perturbation._is_some(torch.tensor([0.0, 1e-30]))
    assert not perturbation._is_some(torch.zeros(2))
    assert not perturbation._is_some(None)


def test_levels_are_rounded_here_where_a_node_of_the_segment_makes_them() -> None:
    dequantize, quantize = node_of("DequantizeLinear", ["q", "s"]), node_of("QuantizeLinear", ["x", "s"], ["q"])
    assert perturbation._rounded_here(dequantize, [quantize, dequantize], {"x": torch.ones(1)})
    assert not perturbation._rounded_here(dequantize, [quantize, dequantize], {"q": torch.ones(1)})
    assert not perturbation._rounded_here(dequantize, [dequantize], {})


def plain_row(name: str, *shape: int) -> LayerRow:
    return LayerRow(0, "net", name, name, "Neg", compare(np.ones(shape), np.ones(shape)), "ok", True)


def test_a_verdict_about_nothing_is_refused() -> None:
    assert has_no_elements(plain_row("a", 0, 3))
    assert not has_no_elements(plain_row("a", 1, 3))
    check_not_empty("ort", [])
    check_not_empty("ort", [plain_row("a", 0, 3), plain_row("b", 1)])
    with pytest.raises(InputError, match=r"ort: no output was compared: a \(0×3\), b \(0\) without an element"):
        check_not_empty("ort", [plain_row("a", 0, 3), plain_row("b", 0)])
