"""One layer's tensors on both sides and the place of its error: figures first, charts from them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from cp_debug.bisect.replay import Replayer
from cp_debug.bisect.result import GUILTY, SHAPE, LayerRow, TestResult
from cp_debug.errors import CpdebugError
from cp_debug.probes.arrays import as_numpy
from cp_debug.probes.capture import Capture
from cp_debug.programs.precision import PRECISIONS
from cp_debug.reports.saved import SavedResult
from cp_debug.reports.svg import Canvas, Scale, decades, opacity_png

MOST_GUILTY, MOST_OTHERS = 8, 3
"""Guilty layers shown, the most excessive first; without a guilty one, layers of the highest excess."""
ELEMENTS = 1 << 21
"""Elements that histograms look at; of larger tensors an even selection."""
BINS, CELLS, PIXELS, WORST = 72, (72, 48), 192, 5
ACCENT = (59, 130, 246)
WIDTH, HEIGHT = 500, 270
LEFT, RIGHT, BOTTOM, TOP = 62, WIDTH - 12, HEIGHT - 48, 12
"""Ends of the plot's area."""


@dataclass(frozen=True)
class Worst:
    """One of the elements of largest error. ``exact`` is the oracle's value where it was computed."""

    index: tuple[int, ...]
    reference: float
    test: float
    exact: float | None


@dataclass(frozen=True)
class Evidence:
    """One layer, ready to be shown."""

    row: LayerRow
    error: str
    """Error that the charts show: introduced, or the whole divergence where the layer cannot be replayed."""
    worst: list[Worst] = field(default_factory=list)
    charts: list[tuple[str, Canvas]] = field(default_factory=list)
    """(caption, chart)"""


def chosen_rows(test: TestResult) -> list[LayerRow]:
    """The guilty layers, else those of the highest excess; in execution order."""
    guilty = [row for row in test.rows if row.verdict in (GUILTY, SHAPE)]
    most = MOST_GUILTY if guilty else MOST_OTHERS
    computed = [row for row in test.rows if row.replay and row.replay.excess is not None]
    return sorted(sorted(guilty or computed or test.rows, key=_excess, reverse=True)[:most], key=lambda row: row.index)


def evidence(saved: SavedResult, test: TestResult, rows: Sequence[LayerRow] = ()) -> list[Evidence]:
    """The evidence for each row whose tensors were kept and have the same shape on both sides.

    ``rows`` empty takes those of ``chosen_rows``.
    """
    collected = [layer_evidence(saved, test, row) for row in rows or chosen_rows(test)]
    return [item for item in collected if item is not None]


def layer_evidence(saved: SavedResult, test: TestResult, row: LayerRow) -> Evidence | None:
    """The evidence for one row; None where its tensors were not kept, or have another shape on each side."""
    reference = saved.capture(row.sample, saved.result.reference.spec)
    captured = saved.capture(row.sample, test.backend.spec)
    if reference is None or captured is None or row.stats.shape_mismatch or row.stats.count == 0:
        return None
    try:
        return _layer(saved, test, row, reference.load(row.onnx, 0, row.component), captured)
    except KeyError:  # thinned out since
        return None


def _layer(saved: SavedResult, test: TestResult, row: LayerRow, reference: np.ndarray, captured: Capture) -> Evidence:
    reference_values, test_values = _real(reference), _real(captured.load(row.onnx, 0, row.component))
    exact = _oracle(saved, test, row, captured)
    name = "divergence (test − reference)" if exact is None else "introduced error (test − oracle)"
    # Rows of a BEV map count from its lowest y: they are shown upwards, as the detections are.
    upwards = saved.scene(row.sample) is not None
    layer_charts = charts(reference_values, test_values, exact, test.backend.precision, upwards=upwards)
    return Evidence(row, name, worst_elements(reference_values, test_values, exact), layer_charts)


def charts(
    ours: np.ndarray, theirs: np.ndarray, exact: np.ndarray | None, precision: str, *, upwards: bool
) -> list[tuple[str, Canvas]]:
    """(Caption, chart) of two tensors of one shape, without charts that make no sense for them.

    ``exact`` is the oracle's value, if known; ``upwards`` puts row 0 of a map at the bottom.
    """
    error = _error(ours, theirs, exact)
    drawn = (
        ("Values on both sides", _histogram(ours, theirs)),
        ("Error against magnitude", _against(ours if exact is None else exact, error, precision)),
        ("Error of each channel, RMS", _channels(error)),
        ("Where it sits: largest error over the channels", _heat(error, upwards)),
    )
    return [(caption, chart) for caption, chart in drawn if chart is not None]


