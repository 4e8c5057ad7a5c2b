"""A result in a terminal: what ran, in which engines, the stages, the ranked layers, the optimizer, the verdict."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from rich.console import RenderableType
from rich.padding import Padding
from rich.text import Text

from cp_debug.backends.base import RunRecord
from cp_debug.backends.capabilities import BuildInfo
from cp_debug.backends.spec import INDUCTOR
from cp_debug.backends.tensorrt.inspector import COMPILED, decode
from cp_debug.bisect.replayed import EXCESS
from cp_debug.bisect.result import (
    DIVERGENT,
    GUILTY,
    INHERITED,
    OK,
    SHAPE,
    BisectResult,
    LayerRow,
    StageRow,
    TestResult,
)
from cp_debug.programs.pipeline import settings_by_component
from cp_debug.reports.causes import findings
from cp_debug.reports.numbers import number, shape_of, share
from cp_debug.reports.sheet import Cell, Column, Row, Sheet, Tone
from cp_debug.reports.sheet_terminal import Terminal
from cp_debug.reports.verdict_line import headline, layer_verdict, setting_text, unless_nothing, verdict_line
from cp_debug.safe_text import amount, some

if TYPE_CHECKING:
    from cp_debug.bisect.optimizer_blame import OptimizerBlame


SHOWN = 4
"""Rewritten places shown for each optimizer; the JSON has all."""


def render_optimizer_blame(blame: OptimizerBlame) -> Iterator[RenderableType]:
    """One line of verdict; with responsible optimizers, a table of their effects."""
    runs = f"{blame.runs} runs"
    if blame.level is None:
        yield Text(f"optimizer: its final outputs are those of the unoptimized program ({runs})", "green")
        return
    size = number(blame.difference_with)
    if not blame.responsible:
        yield Text(
            f"optimizer: final outputs differ by {size} (rel. L2), whatever is disabled of "
            f"{', '.join(blame.active)} ({runs})",
            "yellow",
        )
        return
    names = ", ".join(culprit.optimizer for culprit in blame.responsible)
    remaining = number(blame.difference_without)
    begins = " " if blame.level == "all" and blame.fix else f"; the difference begins at level {blame.level} "
    yield Text.assemble(
        (f"optimizer: {names}", "bold yellow"),
        f": final outputs differ by {size} (rel. L2) from the unoptimized program's, by {remaining} when disabled"
        f"{begins}({runs})",
    )
    rows = []
    for culprit in blame.responsible:
        places = [f"{' + '.join(r.original)} → {' + '.join(r.operators)}" for r in culprit.rewrites[:SHOWN]]
        if len(culprit.rewrites) > SHOWN:
            places.append(f"… and {len(culprit.rewrites) - SHOWN} more")
        rows.append((culprit.optimizer, culprit.difference, tuple(places)))
    columns = (Column("optimizer", "name"), Column("rel. L2 alone", "number"), Column("rewrites"))
    if any(culprit.rewrites for culprit in blame.responsible):
        yield Terminal(Sheet(columns, rows))
    names_told = [culprit.optimizer for culprit in blame.responsible]
    yield Text(f"fix: {blame.fix or f'InferenceSession(…, disabled_optimizers={names_told})'}")


_KINDS = {"fp16acc": "sum in FP16", "fp16": "FP16 with sums in FP32", "bf16": "BF16 with sums in FP32"}
_KINDS |= {name: name.upper() for name in ("fp32", "tf32", "int8")}


def engine_lines(record: RunRecord) -> Iterator[Text]:
    """One line for each component that ran as a TensorRT engine."""
    for component, settings in settings_by_component(record.settings).items():
        if (info := BuildInfo.of_settings(settings)) is None:
            continue
        shares = ", ".join(f"{dtype} {share:.0%}" for dtype, share in info.realised_precision.items())
        nothing = "" if info.realised else f"no layer runs in {record.precision}"
        parts = [f"{info.regime}ly typed", nothing, shares, f"built in {info.build_seconds['plain']:.1f} s"]
        if info.run_seconds is not None and info.observer_gap is not None and info.rebuild_floor is not None:
            parts.append(f"runs in {1e3 * info.run_seconds:.3g} ms")
            parts.append(f"observer gap {number(info.observer_gap)}, rebuild floor {number(info.rebuild_floor)}")
        left_alone = f"{len(info.unmarked)} values not shown, because that would change it" if info.unmarked else ""
        parts += ["engine taken from the cache" if info.cached else "", info.stopped or "", left_alone]
        parts.append(sums(info.layers))
        about = "; ".join(filter(None, parts))
        yield Text(f"engine{f' of {component}' if component else ''}: {about}", style="dim")


def sums(layers: Iterable[Mapping[str, Any]]) -> str:
    """Arithmetics of an engine's products by their kernels' names, ``products: 57 sum in FP16, 4 FP32``; empty where no
    layer tells.

    ``layers``: as ``BuildInfo.layers``. Regions of several operators name no kernel and are counted apart.
    """
    found = [layer for layer in layers if isinstance(layer, Mapping)]  # a saved result may hold anything
    tactics = [decode(str(layer.get("tactic") or "")) for layer in found]
    counts = Counter(tactic.arithmetic for tactic in tactics if tactic.arithmetic)
    told = [f"{count} {_KINDS.get(name, name)}" for name, count in counts.most_common()]
    if split := sum(tactic.split > 1 for tactic in tactics):
        told.append(f"{split} of them with a split sum")
    if silent := sum(layer.get("kind") in COMPILED for layer in found):
        told.append(f"{silent} region{'s' * (silent > 1)} without kernel names")
    return f"products: {', '.join(told)}" if told else ""


def kernels(row: LayerRow) -> str:
    """What computed a row: its kernel, or for a region of several layers what they compute in: ``40 fp16acc, 4 fp32``.

    Empty where nothing tells.
    """
    found = sorted(row.region.kernels.items(), key=lambda item: -item[1]) if row.region else ()
    return ", ".join(f"{count} {name}" for name, count in found) or kernel(row.tactic)


def kernel(tactic: str) -> str:
    """A kernel's arithmetic and the depth of its tile, as far as its name tells: ``fp16acc/64``, ``fp32 winograd``.

    ``fp16acc/64÷2`` shares each tile between two partial sums, ``fp16acc/64 split 7`` gives the tiles to 7 in turn
    (split-K), ``fp16acc/v8`` loads vectors of 8 channels. Inductor's and OpenVINO's kernels have names of
    their own.
    """
    if tactic.startswith(INDUCTOR) or re.fullmatch(r"\w+:\w+", tactic):
        return tactic
    tactic_parts = decode(tactic)
    text = tactic_parts.arithmetic or ""
    if tactic_parts.arithmetic == "fp16acc" and tactic_parts.tile:
        depth = f"v{tactic_parts.vector}" if tactic_parts.vector else str(tactic_parts.tile[2])
        text += f"/{depth}" + (f"÷{tactic_parts.slices}" if tactic_parts.slices > 1 else "")
        text += f" split {tactic_parts.split}" if tactic_parts.split > 1 else ""
    return f"{text} winograd".strip() if tactic_parts.winograd else text


TONES: dict[str, Tone] = {OK: "good", INHERITED: "note", DIVERGENT: "bad", GUILTY: "worst", SHAPE: "worst"}
SETTINGS = {
    "backends.cudnn.conv.fp32_precision": "cudnn conv",
    "backends.cuda.matmul.fp32_precision": "cuda matmul",
    "backends.cudnn.benchmark": "cudnn benchmark",
    "deterministic_algorithms": "deterministic",
    "threads": "threads",
    "graph_optimization_level": "optimization",
    "use_deterministic_compute": "deterministic",
    "intra_op_num_threads": "threads",
    "use_tf32": "tf32",
    "regime": "typing",
    "values_rounded_by": "values",
    "operands_rounded_by": "operands",
    "accumulation": "accumulation",
    "not_emulated": "not emulated",
}
"""Setting → its short name in the table; the JSON has all settings."""
AROUND = 5
"""Layers shown before and after the first divergent one."""
MUCH = 0.1
"""Share of the final divergence from which a layer is shown."""
MOST_STAGES = 24


def render(
    result: BisectResult, *, layers: bool = True, show_all: bool = False, rest: str = "result.layers has all"
) -> Iterator[RenderableType]:
    """The parts of a result, in the order in which they are read. ``rest``: how to see the layers that are left out.

    A test that agrees has no tables, unless ``show_all``, or its stages alone were asked for (``layers`` False).
    """
    yield Text.assemble((result.subject, "bold"), f" · {_samples(result.samples)}")
    records = [result.reference, *(test.backend for test in result.tests)]
    whole = [show_all or not layers or not test.agrees for test in result.tests]
    if any(whole):
        yield from map(headline, result.tests)
        yield Terminal(_backends_table(records))
    else:
        yield Text(" against ".join(", ".join(map(_in_words, each)) for each in (records[:1], records[1:])))
    yield from _coverage(result.coverage)
    yield from map(Text, weight_lines(result))
    told = set[str]()
    for test, has_tables in zip(result.tests, whole, strict=True):
        if has_tables:
            title = Text.assemble("\n", (result.reference.spec, "bold"), " → ", (test.backend.spec, "bold"))
            yield title.append(" (emulated)" if test.backend.emulated else "")
            yield from engine_lines(test.backend)
            if test.stages:  # a comparison of captures knows none
                yield Terminal(stage_table(test, show_all=show_all))
            if layers:
                if test.stages:
                    yield Text()
                yield Terminal(layer_table(test, show_all=show_all))
                if not show_all:
                    yield Text(_selection(test, rest), style="dim")
        else:
            yield verdict_line(test)
            if nearest := _largest(test):
                yield Padding.indent(Text(nearest, style="dim"), 2)
        yield from findings(test, show_all=show_all)
        if test.detections is not None:
            yield Padding.indent(Text(f"detections: {test.detections}"), 0 if has_tables else 2)
        yield from (Text(f"note: {note}", style="yellow") for note in dict.fromkeys(test.notes) if note not in told)
        told.update(test.notes)
        if has_tables:
            yield verdict_line(test)
        if test.optimizer_blame is not None:
            yield Text()
            yield from render_optimizer_blame(test.optimizer_blame)
    if not all(whole) and rest:
        yield Text(rest, style="dim")


def _in_words(record: RunRecord) -> str:
    """``trt-fp16 (fp16, cuda:0)``; a CPU need not be named."""
    return f"{record.spec} ({record.computes_in}{'' if record.device == 'cpu' else f', {record.device}'})"


def _largest(test: TestResult) -> str:
    """Phrase about the layer that is nearest to being guilty, of a test that agrees; empty where none was replayed."""
    worst = max(test.rows, key=lambda row: (row.replay and row.replay.excess) or 0.0)
    excess = (worst.replay and worst.replay.excess) or 0.0
    layers = amount(len(test.rows), "layer")
    return f"{layers}, largest excess {number(excess)} ({worst.name}), limit {EXCESS:g}" if excess else ""


def weight_lines(result: BisectResult) -> list[str]:
    """One line for each component about the differences of the two models' weights; a single one need not be named."""
    several = len(result.weights) > 1
    return [f"weights{several * f' of {name}'}: {of.get('says', '')}" for name, of in result.weights.items()]


