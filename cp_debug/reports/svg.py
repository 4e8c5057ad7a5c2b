"""Charts as inline SVG: scales, ticks and a canvas; and pictures of quantized data as small PNGs.

Colours are CSS classes, and pictures one colour whose opacity is the value, so that a page can be light or dark.
"""

from __future__ import annotations

import base64
import math
import struct
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup, escape


@dataclass(frozen=True)
class Scale:
    """Maps values to places along an axis; what lies outside of ``low`` … ``high`` is moved to the nearer end."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high = self._f(self.low), self._f(self.high)
        part = (self._f(min(max(value, self.low), self.high)) - low) / ((high - low) or 1.0)
        return round(self.start + part * (self.end - self.start), 1)

    def _f(self, value: float) -> float:
        return math.log10(value) if self.log else value

    def ticks(self, most: int = 6) -> list[float]:
        """Round values, at most about ``most``: powers of ten on a log scale."""
        if self.log:
            first, last = math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9)
            return [10.0**k for k in range(first, last + 1, max(1, math.ceil((last - first + 1) / most)))]
        raw = (self.high - self.low) / most or 1.0
        unit = 10.0 ** math.floor(math.log10(raw))
        step = unit * next(factor for factor in (1, 2, 5, 10) if unit * factor >= raw * 0.999)
        whole = range(math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9) + 1)
        return [k * step for k in whole]


def decades(values: Iterable[float]) -> tuple[float, float]:
    """The powers of ten around the positive, finite values; (1e-1, 1) when there is none."""
    positive = [v for v in values if v > 0 and math.isfinite(v)]
    if not positive:
        return 0.1, 1.0
    low, high = math.floor(math.log10(min(positive))), math.ceil(math.log10(max(positive)))
    return 10.0**low, 10.0 ** max(high, low + 1)


def _tick_label(value: float, log: bool = False) -> Markup:
    """``10⁻³`` with a raised exponent on log axes, else as short as it stays exact."""
    if not log:
        return escape(f"{value:.4g}".replace("-", "−"))
    exponent = str(round(math.log10(value))).replace("-", "−")
    return Markup('10<tspan class="exp" dy="-4">{}</tspan>').format(exponent)


class Canvas:
    """An SVG picture that is put together piece by piece. All text is escaped."""

    def __init__(
        self,
        width: int,
        height: int,
        label: str,
        kind: str = "",
        data: Mapping[str, object] | None = None,
        *,
        stretched: bool = False,
    ) -> None:
        """``label`` describes the picture to those who cannot see it; ``kind`` is a CSS class, ``data`` for scripts.

        ``stretched``: the picture fills its place, whatever that does to its proportions.
        """
        head = '<svg viewBox="0 0 {} {}" role="{}" aria-label="{}" class="chart {}"{}>'
        role = "group" if data else "img"  # an image has nothing inside that can be chosen
        more = Markup("").join(Markup(' data-{}="{}"').format(name, value) for name, value in (data or {}).items())
        if stretched:
            more += Markup(' preserveAspectRatio="none"')
        self._parts = [Markup(head).format(width, height, role, label, kind, more)]
        self.width, self.height = width, height

    def add(self, template: str, *values: object) -> None:
        """Add any element; ``values`` are escaped into ``template``."""
        self._parts.append(Markup(template).format(*values))

    def line(self, x1: float, y1: float, x2: float, y2: float, kind: str) -> None:
        """Add a straight line of the CSS class ``kind``."""
        self.add('<line x1="{}" y1="{}" x2="{}" y2="{}" class="{}"/>', x1, y1, x2, y2, kind)

    def text(self, x: float, y: float, text: object, kind: str = "", turn: int = 0, at: float | None = None) -> None:
        """Add text; ``turn`` rotates it clockwise around its anchor, in degrees; ``at``: place that it moves with."""
        rotate = Markup(' transform="rotate({} {} {})"').format(turn, x, y) if turn else ""
        letters = Markup('<text x="{}" y="{}" class="{}"{}>{}</text>').format(x, y, kind, rotate, text)
        self._parts.append(letters if at is None else Markup('<g data-x="{}">{}</g>').format(at, letters))

    def open_group(self, clip: str, kind: str = "plot") -> None:
        """Begin elements that are cut off at the clip path of that id, and that a script scales as the CSS class."""
        self.add('<g clip-path="url(#{})"><g class="{}">', clip, kind)

    def close_group(self) -> None:
        """End the elements that ``open_group`` began."""
        self._parts.append(Markup("</g></g>"))

    def rect(self, x: float, y: float, width: float, height: float, kind: str, title: str = "") -> None:
        """Add a rectangle of the CSS class ``kind``, with a tooltip where ``title`` is given."""
        shape = '<rect x="{}" y="{}" width="{}" height="{}" class="{}"'
        place = x, y, round(max(width, 0), 1), round(max(height, 0), 1), kind
        if title:
            self.add(shape + "><title>{}</title></rect>", *place, title)
        else:
            self.add(shape + "/>", *place)

    def path(self, points: Sequence[tuple[float, float]], kind: str) -> None:
        """Add a polyline."""
        if points:
            route = "M" + "L".join(f"{x:g} {y:g}" for x, y in points)
            self.add('<path d="{}" class="{}"/>', route, kind)

    def image(self, source: str, x: float, y: float, width: float, height: float) -> None:
        """Add an image given as a data URI, its pixels left sharp."""
        place = '<image href="{}" x="{}" y="{}" width="{}" height="{}" preserveAspectRatio="none" class="pixels"/>'
        self.add(place, source, x, y, width, height)

    def axes(self, x: Scale, y: Scale, x_label: str, y_label: str, *, x_ticks: bool = True) -> None:
        """Add ticks, grid lines and names of both axes; ``y`` runs upwards."""
        factor, name = _shared_factor(y, y_label)
        for value in y.ticks():
            self.line(x.start, y(value), x.end, y(value), "grid")
            self.text(x.start - 6, y(value) + 4, _tick_label(value / factor, y.log), "tick end")
        self.x_axis(x, y.start, x_label, ticks=x_ticks)
        self.text(x.start - 52, (y.start + y.end) / 2, name, "name middle", turn=-90)

    def x_axis(self, x: Scale, bottom: float, label: str, *, ticks: bool = True) -> None:
        """Add a horizontal axis with its ticks and name."""
        for value in x.ticks() if ticks else ():
            self.line(x(value), bottom, x(value), bottom + 4, "axis")
            self.text(x(value), bottom + 17, _tick_label(value, x.log), "tick middle")
        self.line(x.start, bottom, x.end, bottom, "axis")
        self.text((x.start + x.end) / 2, bottom + 34, label, "name middle")

    def __html__(self) -> str:
        return str(Markup("").join([*self._parts, Markup("</svg>")]))


def _shared_factor(scale: Scale, name: str) -> tuple[float, Markup]:
    """The power of ten that the labels of a linear axis are divided by, and the axis' name with it: labels such as
    ``1.5e-08`` would not fit beside the name."""
    longest = max((len(_tick_label(value)) for value in scale.ticks()), default=0)
    if scale.log or longest <= _LONGEST_LABEL:
        return 1.0, escape(name)
    power = math.floor(math.log10(max(map(abs, scale.ticks()))))
    return 10.0**power, Markup("{} × {}").format(name, _tick_label(10.0**power, log=True))


_LONGEST_LABEL = 5
"""Letters of a tick's label that fit between the axis and its name."""


