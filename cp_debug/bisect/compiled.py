"""A module compiled by torch and its outputs beyond the tolerance: which side is nearer to FP64, and missing casts.

A case of its own are Python scalars that one side rounds to the tensor's type: ``remainder(x, 1.7)`` in BF16.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace

import onnx
import torch

from cp_debug.backends.base import Backend, Program
from cp_debug.backends.registry import create
from cp_debug.backends.spec import COMPILED, BackendSpec, CompileOptions
from cp_debug.backends.torch_backend import DTYPES
from cp_debug.bisect.candidate_run import CandidateRun, loader
from cp_debug.bisect.finding import MISSING_CASTS, ROUNDED_SCALAR, Finding
from cp_debug.bisect.range_loss import difference
from cp_debug.bisect.replay import Load
from cp_debug.bisect.result import GUILTY, INHERITED, LayerRow
from cp_debug.errors import InputError
from cp_debug.graph.operators import PRODUCTS
from cp_debug.probes.arrays import as_numpy, as_torch
from cp_debug.probes.distance import outputs_apart
from cp_debug.probes.held import CapturedRun
from cp_debug.probes.trace import Operation, TorchValue
from cp_debug.programs.pipeline import Key, Pipeline
from cp_debug.programs.torch_span import ModuleOperators, in_fp32
from cp_debug.recipes.base import Arrays, Sample
from cp_debug.safe_text import in_digits

REST = 0.1
"""Share of the difference that may remain with casts, if their absence is its cause."""
ALIKE = 1.2
"""Ratio of two distances from FP64 up to which neither side is called nearer."""


def compiled_findings(
    run: CandidateRun,
    sample: Sample,
    outputs: tuple[Arrays, Arrays],
    captured: tuple[CapturedRun, CapturedRun],
    rows: Mapping[Key, LayerRow],
    findings: list[Finding],
) -> tuple[list[Finding], list[str]]:
    """The findings with what is known of a compiled module alone, and remarks on its accuracy.

    ``outputs`` are the reference's and the test's, of the last component: name → array in the dtype that the graph
    declares; ``captured`` their values. Nothing is run for other backends, nor where all layers are within the
    tolerance.
    """
    backend = run.pipeline.backend
    if not backend.spec.name.startswith(COMPILED) or all(row.within for row in rows.values()):
        return findings, []
    reference, test = outputs
    graphs = [replace(program, module=None) for program in run.pipeline.programs]  # modules may make FP32 themselves
    nearer = []
    with suppress(InputError):
        exact = _outputs(run, graphs, create(BackendSpec("torch-fp64", backend.device)), sample)
        names = str(backend.spec), str(run.reference.backend.spec)
        nearer = [_nearer(names[0], outputs_apart(exact, test), names[1], outputs_apart(exact, reference))]
    accused = {row.name for row in rows.values() if row.verdict == GUILTY}
    if scalars := list(_rounded_scalars(run, rows, *captured)):
        accused -= {row.name for row in rows.values() if row.verdict == GUILTY}  # they are acquitted
        other = (f for f in findings if not f.evidence.get("declared") and not set(f.layers) & accused)
        return [*scalars, *other], nearer
    options = CompileOptions.parse(backend.spec.options)
    guilty = [row.name for row in rows.values() if row.verdict == GUILTY and row.side == "test"]
    plain, halves = run.precision.name == "fp32", (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)
    casts = any(node.op == "Cast" and node.attribute("to") in halves for p in graphs for node in p.graph.nodes)
    if options.compiler != "inductor" or options.casts or not (casts if plain else not guilty):
        return findings, nearer
    spec = replace(backend.spec, options=str(replace(options, casts=True)))
    rounded = _outputs(run, run.pipeline.programs, create(spec), sample)
    difference, left = outputs_apart(reference, test), outputs_apart(reference, rounded)
    if not left <= REST * difference:
        return findings, nearer
    first = next(row for row in rows.values() if not row.within)
    found = Finding(
        MISSING_CASTS,
        "inductor does not round between the operators of one kernel, as eager does: with emulate_precision_casts the "
        + "; ".join([f"outputs differ by {left:.2g} instead of {difference:.2g}", *nearer]),
        guilty or [first.name],
        [row.op for row in rows.values() if row.name in guilty] or [first.op],
        evidence={"difference": difference, "with_casts": left},
        fix=f"none where more exact is right; else torch._inductor.config.emulate_precision_casts = True, here {spec}",
    )
    return [found, *(f for f in findings if not f.evidence.get("declared") and not set(f.layers) & {*guilty})], []


def _outputs(run: CandidateRun, programs: Sequence[Program], backend: Backend, sample: Sample) -> Arrays:
    """Outputs of the test's last component on another backend."""
    model = run.pipeline.model
    with Pipeline(model, programs, backend) as pipeline:
        return pipeline.run(sample)[model.components[-1].name]


def _nearer(test: str, own: float, reference: str, other: float) -> str:
    """Which of two sides is nearer to FP64, in words."""
    says = f"from FP64, {test} is off by {own:.2g} and {reference} by {other:.2g}"
    if own == other:
        return says
    name, near, far = (test, own, other) if own < other else (reference, other, own)
    if not near:
        return f"{says}: {name} is exact"
    times = far / near
    if times < ALIKE:
        return says
    return f"{says}: {name} is {times:.2g} times nearer" if times < 100 else f"{says}: {name} is far nearer"


NEARER = 0.3
"""Ratio of the distances from a result with the one scalar and with the other, up to which it has the nearer one."""
MOST = 32
"""Layers that are asked."""


def _rounded_scalars(
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
                sides = [str(side.backend.spec) for side in (run.reference, run.pipeline)]
                who, other = sides if rounds == "reference" else reversed(sides)
                scalar, shown = next((s, in_digits(r)) for s, r in scalars.items())
                name = {torch.float16: "FP16", torch.bfloat16: "BF16"}[narrow]
                says = (
                    f"{who} rounds the scalar {scalar!r} to {shown}, as {name} has it, and {other} does not: each "
                    "result is right by its own scalar"
                )
                fix = f"write a scalar that {name} holds, {shown}, or compute {value.name} in FP32"
                evidence = {"scalar": scalar, "rounded": shown, "rounded_by": rounds}
                yield Finding(ROUNDED_SCALAR, says, [value.name], [value.op], evidence=evidence, fix=fix)


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
        written, rounded = (torch.inf if r is None else difference(r.double(), own.to(r.device)) for r in made)
        rounds.append(None if max(written, rounded) * NEARER < min(written, rounded) else rounded < written)
    return {(True, False): "reference", (False, True): "test"}.get(tuple(rounds), "")  # type: ignore[arg-type]