def _backends_table(records: Sequence[RunRecord]) -> Sheet:
    """Spec, precision, device, versions and the settings that can change numbers."""

    def settings(record: RunRecord) -> Cell:
        versions = ", ".join(f"{name} {version}" for name, version in record.versions.items())
        chosen = {short: record.settings.get(name) for name, short in SETTINGS.items()}
        told = ", ".join(f"{short} {setting_text(v)}" for short, v in chosen.items() if v is not None)
        return Cell("; ".join(filter(None, (versions, told))), "quiet")

    columns = (
        Column("", "mark", of=lambda record: "reference" if record is records[0] else "test"),
        Column("backend", "name", of=lambda record: record.spec),
        Column("precision", "mark", leave_out=1, of=lambda record: record.computes_in),
        Column("device", "mark", leave_out=2, of=lambda record: record.device),
        Column("settings", leave_out=3, of=settings),
    )
    return Sheet.of(columns, records)


def stage_table(test: TestResult, *, show_all: bool = False) -> Sheet:
    """Coarse view: a row for each stage, with its last tensor and whether it holds a guilty layer.

    The worst one of each group of outputs where all agree, or are very many, unless ``show_all``.
    """
    columns = (
        Column("stage", "name", of=lambda named: named[0]),
        Column("shape", "number", leave_out=3, of=lambda named: shape_of(named[1].layer.stats)),
        Column("max |Δ|", "number", leave_out=1, of=lambda named: _compared(named[1].layer, "max_abs")),
        Column("mean |Δ|", "number", leave_out=2, of=lambda named: _compared(named[1].layer, "mean_abs")),
        Column("rel. L2", "number", of=lambda named: _compared(named[1].layer, "rel_l2")),
        Column("verdict", "mark", of=lambda named: _stage_verdict(named[1])),
    )
    return Sheet.of(columns, ((s.name, s) for s in test.stages) if show_all else _few_stages(test))