def worst_elements(ours: np.ndarray, theirs: np.ndarray, exact: np.ndarray | None) -> list[Worst]:
    """The ``WORST`` elements, the largest error first; none that have no error."""
    error = _error(ours, theirs, exact)
    most = min(WORST, error.size)
    top = np.argpartition(error, error.size - most, axis=None)[error.size - most :]
    elements = []
    for place in top[np.argsort(error.flat[top])[::-1]]:
        if error.flat[place] == 0:
            break
        index = np.unravel_index(place, error.shape)
        value = None if exact is None else float(exact[index])
        elements.append(Worst(tuple(int(i) for i in index), float(ours[index]), float(theirs[index]), value))
    return elements


def _error(ours: np.ndarray, theirs: np.ndarray, exact: np.ndarray | None) -> np.ndarray:
    """|test − oracle|, or |test − reference| without an oracle; float64.

    An element that is not finite counts as the largest finite one, or as 1 where none is finite.
    """
    with np.errstate(invalid="ignore", over="ignore"):
        error = np.abs(theirs.astype(np.float64) - (ours if exact is None else exact))
    finite = np.isfinite(error)
    if not finite.all():
        error[~finite] = error[finite].max(initial=0) or 1.0
    return error


def _oracle(saved: SavedResult, test: TestResult, row: LayerRow, captured: Capture) -> np.ndarray | None:
    """The oracle's value from the test's own inputs; None where that cannot be computed here."""
    graph, replay = saved.graphs.get(row.component), row.replay
    if test.oracle is None or graph is None or replay is None or replay.introduced is None:
        return None
    claims = saved.result.reference.precision, test.backend.precision
    load: Callable[[str], np.ndarray] = lambda name: captured.load(name, 0, row.component)  # noqa: E731
    try:
        _, exact = Replayer(graph, claims, test.oracle, captured.names(0, row.component)).introduced(row.onnx, load)
    except (CpdebugError, KeyError, NotImplementedError):
        return None
    return _real(as_numpy(exact))


def _excess(row: LayerRow) -> float:
    excess = row.replay.excess if row.replay else None
    return row.stats.rel_l2 if excess is None else excess


def _real(array: np.ndarray) -> np.ndarray:
    return np.asarray(array, np.float64 if array.dtype == np.float64 else np.float32)


