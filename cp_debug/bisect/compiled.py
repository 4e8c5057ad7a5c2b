"""A module compiled by torch and its outputs beyond the tolerance: which side is nearer to FP64, and missing casts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace

import onnx

from cp_debug.backends.base import Backend, Program
from cp_debug.backends.registry import create
from cp_debug.backends.spec import COMPILED, BackendSpec, CompileOptions
from cp_debug.bisect.candidate_run import CandidateRun
from cp_debug.bisect.finding import MISSING_CASTS, Finding
from cp_debug.bisect.remainder import apart
from cp_debug.bisect.result import GUILTY, LayerRow
from cp_debug.bisect.scalars import rounded_scalars
from cp_debug.errors import InputError
from cp_debug.probes.held import CapturedRun
from cp_debug.programs.pipeline import Key, Pipeline
from cp_debug.recipes.base import Arrays, Sample

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
        nearer = [_nearer(names[0], apart(exact, test), names[1], apart(exact, reference))]
    accused = {row.name for row in rows.values() if row.verdict == GUILTY}
    if scalars := list(rounded_scalars(run, rows, *captured)):
        accused -= {row.name for row in rows.values() if row.verdict == GUILTY}  # they are acquitted
        other = (f for f in findings if not f.evidence.get("declared") and not set(f.layers) & accused)
        return [*scalars, *other], nearer
    options = CompileOptions.parse(backend.spec.options)
    guilty = [row.name for row in rows.values() if row.verdict == GUILTY and row.side == "test"]
    plain = run.precision.name == "fp32"
    if options.compiler != "inductor" or options.casts or not (_casts(graphs) if plain else not guilty):
        return findings, nearer
    spec = replace(backend.spec, options=str(replace(options, casts=True)))
    rounded = _outputs(run, run.pipeline.programs, create(spec), sample)
    difference, left = apart(reference, test), apart(reference, rounded)
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


def _casts(programs: Sequence[Program]) -> bool:
    """Whether a network casts to BF16 or FP16 by itself."""
    halves = onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16
    return any(node.op == "Cast" and node.attribute("to") in halves for p in programs for node in p.graph.nodes)


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
