"""Recording of one backend's run, and comparison of two recordings: a bisect in two halves, for two machines."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cp_debug.backends.base import Backend, RunRecord
from cp_debug.backends.registry import create
from cp_debug.backends.spec import BackendSpec
from cp_debug.bisect.branches import Branches, other_ways
from cp_debug.bisect.result import BisectResult, LayerRow, TestResult, check_not_empty
from cp_debug.bisect.verdict import judge
from cp_debug.display import OnStep
from cp_debug.errors import InputError
from cp_debug.graph.flatten import Branch
from cp_debug.graph.pairing import left_out
from cp_debug.probes.capture import Capture, CaptureWriter, array_hash
from cp_debug.probes.statistics import compare
from cp_debug.programs import paired
from cp_debug.programs.paired import Key, pair_captures
from cp_debug.programs.pipeline import Pipeline, choose_export, header, prepare, preparing, wants_int8
from cp_debug.programs.precision import PRECISIONS, coarsest
from cp_debug.programs.tensor_inputs import as_numbers, has_other_inputs
from cp_debug.programs.unroll import Unroller
from cp_debug.quantization.models import QuantizedComponent
from cp_debug.quantization.open_quantized import calibration_samples
from cp_debug.quantization.quantized_programs import (
    DEFAULT_CALIBRATION,
    Calibration,
    already_quantized,
    quantize_programs,
)
from cp_debug.reading import typed
from cp_debug.recipes.abilities import HasNotes, Remarks, samples_left_out
from cp_debug.recipes.base import Model, check_samples
from cp_debug.serialize import json_safe


def record(
    model: Model,
    backend: str | Backend,
    folder: Path,
    *,
    inputs: Path | None,
    samples: int,
    seed: int,
    exporter: str | None,
    folded: bool,
    on_step: OnStep,
    parts: Mapping[str, QuantizedComponent] | None = None,
    calibration: Calibration = DEFAULT_CALIBRATION,
) -> Capture:
    """Run ``backend`` on the samples with every probe; the capture appears under ``folder`` when complete.

    For a backend in INT8 a model that is not quantized gets the scales of ``parts``, else those of ``calibration``, as
    in a bisect. Raises BackendUnavailable and InputError.
    """
    created = create(BackendSpec.parse(backend)) if isinstance(backend, str) else backend
    how, _ = choose_export([created], exporter)
    check_samples(model, samples, inputs)
    given = model
    on_step(preparing(model), 0, samples + 1)
    with tempfile.TemporaryDirectory(prefix="cpdebug-") as scratch:
        if has_other_inputs(model):
            model = as_numbers(model, list(model.samples(samples, seed, inputs)), Path(scratch))
        sample_iterator = iter(model.samples(samples, seed, inputs))
        first = next(sample_iterator)
        programs = prepare(model, first, Path(scratch), how=how, folded=folded)
        unroller = Unroller(Path(scratch))
        programs = unroller.unrolled(programs, model, lambda: model.samples(samples, seed, inputs), created.precision)
        notes = list(model.notes) if isinstance(model, HasNotes) else []
        if wants_int8(created):
            quantized = already_quantized(programs)
            if quantized is None:
                on_step("quantizing", 0, samples + 1)
                data = calibration_samples(model, calibration.data or inputs, calibration.samples)
                own = Path(scratch) / "int8"
                quantized, said = quantize_programs(model, programs, own, data, parts=parts, calibration=calibration)
                notes += [said] if said else []
            programs = quantized
        with Pipeline(model, programs, created) as pipeline:
            manifest = header(pipeline, [])  # the samples are added as they come; it is written at the end
            remarks = Remarks(model)
            with CaptureWriter(folder, manifest) as writer:
                for index, sample in enumerate(itertools.chain([first], sample_iterator)):
                    on_step(f"{created.spec}, sample {index}", index + 1, samples + 1)
                    manifest["inputs"].append({name: array_hash(array) for name, array in sample.arrays.items()})
                    manifest["samples"].append(sample.source)
                    remarks.see(sample)
                    put = writer.put
                    pipeline.run(sample, lambda key, t, i=index, put=put: put(key.value, t, i, key.component))  # type: ignore[misc]
                taken = len(manifest["samples"])
                notes += [*unroller.notes, *remarks.sentences, *samples_left_out(given, inputs, samples, taken)]
                # Known once they ran.
                writer.update({"settings": json_safe(pipeline.record().settings), "notes": notes})
    return Capture.open(folder)


def compare_captures(
    reference: Capture,
    test: Capture,
    *,
    rtol: float | None = None,
    atol: float | None = None,
    force: bool = False,
    maps: Sequence[str] = (),
) -> BisectResult:
    """Compare the tensors that two captures have in common, in the reference's execution order.

    Each row is the worst sample of a tensor. Tensors are paired as ``maps`` says (``REFERENCE=TEST`` each), by name,
    else by what they hold; final outputs also by position and shape; ``OUTPUT=`` leaves one out. Raises InputError with
    the reason when models or inputs differ, unless ``force``; for a wrong map; and when no final output, or nothing at
    all, is in common.
    """
    reasons = reference.differences(test)
    if reasons and not force:
        raise InputError("these captures should not be compared (--force does it anyway):\n" + "\n".join(reasons))
    ours, theirs = record_of(reference), record_of(test)
    for record, capture in ((ours, reference), (theirs, test)):
        if record.precision not in PRECISIONS:
            raise InputError(f"{capture.folder}: the manifest's precision is {record.precision!r}, which is unknown")
    declared = [name for record in (ours, theirs) for name in record.declared if name in PRECISIONS]
    precision = coarsest(ours.precision, theirs.precision, *declared)
    tolerance = (precision.rtol if rtol is None else rtol, precision.atol if atol is None else atol)
    final = [(str(component), str(name)) for component, name in reference.manifest.get("outputs", [])]
    omitted, told = left_out(maps, [name for _, name in final])
    final = [key for key in final if key[1] not in omitted]
    pairs = pair_captures(reference, test, told)
    levels = _levels(reference), _levels(test)
    present = {(e.sample, e.component, e.name) for e in test.entries}
    names = reference.manifest.get("layers", {})
    rows: dict[tuple[str, str], LayerRow] = {}
    compared = 0
    for entry in reference.entries:
        component, name = pairs.get((entry.component, entry.name), (None, ""))
        if component is None or (entry.sample, component, name) not in present:
            continue
        ours_, theirs_ = (entry.name, entry.sample, entry.component), (name, entry.sample, component)
        stats = compare(reference.load_checked(*ours_), test.load_checked(*theirs_))
        key = (entry.component, entry.name)
        row = LayerRow(
            index=rows[key].index if key in rows else len(rows),
            component=entry.component,
            name=names.get(entry.component, {}).get(entry.name, entry.name),
            onnx=entry.name,
            op="",
            stats=stats,
            sample=entry.sample,
            **judge(
                stats, None, precision, *tolerance, 0.0, levels=key in levels[0] or (component, name) in levels[1]
            )._asdict(),
        )
        compared += key not in rows
        if key not in rows or row.severity > rows[key].severity:
            rows[key] = row
    if not rows:
        raise InputError(f"{reference.folder} and {test.folder} have no tensor in common")
    if final and not any(key in rows for key in final):
        outputs = [", ".join(name for _, name in c.manifest.get("outputs", [])) for c in (reference, test)]
        raise InputError(
            f"no output was compared: {reference.folder} has {outputs[0]}, {test.folder} has {outputs[1] or 'none'}; "
            "--map REFERENCE=TEST pairs two of them"
        )
    outputs_compared = [rows[key] for key in final if key in rows]
    check_not_empty(str(theirs.spec), outputs_compared)
    total = len({(e.component, e.name) for e in reference.entries})
    result = TestResult(
        backend=theirs,
        rows=list(rows.values()),
        stages=[],
        outputs=outputs_compared,
        compared=compared,
        total=total,
        rtol=tolerance[0],
        atol=tolerance[1],
        oracle=None,
        notes=[
            *(f"compared by force: {reason}" for reason in reasons),
            *_pairing_notes(pairs),
            *paired.omitted(omitted),
            *_end_notes(reference, test, pairs),
            *_other_ways(reference, test, rows, {a: b for (a, _), (b, _) in pairs.items()}),
        ],
        pairing=_pairing(reference, pairs),
        expected_outputs=[name for _, name in final],
        model_sha256=test.manifest.get("model", {}).get("sha256", ""),
    )
    model, samples = reference.manifest.get("model", {}), reference.manifest.get("samples", [])
    return BisectResult(
        model.get("name", ""),
        ours,
        [result],
        list(samples),
        model_sha256=model.get("sha256", ""),
        inputs=list(reference.manifest.get("inputs", [])),
    )


def _levels(capture: Capture) -> set[Key]:
    """Tensors of a capture that hold levels of a quantizer; of one that does not say so, the bytes of an INT8 run."""
    manifest = capture.manifest
    if (named := manifest.get("levels")) is not None:
        return {(component, name) for component, names in named.items() for name in names}
    is_int8 = "int8" in (manifest.get("precision"), *manifest.get("declared", []))
    return {(e.component, e.name) for e in capture.entries if is_int8 and e.dtype in ("int8", "uint8")}


def _pairing(reference: Capture, pairs: Mapping[Key, Key]) -> dict[str, Any]:
    """Component → tensors that could not be paired; empty where all could."""
    missing: dict[str, list[str]] = {}
    for key in dict.fromkeys((e.component, e.name) for e in reference.entries):
        if key not in pairs:
            missing.setdefault(key[0], []).append(key[1])
    return {component: {"missing": names} for component, names in missing.items()}


def _pairing_notes(pairs: Mapping[Key, Key]) -> Iterator[str]:
    if components := sorted({(a, b) for (a, _), (b, _) in pairs.items() if a != b}):
        yield "components paired: " + ", ".join(f"{a} = {b}" for a, b in components)
    if renamed := sum(a != b for (_, a), (_, b) in pairs.items()):
        yield f"{renamed} of {len(pairs)} tensors have other names in the test: paired by their values or by --map"


def _end_notes(reference: Capture, test: Capture, pairs: Mapping[Key, Key]) -> Iterator[str]:
    """Sentences about final outputs that only the test has, and about those of another type.

    Where both captures are of one model, a run in another precision is no reason for a sentence.
    """
    ours, theirs = ([(str(c), str(n)) for c, n in capture.manifest.get("outputs", [])] for capture in (reference, test))
    matched = {key: pairs[key] for key in ours if key in pairs}
    yield from paired.only_in_test([name for key in theirs if key not in set(matched.values()) for _, name in [key]])
    types = [{(e.component, e.name): e.dtype for e in capture.entries} for capture in (reference, test)]
    one_model = reference.manifest.get("model", {}).get("sha256") == test.manifest.get("model", {}).get("sha256")
    told = {
        key: other
        for key, other in matched.items()
        if not (one_model and all("float" in kinds.get(k, "") for kinds, k in zip(types, (key, other), strict=True)))
    }
    yield from paired.other_types(
        {name: types[0].get((c, name), "") for c, name in told},
        {name: types[1].get((c, name), "") for c, name in told.values()},
        {key[1]: other[1] for key, other in told.items()},
    )


def _other_ways(
    reference: Capture, test: Capture, rows: Mapping[Key, LayerRow], components: Mapping[str, str]
) -> Iterator[str]:
    """Sentences about control flow that decides otherwise in the test; its results get them as their reason, too."""

    def branches(of: Capture) -> Branches:
        known = of.manifest.get("control_flow", {})
        found: Branches = typed(dict[str, list[Branch]], known, f"{of.folder}: the manifest's control_flow")
        return found

    for way in other_ways((branches(reference), branches(test)), (reference, test), components):
        for name in way.branch.outputs:
            if (row := rows.get((way.component, name))) is not None:
                row.why = str(way)
        yield str(way)


def record_of(capture: Capture) -> RunRecord:
    """The run that a capture's manifest describes. Raises InputError when the manifest lacks a field."""
    manifest = capture.manifest
    declared = manifest.get("declared", [])
    if not isinstance(declared, list) or not all(isinstance(name, str) for name in declared):
        raise InputError(f"{capture.folder}: the manifest's field 'declared' is no list of precisions")
    try:
        return RunRecord(
            spec=manifest["backend"],
            precision=manifest["precision"],
            device=manifest["device"],
            emulated=manifest["emulated"],
            versions=manifest["versions"],
            settings=manifest["settings"],
            declared=declared,
        )
    except KeyError as error:
        raise InputError(f"{capture.folder}: the manifest lacks the field {error}") from None