def _stage_verdict(stage: StageRow) -> Cell:
    inside = stage.guilty and stage.layer.name not in stage.guilty  # its last tensor may be right
    verdict = f"{stage.verdict}: {some(stage.guilty, 1)}" if inside else stage.verdict
    return Cell(unless_nothing(stage.layer, verdict), TONES[stage.verdict], stage.verdict)


_LAYER_COLUMNS = (
    Column("#", "number", leave_out=4, show=str, of=lambda row: row.index),
    Column("layer", "name", of=lambda row: row.name),
    Column("op", "mark", leave_out=5, of=lambda row: row.op),
    Column("shape", "number", leave_out=7, of=lambda row: shape_of(row.stats)),
    Column("max |Δ|", "number", leave_out=6, of=lambda row: _compared(row, "max_abs")),
    Column("rel. L2", "number", leave_out=2, of=lambda row: _compared(row, "rel_l2")),
    Column("introduced", "number", of=lambda row: _replayed(row, "introduced")),
    Column("expected", "number", leave_out=3, of=lambda row: _replayed(row, "expected")),
    Column("excess", "number", of=lambda row: _replayed(row, "excess")),
    Column("step", "number", leave_out=8, of=lambda row: _scale(row)[0]),
    Column("clipped", "number", leave_out=9, of=lambda row: _scale(row)[1]),
    Column("kernel", leave_out=10, of=kernels),
    Column("share", "number", leave_out=1, of=lambda row: "" if row.share is None else share(row.share)),
    Column("verdict", "mark", of=lambda row: Cell(layer_verdict(row), TONES[row.verdict])),
)
"""Columns for a layer, in the order in which they are shown."""
_SHORT = ("#", "layer", "op", "max |Δ|", "rel. L2", "introduced", "expected", "excess", "share")
"""Columns shown where figures are few: in an issue tracker and in a notebook."""


