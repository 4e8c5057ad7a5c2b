"""An imported dump in a terminal: how much of the graph it covers, and what does not fit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from rich.console import RenderableType
from rich.text import Text

from cp_debug.bisect.import_dump import ImportedDump
from cp_debug.safe_text import amount, some

MOST = 8
"""Names that are told of each kind."""


def render(dump: ImportedDump) -> Iterator[RenderableType]:
    """The parts of an import, in the order in which they are read."""
    found = f"{dump.matched} of {amount(dump.values, 'value')} of {dump.model}, inputs among them"
    more = len(dump.tensors) - dump.matched
    besides = f", and {amount(more, 'constant')} (not compared)" if more else ""
    yield Text.assemble((dump.source, "bold"), f": {found}{besides}")
    yield from _pairs("renamed", dump.renamed, "is")
    yield from _names("missing output", dump.missing_outputs, "bold red")
    yield from _names("missing input", dump.missing_inputs, "yellow")
    if dump.missing:
        yield Text(f"missing: {some(dump.missing)}; nodes between two dumped values are judged as one segment")
    yield from _names("extra, not a value of the graph", [name for name in dump.extra if name not in dump.suggestions])
    for name, value in list(dump.suggestions.items())[:MOST]:
        yield Text(f"extra: {name} may be {value}: --map {value}={name}", "yellow")
    for note in dump.notes:
        yield Text(f"note: {note}", "yellow")
    yield from _pairs("other dtype", dump.dtypes, "is")
    yield from _pairs("other shape", dump.shapes, "is", "bold red")
    style = "green" if dump.complete else "bold red"
    what = "all outputs are there" if dump.complete else "outputs are missing, or shapes differ"
    yield Text(f"{'✓' if dump.complete else '✗'} {what}", style=style)


def _names(title: str, names: Sequence[str], style: str = "yellow") -> Iterator[Text]:
    if names:
        yield Text(f"{title}: {some(names, MOST)}", style)


def _pairs(title: str, pairs: Mapping[str, str], word: str, style: str = "yellow") -> Iterator[Text]:
    for name, other in list(pairs.items())[:MOST]:
        yield Text(f"{title}: {name} {word} {other}", style)
    if len(pairs) > MOST:
        yield Text(f"{title}: {len(pairs) - MOST} more", style)
