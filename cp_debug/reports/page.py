"""The HTML report: one file with everything inside, which asks for nothing from a network."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from pathlib import Path
from shlex import quote
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from cp_debug.backends.base import RunRecord
from cp_debug.bisect.finding import Finding
from cp_debug.bisect.result import DIVERGENT, GUILTY, SHAPE, BisectResult, LayerRow, TestResult
from cp_debug.detection.changes import MOVED_BOX
from cp_debug.errors import InputError
from cp_debug.files import write_text
from cp_debug.reports.birdseye import SceneView, birdseye
from cp_debug.reports.causes import lines, parts_of_fix
from cp_debug.reports.evidence import Evidence, chosen_rows, evidence, layer_evidence
from cp_debug.reports.glossary import GLOSSARY, anchor
from cp_debug.reports.growth import growth_chart, overview
from cp_debug.reports.layer_graph import graph_data, json_script, libraries, licences
from cp_debug.reports.numbers import number, share, signed
from cp_debug.reports.saved import SavedResult
from cp_debug.reports.sheet import Cell, Column, Row, Sheet
from cp_debug.reports.sheet_markup import breakable, table_html
from cp_debug.reports.svg import Canvas
from cp_debug.reports.tables import kernels, stage_table, weight_lines
from cp_debug.reports.verdict_line import layer_verdict, not_finite, side_by_side, verdict_line
from cp_debug.safe_text import page
from cp_debug.version import __version__

HTML = Path(__file__).parent / "html"
MOST_SCENES = 3


@dataclass(frozen=True)
class BackendSection:
    """Part of the page about one test backend."""

    anchor: str
    test: TestResult
    verdict: str
    """``ok``, ``rounding`` (beyond the tolerance, nobody guilty), ``undecided``, ``incomplete`` (an output is missing)
    or ``guilty``: a CSS class."""
    sentence: str
    growth: Canvas | None
    evidence: Sequence[Evidence]
    views: Sequence[SceneView]

    @property
    def strange(self) -> bool:
        """Whether a layer is not finite."""
        return any(map(not_finite, self.test.rows))

    @property
    def charted(self) -> set[tuple[str, str]]:
        """(Component, ONNX value) of the layers that have charts."""
        return {(item.row.component, item.row.onnx) for item in self.evidence}

    @property
    def final(self) -> float | None:
        """The largest relative L2 divergence of the final outputs."""
        return max((row.stats.rel_l2 for row in self.test.outputs), default=None)


def write_page(saved: SavedResult, target: Path, charts: Sequence[str] = ()) -> None:
    """Write the page as one file.

    ``charts`` names layers that get charts beside those that get them anyway; see ``layers_named``. Raises InputError
    when it cannot be written, and for a name that fits no layer.
    """
    write_text(render_page(saved, charts=charts), target)


def write_result(result: BisectResult, target: Path) -> None:
    """Write the page of a result whose captures were not kept. Raises InputError when it cannot be written."""
    write_page(SavedResult.of(result), target)


def render_page(saved: SavedResult, *, charts: Sequence[str] = (), served: str = "") -> str:
    """The whole page.

    ``charts`` as in ``write_page``; ``served`` is the name of the result on a server, which draws charts when asked.
    """
    result = saved.result
    named = layers_named(result, charts)
    records = [result.reference, *(test.backend for test in result.tests)]
    parts = [_part(saved, f"t{index}", test, named) for index, test in enumerate(result.tests)]
    return rendered(
        "report",
        result=result,
        parts=parts,
        matrix=matrix(result.tests),
        graph=graph_data(saved, [part.anchor for part in parts]),
        weights=weight_lines(result),
        settings=settings_table(records),
        differing=settings_table(records, differing=True),
        kept=saved.folder is not None,
        served=served,
        glossary=GLOSSARY,
    )


def rendered(name: str, /, **values: Any) -> str:
    """A page of its template ``name``, with style and script inside."""
    jinja = Environment(
        loader=FileSystemLoader(HTML),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_seen,
    )
    jinja.filters |= {
        "number": number,
        "share": share,
        "breakable": breakable,
        "said": lines,
        "parts_of_fix": parts_of_fix,
        "table": table_html,
        "kernels": kernels,
    }
    jinja.filters |= {"anchor": anchor, "json_script": json_script, "shell": quote}
    jinja.globals |= {"libraries": libraries, "licences": licences, "graph_script": script("graph.js")}
    jinja.globals |= {
        "overview": overview,
        "tone": tone,
        "shown": shown,
        "verdict": layer_verdict,
        "told_before": told_before,
    }
    jinja.globals |= {"changes_table": changes_table, "stage_table": stage_table, "worst_table": worst_table}
    parts = {"css": script("report.css"), "script": script("report.js"), "version": __version__}
    return jinja.get_template(f"{name}.html.j2").render(**values, **parts)


def _seen(value: Any) -> Any:
    """The value without invisible characters, as templates put it out."""
    if isinstance(value, str):
        return type(value)(page(value))
    return value


def script(name: str) -> Markup:
    """A script or style of the pages, as it stands in its file."""
    return Markup((HTML / name).read_text(encoding="utf-8"))


def render_layer(saved: SavedResult, test: TestResult, row: LayerRow) -> str:
    """The page of one layer: its charts, drawn from the kept tensors."""
    reference, item = saved.result.reference.spec, layer_evidence(saved, test, row)
    return rendered("layer", reference=reference, test=test, row=row, item=item)


def layers_named(result: BisectResult, names: Sequence[str]) -> set[tuple[str, str]]:
    """(Component, ONNX value) of the layers that the names, ONNX names or patterns such as ``backbone.*`` fit.

    Raises InputError for one that fits none, with the nearest names.
    """
    rows = [row for test in result.tests for row in test.rows]
    found = set()
    for name in names:
        fitting = {(r.component, r.onnx) for r in rows if fnmatchcase(r.name, name) or fnmatchcase(r.onnx, name)}
        fitting |= {(r.component, r.onnx) for r in rows if name in (r.name, r.onnx)}
        if not fitting:
            near = get_close_matches(name, [row.name for row in rows], 3, 0.3)
            raise InputError(f"--charts {name}: fits no layer" + (f"; nearest: {', '.join(near)}" if near else ""))
        found |= fitting
    return found


def _verdict(test: TestResult) -> str:
    if test.guilty:
        return "guilty"
    if test.agrees:
        return "ok"
    incomplete = test.lacks_outputs_alone or test.moves_outputs_alone
    return "undecided" if test.undecided else "incomplete" if incomplete else "rounding"


def _part(saved: SavedResult, anchor: str, test: TestResult, named: Collection[tuple[str, str]]) -> BackendSection:
    chosen = {(row.component, row.onnx) for row in chosen_rows(test)} | set(named)
    shown = [row for row in test.rows if (row.component, row.onnx) in chosen]
    scenes = [saved.scene(sample) for sample in range(min(len(saved.result.samples), MOST_SCENES))]
    views = [birdseye(scene, saved.result.reference.spec, test.backend.spec) for scene in scenes if scene]
    return BackendSection(
        anchor=anchor,
        test=test,
        verdict=_verdict(test),
        sentence=verdict_line(test).plain.partition(": ")[2].removeprefix("guilty: "),
        growth=growth_chart(test, f"{anchor}-layer-"),
        evidence=evidence(saved, test, shown),
        views=[view for view in views if view],
    )


MOST_CHANGES = 24


def worst_table(item: Evidence, reference: str, test: str) -> Sheet:
    """The elements of one layer with the largest error: index and value on each side."""
    columns = [Column(title, "number", show=lambda value: f"{value:.7g}") for title in (reference, test, "oracle")]
    rows = [(f"[{', '.join(map(str, each.index))}]", each.reference, each.test, each.exact) for each in item.worst]
    return Sheet([Column("index", "mark"), *columns], rows, "Worst elements")


def changes_table(view: SceneView) -> Sheet:
    """Detections that changed most between two backends."""
    columns = (
        Column("object", "mark", of=lambda changed: changed[1]),
        Column("change", "mark", of=lambda changed: Cell(changed[0].kind, badge=changed[0].kind)),
        Column("score", "number", of=lambda changed: signed(changed[0].score, 3).replace("-", "−")),
        Column("shift", "number", 0, "m", of=lambda c: f"{c[0].distance:.2f}" if c[0].kind == MOVED_BOX else None),
    )
    return Sheet.of(columns, view.changed[:MOST_CHANGES])


def settings_table(records: Sequence[RunRecord], *, differing: bool = False) -> Sheet:
    """Every setting and version on each backend, those that differ first; ``differing``: no others."""
    rows = [
        Row((name, *("–" if value is None else str(value) for value in values)), "differs" if differs else "")
        for name, values, differs in setting_rows(records)
        if differs or not differing
    ]
    return Sheet([Column("setting"), *(Column(record.spec) for record in records)], rows, "Settings")


def setting_rows(records: Sequence[RunRecord]) -> list[tuple[str, list[Any], bool]]:
    """(name, value on each backend or None, whether two backends that have it differ), those that differ first."""
    rows = []
    for field in ("precision", "device"):
        rows.append((field, [getattr(record, field) for record in records]))
    for table in ("versions", "settings"):
        names = dict.fromkeys(name for record in records for name in getattr(record, table))
        rows.extend((name, [getattr(record, table).get(name) for record in records]) for name in names)
    marked = [(n, values, len({str(v) for v in values if v is not None}) > 1) for n, values in rows]
    return sorted(marked, key=lambda row: not row[2])


MOST_LAYERS = 400
"""Layers that the matrix shows: accused ones first, then those of the highest excess."""


@dataclass(frozen=True)
class MatrixLine:
    """One layer on every backend."""

    name: str
    op: str
    rows: tuple[LayerRow | None, ...]
    """Row of each test; None where the test did not compare it."""

    @property
    def accused(self) -> bool:
        """Whether the layer is more than inherited error on some backend."""
        return any(row is not None and row.verdict in (GUILTY, SHAPE, DIVERGENT) for row in self.rows)

    @property
    def excess(self) -> float:
        """The highest excess on any backend; 0 where none is known."""
        known = [row.replay.excess for row in self.rows if row and row.replay and row.replay.excess is not None]
        return max(known, default=0.0)


def matrix(tests: Sequence[TestResult]) -> list[MatrixLine]:
    """The layers in execution order, at most ``MOST_LAYERS``; empty for a single test."""
    if len(tests) < 2:
        return []
    places: dict[tuple[str, str], list[LayerRow | None]] = {}
    for i, test in enumerate(tests):
        for row in test.rows:
            places.setdefault((row.component, row.onnx), [None] * len(tests))[i] = row
    lines = []
    for rows in places.values():
        first = next(row for row in rows if row is not None)
        lines.append((first.index, MatrixLine(first.name, first.op, tuple(rows))))
    chosen = sorted(lines, key=lambda line: (not line[1].accused, -line[1].excess))[:MOST_LAYERS]
    return [line for _, line in sorted(chosen, key=lambda line: line[0])]


def tone(row: LayerRow | None) -> str:
    """Class of a cell: what the layer did on that backend, from the excess where it is known."""
    if row is None:
        return "muted"
    if row.verdict in (GUILTY, SHAPE, DIVERGENT):
        return row.verdict
    if side_by_side(row):
        return "gained"
    excess = row.replay.excess if row.replay else None
    return "" if excess is None else "ok" if excess <= 1 else "inherited"


def shown(row: LayerRow | None) -> str:
    """Text of a cell: what is not finite, else the excess, with a mark where the layer is accused."""
    if row is None:
        return "–"
    mark = "✗ " if row.verdict in (GUILTY, SHAPE, DIVERGENT) else ""
    if row.verdict in (SHAPE, DIVERGENT):
        return mark + row.verdict
    return mark + (side_by_side(row) or number(row.replay.excess if row.replay else None))


def told_before(tests: Sequence[TestResult], finding: Finding) -> int | None:
    """The place of an earlier test with the same finding: cause and layers are equal. None for a new one."""
    for i, test in enumerate(tests):
        for other in test.findings:
            if other is finding:
                return None
            if (other.cause, other.layers) == (finding.cause, finding.layers):
                return i
    return None