def layer_table(test: TestResult, *, show_all: bool = False) -> Sheet:
    """The layers in execution order: all of them, or those around the first divergent one and every guilty one."""
    without = set() if test.oracle is not None else {"introduced", "expected", "excess"}
    if not any(row.replay and row.replay.step is not None for row in test.rows):
        without |= {"step", "clipped"}
    if not any(map(kernels, test.rows)):
        without.add("kernel")
    if all(row.share is None for row in test.rows):
        without.add("share")
    if not any(row.op for row in test.rows):  # captures tell none
        without.add("op")
    place = {row.index: position for position, row in enumerate(test.rows)}
    shown = test.rows if show_all else _layers_shown(test)
    sheet = Sheet.of([column for column in _LAYER_COLUMNS if column.title not in without], shown)
    gaps = [b for a, b in pairwise(range(len(shown))) if place[shown[b].index] - place[shown[a].index] > 1]
    rows = list(sheet.rows)
    for gap in reversed(gaps if test.first_divergent else ()):
        rows.insert(gap, Row(gap=True))
    return replace(sheet, rows=rows)


def short_layer_table(test: TestResult) -> Sheet:
    """The layers that a terminal shows, in fewer columns."""
    columns = [column for column in _LAYER_COLUMNS if column.title in _SHORT]
    return Sheet.of([*columns, Column("verdict", "mark", of=layer_verdict)], _layers_shown(test))


