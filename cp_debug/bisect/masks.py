"""Masks of attention: scores that one side makes −Inf and the other −1e9, of which Softmax makes the same zeros."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from cp_debug.bisect.candidate_run import CandidateRun, loader
from cp_debug.bisect.causes.precision import OVERFLOWS
from cp_debug.bisect.range_loss import FURTHEST, matters
from cp_debug.bisect.replay import Load, Replayer
from cp_debug.bisect.replayed import EXCESS
from cp_debug.bisect.result import DIVERGENT, GUILTY, INHERITED, LayerRow
from cp_debug.bisect.whole_numbers import as_tensor
from cp_debug.errors import InputError
from cp_debug.graph.graph import Graph, readers
from cp_debug.graph.operators import MOVERS
from cp_debug.probes.held import CapturedRun
from cp_debug.programs.pipeline import Key

MASKED = -100.0
"""Numbers up to this one may stand for "left out": e⁻¹⁰⁰ is nothing beside 1, in any precision."""
ENDS = {"Attention", "BiasSoftmax", "Exp", "MultiHeadAttention", "Softmax"}
"""Operators that make 0 of what is masked."""
PASSES = MOVERS | {"Add", "Cast", "Clip", "Div", "Max", "Min", "Mul", "ReduceMax", "Sub", "Where"}
"""Operators through which a mask is carried to those."""


def acquit_masks(
    run: CandidateRun, rows: Mapping[Key, LayerRow], reference: CapturedRun, test: CapturedRun
) -> list[str]:
    """Acquit layers that differ by the number alone that stands for "left out"; returns their names.

    The numbers that differ are masked on both sides, and whatever reads them comes to the same, in exact arithmetic and
    on this sample: the next Softmax makes the same of both. A mask that reaches an output, or of which one side makes
    NaN, is no such thing. Changes the rows.
    """
    found = []
    for key, row in rows.items():
        accused = row.verdict == GUILTY or (row.verdict == DIVERGENT and row.op == "Constant")
        if not accused or run.oracle is None or row.stats.shape_mismatch:
            continue
        replayer = run.replayer(key.component, test)
        number = ends_of_mask(replayer.graph, key.value)
        if not number:
            continue
        loads = [loader(capture, key.component) for capture in (reference, test)]
        exact, other = (as_tensor(load(key.value)) for load in loads)
        if not (exact.is_floating_point() and other.is_floating_point()):
            continue
        other = other.to(exact)
        masked = (exact <= MASKED) & (other <= MASKED)
        if not bool((masked & (exact != other)).any()) or not _agrees_beside(replayer, key.value, row, masked, loads):
            continue
        change = key.value, exact, torch.where(masked, other, exact)
        gone = run.precision.roundoff
        if matters(replayer.graph, replayer.oracle, replayer.known, loads[0], change, gone, number + FURTHEST):
            continue
        ours, theirs = (f"{float(t[masked].min()):.6g}".replace("inf", "Inf") for t in (exact, other))
        row.verdict, row.side = INHERITED, "test"
        row.why = f"masks with {theirs} instead of {ours}; the result after it is the same"
        found.append(row.name)
    return found


def beside_masks(graph: Graph, value: str, *runs: Tensor) -> tuple[Tensor, ...]:
    """A value in several runs, the exact one last, with 0 where numbers beyond FP16 say "left out" in all of them.

    A Softmax makes 0 of −3.4e38, and of the −65504 or −Inf that FP16 has for it. All have one shape, and float dtypes.
    """
    masked = runs[-1] <= -OVERFLOWS
    for run in runs[:-1]:
        masked &= run <= MASKED
    if not bool(masked.any()) or not ends_of_mask(graph, value):
        return runs
    return tuple(run.masked_fill(masked, 0.0) for run in runs)


def ends_of_mask(graph: Graph, value: str) -> int:
    """Number of nodes that a value reaches up to those that make 0 of a mask; 0 where it reaches anything else."""
    outputs, reached = {info.name for info in graph.outputs}, {value}
    passes = lambda node, _: node.op in PASSES  # noqa: E731
    nodes = [node for node, _ in readers(graph, value, passes)]
    reached.update(o for node in nodes if node.op in PASSES for o in node.outputs)
    return len(nodes) if reached.isdisjoint(outputs) and all(node.op in PASSES | ENDS for node in nodes) else 0


def _agrees_beside(replayer: Replayer, value: str, row: LayerRow, masked: Tensor, loads: Sequence[Load]) -> bool:
    """Whether what is not masked has no error that precision cannot explain."""
    if row.op == "Constant":
        exact, held = (as_tensor(load(value)).double() for load in loads)
        error = held - exact
    else:
        try:
            error, exact = replayer.introduced(value, loads[1])
        except InputError:
            return False
    kept = ~masked.to(error.device)
    lost, scale = (float(t[kept].double().norm()) for t in (error, exact))
    return lost <= EXCESS * replayer.precision.roundoff * scale
