"""A ``Sheet`` in a terminal of any width: numbers are never cut and names never dropped.

Where there is no room, columns are left out by their importance, then names are shortened in the middle, then each row
takes several lines. A pipe or a file has room for every name.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from cp_debug.reports.sheet import Column, Row, Sheet, Tone, tone_of

GAP = 2
"""Spaces between two columns."""
COMFORTABLE = {"name": 32, "text": 24}
"""Cells that a column takes before another one is left out for it."""
TIGHT = {"name": 14, "text": 12}
"""The least that it takes when none can be left out."""
HEAD = 4
"""Cells of a name's start that are kept where its end is what tells it from others."""
_SIGN = re.compile(r"\\x[0-9a-f]{2}|\\u[0-9a-f]{4}|\\U[0-9a-f]{8}|[🇦-🇿]{2}|.", re.S)
_ON_THE_ONE_BEFORE = {"Mn", "Me", "Mc"}
"""Unicode's categories of accents and other marks on the character before."""
IN_A_PIPE = 40
"""The least that a column of text takes where lines may be long."""
STYLES: dict[Tone, str] = {
    "": "",
    "good": "green",
    "note": "yellow",
    "bad": "red",
    "worst": "bold red",
    "quiet": "dim",
    "strong": "bold",
    "differs": "",
}


