"""Python scalars that one side rounds to the tensor's type, and the other does not: ``remainder(x, 1.7)`` in BF16."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from cp_debug.backends.torch_backend import DTYPES
from cp_debug.bisect.candidate_run import CandidateRun, loader
from cp_debug.bisect.consequences import difference
from cp_debug.bisect.finding import ROUNDED_SCALAR, Finding
from cp_debug.bisect.replay import Load
from cp_debug.bisect.result import GUILTY, INHERITED, LayerRow
from cp_debug.graph.operators import PRODUCTS
from cp_debug.probes.arrays import as_numpy, as_torch
from cp_debug.probes.held import CapturedRun
from cp_debug.probes.trace import Operation, TorchValue
from cp_debug.programs.pipeline import Key
from cp_debug.programs.torch_span import ModuleOperators, in_fp32
from cp_debug.safe_text import in_digits

NEARER = 0.3
"""Ratio of the distances from a result with the one scalar and with the other, up to which it has the nearer one."""
MOST = 32
"""Layers that are asked."""


def rounded_scalars(
    run: CandidateRun, rows: Mapping[Key, LayerRow], reference: CapturedRun, test: CapturedRun
) -> Iterator[Finding]:
    """A finding for each operator whose Python scalar one side alone rounds, where that makes values differ beyond the
    tolerance. The row of such a value is acquitted: each side is right by its own scalar."""
    kind = DTYPES[run.precision.name] if run.precision.name in ("bf16", "fp16") else None
    asked = 0
    told: set[str] = set()
    for key, row in rows.items():
        if row.within or row.kind != "data" or row.op in PRODUCTS or asked == MOST:
            continue
        replayer = run.replayer(key.component, test)
        operators = replayer.module_operators(loader(test, key.component))
        if operators is None:
            return
        captures = [({*c.names(component=key.component)}, loader(c, key.component)) for c in (reference, test)]
        for value, operation in operators.between(key.value, replayer.known).items():
            narrow = value.dtype if value.dtype in (torch.float16, torch.bfloat16) else kind
            if narrow is None or value.name in told:
                continue
            scalars = {s: _rounded(s, narrow) for s in operators.scalars(operation)}
            scalars = {s: r for s, r in scalars.items() if r != in_fp32(operation, s)}
            if not scalars:
                continue
            asked += 1
            if rounds := _who_rounds(operators, key.value, value, narrow, captures):
                told.add(value.name)
                if row.verdict == GUILTY:
                    row.verdict, row.side, row.why = INHERITED, "test", f"{value.name} has another scalar on each side"
                yield _finding(run, value, scalars, rounds, narrow)


def _rounded(scalar: float, kind: torch.dtype) -> float:
    return float(torch.tensor(scalar, dtype=torch.float64).to(kind))


def _who_rounds(
    operators: ModuleOperators,
    target: str,
    value: TorchValue,
    kind: torch.dtype,
    captures: Sequence[tuple[set[str], Load]],
) -> str:
    """The side that has the scalar of ``value`` rounded where the other has it as it was written; empty for none.

    ``captures``: what each side shows. A side that shows ``value`` itself is asked there, any other at ``target``.
    """

    def scalar(of: Operation, number: float) -> float:
        return _rounded(number, kind) if of is value.operation else in_fp32(of, number)

    rounds = []
    for names, load in captures:
        shown = next((name for name in operators.names(value) if name in names), target)
        own = as_torch(as_numpy(load(shown))).double()
        made = (operators.result(shown, names, load, how) for how in (in_fp32, scalar))
        written, rounded = (_apart(own, result) for result in made)
        rounds.append(None if max(written, rounded) * NEARER < min(written, rounded) else rounded < written)
    return {(True, False): "reference", (False, True): "test"}.get(tuple(rounds), "")  # type: ignore[arg-type]


def _apart(own: Tensor, result: Tensor | None) -> float:
    return torch.inf if result is None else difference(result.double(), own.to(result.device))


def _finding(
    run: CandidateRun, value: TorchValue, scalars: Mapping[float, float], rounds: str, kind: torch.dtype
) -> Finding:
    side = run.reference if rounds == "reference" else run.pipeline
    other = run.pipeline if rounds == "reference" else run.reference
    scalar, rounded = next(iter(scalars.items()))
    name = {torch.float16: "FP16", torch.bfloat16: "BF16"}[kind]
    says = (
        f"{side.backend.spec} rounds the scalar {scalar!r} to {in_digits(rounded)}, as {name} has it, and "
        f"{other.backend.spec} does not: each result is right by its own scalar"
    )
    fix = f"write a scalar that {name} holds, {in_digits(rounded)}, or compute {value.name} in FP32"
    evidence = {"scalar": scalar, "rounded": in_digits(rounded), "rounded_by": rounds}
    return Finding(ROUNDED_SCALAR, says, [value.name], [value.op], evidence=evidence, fix=fix)
