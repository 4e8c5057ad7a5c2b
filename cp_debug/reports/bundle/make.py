"""Bundles made from saved results."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from cp_debug.reports.bundle.accused import find_accused
from cp_debug.reports.bundle.case import Case, Cutter
from cp_debug.reports.bundle.redact import holds_source
from cp_debug.reports.bundle.redact import redact as redacted
from cp_debug.reports.bundle.shrink import OnText, Shrinker
from cp_debug.reports.bundle.verify import Verifier
from cp_debug.reports.bundle.write import check_free, write_bundle
from cp_debug.reports.saved import SavedResult
from cp_debug.safe_text import code_span

SHRINKING = 120.0
"""Seconds for making a case smaller. A run on TensorRT is a build: of a region of many nodes there are few, or none."""


def bundle(
    saved: SavedResult,
    target: Path,
    *,
    layer: str | None = None,
    backend: str | None = None,
    redact: bool = False,
    seconds: float = SHRINKING,
    on_text: OnText = lambda text: None,
) -> str:
    """Write the bundle of a guilty layer to the folder, or ``.zip``, ``target``; returns what its repro.py printed.

    ``layer`` (torch path, node or value) and ``backend`` choose; without them it is the first guilty layer. ``on_text``
    hears what is being done. ``seconds`` limits how long it is made smaller; that it fails is verified all the same.
    Raises InputError when ``target`` is taken, when no cut around the layer fails by itself, when ``redact`` hides the
    fault, and when repro.py does not show it; BackendUnavailable when the backend at fault cannot run here.
    """
    check_free(target)
    accused = find_accused(saved, layer, backend)
    cutter, verifier = Cutter(accused), Verifier(accused)
    shrinker = Shrinker(cutter, verifier, on_text, seconds=seconds)
    failing_nodes = shrinker.find(cutter.layer())
    case = shrinker.nodes(failing_nodes)
    history = [f"{len(case.program.model.graph.node)} of the component's {len(cutter.graph.nodes)} nodes"]
    if str(verifier.backend.spec) != accused.backend.spec:
        history.append(
            f"found on {accused.backend.spec}, repeated on {verifier.backend.spec}, which runs the same graph"
        )
    if len(failing_nodes) > len(cutter.layer()):
        history.append(f"the layer alone does not fail: {len(failing_nodes)} nodes around it do")
    if redact:
        on_text("replacing weights and inputs")
        case = redacted(case, shrinker)
    elif holds_source(case):
        history.append(
            "the graphs quote source lines and paths of the module that was exported: `--redact` leaves them out"
        )
    small = shrinker.values(shrinker.shapes(case))
    small = replace(small, changed=tuple(_changes(case, small)))
    if shrinker.stopped:
        history.append(f"stopped after {seconds:.0f} s: it may not be as small as it could be")
    history += [*_changes(case, small).values(), f"{verifier.runs} runs, each verified against the oracle"]
    on_text("running repro.py")
    return write_bundle(target, accused, small, verifier.measure(small), verifier.backend, history)


def _changes(before: Case, after: Case) -> dict[str, str]:
    """Changes that were made to the inputs, in words, by name."""
    changes = {}
    for name, array in after.inputs.items():
        old = before.inputs[name]
        if old.shape != array.shape:
            changes[name] = f"{code_span(name)}: cut from {list(old.shape)} to {list(array.shape)}"
        elif old.tobytes() != array.tobytes():
            changes[name] = f"{code_span(name)}: elements set to zero or rounded"
    return changes