def _some(array: np.ndarray) -> np.ndarray:
    flat = array.reshape(-1)
    return flat[:: -(-flat.size // ELEMENTS)]


def _histogram(reference_values: np.ndarray, test_values: np.ndarray) -> Canvas | None:
    sides = [values[np.isfinite(values)] for values in (_some(reference_values), _some(test_values))]
    together = np.concatenate(sides)
    if not together.size:
        return None
    low, high = float(together.min()), float(together.max())
    if low == high:
        low, high = low - 0.5, high + 0.5
    try:
        with np.errstate(over="ignore", invalid="ignore"):
            counts = [np.histogram(side.astype(np.float64), BINS, (low, high))[0] for side in sides]
    except (ValueError, IndexError):  # too few numbers lie between the ends for as many bins, or the range is infinite
        return None
    x = Scale(low, high, LEFT, RIGHT)
    y = Scale(0.5, 10 ** np.ceil(np.log10(max(c.max() for c in counts) + 1)), BOTTOM, TOP, log=True)
    canvas = Canvas(WIDTH, HEIGHT, "Histogram of the reference's and the test's values, counts on a log scale")
    canvas.axes(x, y, "value", "elements")
    edges = np.linspace(low, high, BINS + 1)
    for kind, count in zip(("reference area", "test outline"), counts, strict=True):
        steps = [(x(e), y(max(c, 0.5))) for a, b, c in zip(edges, edges[1:], count, strict=False) for e in (a, b)]
        canvas.path([(LEFT, BOTTOM), *steps, (RIGHT, BOTTOM)], kind)
    for line, text in enumerate(_not_finite(reference_values, test_values)):
        canvas.text((LEFT + RIGHT) / 2, TOP + 14 + 15 * line, text, "strange")
    return canvas


def _not_finite(reference_values: np.ndarray, test_values: np.ndarray) -> list[str]:
    """Lines such as ``test: 3 NaN, 1 −Inf``, for the sides that hold such elements; all elements are looked at."""
    lines = []
    for side, values in (("reference", reference_values), ("test", test_values)):
        counts = {
            "NaN": np.isnan(values),
            "Inf": np.isposinf(values),
            "−Inf": np.isneginf(values),
        }
        found = [f"{int(where.sum())} {name}" for name, where in counts.items() if where.any()]
        if found:
            lines.append(f"{side}: {', '.join(found)}")
    return lines


def _against(magnitude: np.ndarray, error: np.ndarray, precision: str) -> Canvas | None:
    """A two-dimensional histogram on log axes, with the line of one unit roundoff of the test's precision."""
    size, wrong = np.abs(_some(magnitude)), _some(error)
    shown = (size > 0) & (wrong > 0) & np.isfinite(size)
    if not shown.any():
        return None
    size, wrong = size[shown], wrong[shown]
    x_range = decades([float(np.percentile(size, 0.1)), float(size.max())])
    y_range = decades([float(np.percentile(wrong, 0.1)), float(wrong.max())])
    x, y = Scale(*x_range, LEFT, RIGHT, log=True), Scale(*y_range, BOTTOM, TOP, log=True)
    limits = zip((x_range, y_range), CELLS, strict=True)
    edges = [np.linspace(np.log10(low), np.log10(high), cells + 1) for (low, high), cells in limits]
    counts = np.histogram2d(np.log10(size), np.log10(wrong), edges)[0].T[::-1]
    canvas = Canvas(WIDTH, HEIGHT, "Error against magnitude of each element, both on log scales")
    image = opacity_png(np.log1p(counts) / np.log1p(counts.max() or 1), ACCENT)
    canvas.image(image, LEFT, TOP, RIGHT - LEFT, BOTTOM - TOP)
    canvas.axes(x, y, "magnitude", "error")
    roundoff = PRECISIONS[precision].roundoff
    ends = max(x.low, y.low / roundoff), min(x.high, y.high / roundoff)
    if ends[0] < ends[1]:
        canvas.path([(x(m), y(m * roundoff)) for m in ends], "line expected")
        beside = max(y(ends[1] * roundoff) - 8, TOP + 12)  # inside, where the line ends at the top
        canvas.text(x(ends[1]) - 6, beside, f"one {precision} roundoff", "tick end")
    return canvas


def _channels(error: np.ndarray) -> Canvas | None:
    axis = 1 if error.ndim >= 4 else error.ndim - 1
    if error.ndim < 2 or error.shape[axis] < 2 or not error.any():
        return None
    other_axes = tuple(a for a in range(error.ndim) if a != axis)
    heights = np.sqrt(np.mean(np.square(error, dtype=np.float64), axis=other_axes))
    count = len(heights)
    x, y = Scale(-0.5, count - 0.5, LEFT, RIGHT), Scale(0, float(heights.max()) or 1.0, BOTTOM, TOP)
    canvas = Canvas(WIDTH, HEIGHT, f"Error of each of {count} channels")
    canvas.axes(x, y, "channel", "RMS error")
    width = (RIGHT - LEFT) / count
    bars = [f"M{x(c - 0.5)} {BOTTOM}V{y(h)}h{width * 0.85:.2f}V{BOTTOM}Z" for c, h in enumerate(heights) if h > 0]
    canvas.add('<path d="{}" class="bars"/>', "".join(bars))
    for c in np.argsort(heights)[::-1][:3]:
        canvas.rect(x(c - 0.5), TOP, width, BOTTOM - TOP, "hit", f"channel {c}: {heights[c]:.3g}")
    return canvas


def _heat(error: np.ndarray, upwards: bool) -> Canvas | None:
    if error.ndim < 4 or min(error.shape[-2:]) < 4 or not error.any():
        return None
    field_ = error.reshape(-1, *error.shape[-2:]).max(axis=0)
    rows, columns = field_.shape
    step = -(-max(rows, columns) // PIXELS)
    padded = np.pad(field_, ((0, -rows % step), (0, -columns % step)))
    pooled = padded.reshape(padded.shape[0] // step, step, -1, step).max(axis=(1, 3))
    largest = float(pooled.max())
    side = 230 / max(rows, columns)
    width, height = columns * side, rows * side
    left, top = (WIDTH - width) / 2, 10
    canvas = Canvas(WIDTH, HEIGHT, f"Map of the largest error of each of {rows} by {columns} places")
    image = pooled[::-1] if upwards else pooled
    canvas.image(opacity_png(np.sqrt(image / (largest or 1)), ACCENT), left, top, width, height)
    canvas.rect(left, top, width, height, "frame")
    ends = (rows, 0) if upwards else (0, rows)
    canvas.text(left - 6, top + 10, ends[0], "tick end")
    canvas.text(left - 6, top + height, ends[1], "tick end")
    canvas.text(left, top + height + 17, 0, "tick middle")
    canvas.text(left + width, top + height + 17, columns, "tick middle")
    canvas.text(left + width / 2, top + height + 17, "column", "name middle")
    canvas.text(left - 14, top + height / 2, "row", "name middle", turn=-90)
    canvas.text(left + width + 8, top + 10, f"solid: {largest:.3g}", "tick")
    return canvas