@dataclass
class Terminal:
    """A sheet that rich prints."""

    sheet: Sheet

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The lines of the table, each no wider than the console, but for a pipe."""
        yield from lines(self.sheet, options.max_width, console, unlimited=bool(getattr(console, "pipe", False)))


def lines(sheet: Sheet, width: int, console: Console, *, unlimited: bool = False) -> Iterator[Text]:
    """The table in lines of at most ``width`` cells; ``unlimited`` shortens no name and leaves out no column."""
    shown = [(row, cells) for row, cells in sheet.lines()][: sheet.most or None]
    natural = [
        max([cell_len(column.header), *(cell_len(text) for row, cells in shown if not row.gap for text in cells[i])])
        for i, column in enumerate(sheet.columns)
    ]
    places, widths = _fitted(sheet.columns, natural, width)
    if not (unlimited or widths) and sheet.narrow:
        yield from lines(sheet.narrow, width, console)
        return
    if sheet.title:
        yield Text(sheet.title, style="italic")
    if unlimited:
        yield from _drawn(sheet, shown, list(range(len(natural))), _in_a_pipe(sheet.columns, natural, width))
    else:
        if widths:
            yield from _drawn(sheet, shown, places, widths)
        else:
            yield from _stacked(sheet, shown, places, width, console)
        if len(places) < len(natural):
            left_out = dict.fromkeys(c.header for i, c in enumerate(sheet.columns) if i not in places and c.header)
            yield Text(f"a wider terminal also shows: {', '.join(left_out)}", style="dim")
    if len(shown) < len(sheet.rows):
        where = f"; {sheet.details}" if sheet.details else ""
        yield Text(f"{len(shown)} of {len(sheet.rows)} rows{where}", style="dim")


def shortened(names: Sequence[str], width: int) -> list[str]:
    """Names in at most ``width`` cells, cut in the middle; different ones stay different where that is possible."""
    room = max(width - 1, 0)
    short_names = {name: name if cell_len(name) <= width else _cut(name, room // 3, room - room // 3) for name in names}
    alike: dict[str, list[str]] = {}
    for name in short_names:
        alike.setdefault(short_names[name], []).append(name)
    for group in alike.values():
        if len(group) > 1:
            short_names |= _apart(group, room)
    return [short_names[name] for name in names]


def _apart(names: Sequence[str], room: int) -> dict[str, str]:
    """Names that are the same when cut as usual, cut where most of them differ."""
    heads = dict.fromkeys((room // 2, room * 2 // 3, min(HEAD, room), 0))
    ways = [[_cut(name, head, room - head) for name in names] for head in heads]
    common = next(i for i, each in enumerate(zip_longest(*names)) if len(set(each)) > 1)
    ways += [[_around(name, common - before, room) for name in names] for before in (HEAD, 1)]
    best = max(ways, key=lambda way: len(set(way)))  # the first of equals
    return dict(zip(names, best, strict=True))


def _cut(name: str, head: int, tail: int) -> str:
    return f"{_start(name, head)}…{_fitting(reversed(_signs(name)), tail, before=True)}"


def _around(name: str, place: int, room: int) -> str:
    """The start of a name and its part from ``place`` on, which is where names differ."""
    head = _start(name, min(HEAD, room // 3))
    rest = name[max(place, len(head)) :]
    room_left = room - cell_len(head)
    return f"{head}…{rest if cell_len(rest) <= room_left else _start(rest, room_left - 1) + '…'}"


def _start(text: str, width: int) -> str:
    """The longest start of ``text`` that fits into ``width`` cells."""
    return _fitting(_signs(text), width)


def _fitting(signs: Iterable[str], width: int, *, before: bool = False) -> str:
    """The first of ``signs``, as many as fit into ``width`` cells; ``before``: each stands before the last one."""
    fitting, used = "", 0
    for sign in signs:
        used += cell_len(sign)
        if used > width:
            break
        fitting = sign + fitting if before else fitting + sign
    return fitting


def _signs(text: str) -> list[str]:
    """The text in pieces that a reader takes for one: a letter with its accents, a flag, an escape (``\\u200d``)."""
    if text.isascii() and "\\" not in text:
        return list(text)
    signs: list[str] = []
    for piece in _SIGN.findall(text):
        if signs and (unicodedata.category(piece[0]) in _ON_THE_ONE_BEFORE or "🏻" <= piece <= "🏿"):
            signs[-1] += piece
        else:
            signs.append(piece)
    return signs


def _total(widths: Sequence[int]) -> int:
    return sum(widths) + GAP * (len(widths) - 1)


def _least(columns: Sequence[Column], natural: Sequence[int], limits: dict[str, int]) -> list[int]:
    """The least width of each column; a header is not broken."""
    return [
        min(n, max(limits[c.kind], cell_len(c.header))) if c.kind in limits else n
        for c, n in zip(columns, natural, strict=True)
    ]


def _fitted(columns: Sequence[Column], natural: Sequence[int], width: int) -> tuple[list[int], list[int]]:
    """The columns to show, and how wide each is; no widths where not even those that must be shown fit."""
    places = list(range(len(columns)))
    least = _least(columns, natural, COMFORTABLE)
    while _total([least[i] for i in places]) > width:
        place = max(places, key=lambda i: (columns[i].leave_out, i), default=None)
        if place is None or not columns[place].leave_out:
            least = _least(columns, natural, TIGHT)
            break
        places.remove(place)
    widths = {i: least[i] for i in places}
    spare = width - _total(list(widths.values()))
    if spare < 0:
        return places, []
    for kind in ("name", "text"):  # names first: text can go on below
        for i in places:
            if columns[i].kind == kind:
                more = min(spare, natural[i] - widths[i])
                widths[i] += more
                spare -= more
    return places, list(widths.values())


def _in_a_pipe(columns: Sequence[Column], natural: Sequence[int], width: int) -> list[int]:
    """All columns as wide as they want; text takes what is left of ``width``, and goes on below."""
    widths = list(natural)
    for i in reversed(range(len(columns))):
        if columns[i].kind == "text" and (over := _total(widths) - width) > 0:
            widths[i] = max(widths[i] - over, min(natural[i], IN_A_PIPE))
    return widths


_Shown = Sequence[tuple[Row, list[list[str]]]]


def _drawn(sheet: Sheet, shown: _Shown, places: Sequence[int], widths: Sequence[int]) -> Iterator[Text]:
    """Header and rows with columns of the given widths."""
    columns = [sheet.columns[i] for i in places]
    if any(column.header for column in columns):
        yield _line([c.header for c in columns], columns, widths, ["bold"] * len(columns), "")
    if sheet.ruled:
        yield Text("─" * _total(widths), style="dim", no_wrap=True, overflow="ignore")
    names = {i: _by_name(shown, i, w) for i, w in zip(places, widths, strict=True) if sheet.columns[i].kind == "name"}
    for position, (row, cells) in enumerate(shown):
        style = STYLES[row.tone]
        if row.gap:
            yield Text("⋮", style=style or "dim")
            continue
        parts = []
        for i, width in zip(places, widths, strict=True):
            if i in names:
                parts.append([names[i][text] for text in cells[i]])
            elif sheet.columns[i].kind == "text":
                parts.append([line for text in cells[i] for line in _wrapped(text, width)])
            else:
                parts.append(cells[i])
        styles = [STYLES[tone_of(row.values[i])] for i in places]
        for below in range(max(map(len, parts), default=0)):
            yield _line([p[below] if below < len(p) else "" for p in parts], columns, widths, styles, style)
        if row.ends and sheet.ruled and position < len(shown) - 1:
            yield Text()


def _stacked(sheet: Sheet, shown: _Shown, places: Sequence[int], width: int, console: Console) -> Iterator[Text]:
    """Each row in several lines: its name, then its other values with their titles."""
    first = next((i for i in places if sheet.columns[i].kind == "name"), places[0])
    names = _by_name(shown, first, width)
    for row, cells in shown:
        if row.gap:
            yield Text("⋮", style="dim")
            continue
        for text in cells[first]:
            yield Text(names[text], style=STYLES[tone_of(row.values[first])] or "bold", no_wrap=True, overflow="ignore")
        parts = [
            Text(f"{sheet.columns[i].header} {' '.join(cells[i])}".strip(), STYLES[tone_of(row.values[i])])
            for i in places
            if i != first and any(cells[i])
        ]
        line = Text()
        for part in parts:
            if line and line.cell_len + GAP + part.cell_len > width:
                yield from line.wrap(console, width)
                line = Text()
            line = Text.assemble(line, " " * GAP if line else "", part)
        if line:
            yield from line.wrap(console, width)


def _by_name(shown: _Shown, place: int, width: int) -> dict[str, str]:
    names = list(dict.fromkeys(text for row, cells in shown if not row.gap for text in cells[place]))
    return dict(zip(names, shortened(names, width), strict=True))


def _wrapped(text: str, width: int) -> list[str]:
    """The text in lines; a word that is too long goes on below behind a dot, a slash or the like, if it has any."""
    width = max(width, 2)
    done: list[str] = []
    line: str | None = None
    for word in text.split(" "):
        if line is not None and cell_len(f"{line} {word}") <= width:
            line = f"{line} {word}"
            continue
        if line is not None:
            done.append(line)
        *full, line = _broken(word, width)
        done += full
    return [*done, line or ""]


def _broken(word: str, width: int) -> list[str]:
    """A word in pieces of at most ``width`` cells."""
    pieces = [""]
    for part in re.findall(r"[^./_=,]*[./_=,]+|[^./_=,]+", word):
        if pieces[-1] and cell_len(pieces[-1] + part) > width:
            pieces.append("")
        while cell_len(part) > width:
            start = _start(part, width) or part[0]
            pieces[-1:] = [start, ""]
            part = part[len(start) :]
        pieces[-1] += part
    return pieces


def _line(
    texts: Sequence[str], columns: Sequence[Column], widths: Sequence[int], styles: Sequence[str], style: str
) -> Text:
    """One line, without spaces at its end."""
    line = Text(style=style, no_wrap=True, overflow="ignore")
    for i, (text, column, width, own_style) in enumerate(zip(texts, columns, widths, styles, strict=True)):
        space = " " * (width - cell_len(text))
        line.append(" " * GAP if i else "")
        line.append(space if column.kind == "number" else "").append(text, own_style or None)
        line.append("" if column.kind == "number" else space)
    line.rstrip()
    return line