def standalone(canvas: Canvas, css: Markup) -> str:
    """The picture as a file of its own, with the style of the pages inside."""
    head, _, body = canvas.__html__().partition(">")
    head = head.replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg"', 1)
    return str(Markup("{}><style>{}</style>{}").format(Markup(head), css, Markup(body)))


LEVELS = 32


def opacity_png(values: np.ndarray, colour: tuple[int, int, int]) -> str:
    """A PNG as a data URI. ``values`` [H, W] in 0 … 1 (NaN is 0); 0 is transparent, 1 is opaque ``colour``."""
    height, width = values.shape
    levels = np.rint(np.clip(np.nan_to_num(values), 0, 1) * (LEVELS - 1)).astype(np.uint8)
    rows = np.pad(levels, ((0, 0), (1, 0)))  # every row starts with its filter type, 0
    opacity = np.linspace(0, 255, LEVELS).astype(np.uint8).tobytes()
    parts = (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)),
        (b"PLTE", bytes(colour) * LEVELS),
        (b"tRNS", opacity),
        (b"IDAT", zlib.compress(rows.tobytes(), 9)),
        (b"IEND", b""),
    )
    chunks = (struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in parts)
    return "data:image/png;base64," + base64.b64encode(b"\x89PNG\r\n\x1a\n" + b"".join(chunks)).decode()