def _replayed(row: LayerRow, figure: str) -> Any:
    """A figure of the replay; empty for a layer that was not replayed."""
    if row.replay and row.stats.nothing_compared:
        return None
    return getattr(row.replay, figure) if row.replay else ""


def _compared(row: LayerRow, figure: str) -> Any:
    """A figure of the comparison; None where nothing could be compared."""
    return None if row.stats.nothing_compared else getattr(row.stats, figure)


def _scale(row: LayerRow) -> tuple[str, str]:
    """(INT8 scale of the layer's input, percentage of the input that it clips)."""
    if row.replay is None or row.replay.step is None:
        return "", ""
    return number(row.replay.step), f"{100 * (row.replay.clipped or 0.0):.2g}%"


def _layers_shown(test: TestResult) -> list[LayerRow]:
    """The layers around the first divergent one, every guilty one, and those that make much of the final divergence;
    else the few that concern most."""
    first = test.first_divergent
    if first is None:
        worst = sorted(test.rows, key=lambda row: row.severity)[-AROUND:]
        return sorted(worst, key=lambda row: row.index)
    place = test.rows.index(first)
    near = range(place - AROUND, place + AROUND + 1)
    return [
        row
        for position, row in enumerate(test.rows)
        if position in near or row.verdict == GUILTY or abs(row.share or 0.0) >= MUCH
    ]


def _selection(test: TestResult, rest: str) -> str:
    shown, total = len(_layers_shown(test)), len(test.rows)
    if shown == total:
        return "the one layer" if total == 1 else f"all {total} layers"
    first = test.first_divergent
    which = f"around {first.name}" if first else "the worst"
    return f"{shown} of {total} layers, {which}{rest and f'; {rest}'}"


def _few_stages(test: TestResult) -> Iterator[tuple[str, StageRow]]:
    """(what it is called, stage); the worst one of each group of outputs (``task0.*``) where all agree, or are many."""
    outputs = {(row.component, row.onnx) for row in test.outputs}
    few = len(test.stages) > MOST_STAGES or all(stage.verdict == OK for stage in test.stages)
    groups: dict[str, list[StageRow]] = {}
    for stage in test.stages:
        final = (stage.layer.component, stage.layer.onnx) in outputs and few
        groups.setdefault(stage.name.partition(".")[0] if final else stage.name, []).append(stage)
    for name, stages in groups.items():
        worst = max(stages, key=lambda stage: stage.severity)
        yield (name if len(stages) == 1 else f"{name}, worst of {len(stages)}: {worst.name}"), worst


def _coverage(coverage: dict[str, Any]) -> Iterator[Text]:
    """A line for each component of which something is not compared."""
    for component, counts in coverage.items():
        if missing := [*counts["unmatched_values"], *counts["unmatched_modules"]]:
            values = f"{counts['values']} of {counts['values_total']} values of the graph"
            modules = f"{counts['modules']} of {counts['modules_total']} leaf modules"
            says = f"of {component}, {values} and {modules} are compared, not {', '.join(missing[:5])}"
            yield Text(says, style="yellow")


def _samples(samples: Sequence[str]) -> str:
    if not samples:  # a capture that another program wrote
        return "a sample without a name"
    return samples[0] if len(samples) == 1 else f"{len(samples)} samples, from {samples[0]} to {samples[-1]}"
