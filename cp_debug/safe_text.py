"""Foreign text made safe for each place where it is shown: a terminal, Markdown, HTML, CSV, annotations of GitHub.

Names of layers, files, classes and backends come from files that anybody may have written. What reaches a terminal
raw can move its cursor, and what reaches a spreadsheet or a page can be run.
"""

from __future__ import annotations

import re
import unicodedata
from html import escape
from typing import Any

LINES = 12
"""Lines of an error message that are shown."""
WIDTH = 400
"""Characters of a line of an error message that are shown."""

_UNSEEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
"""Unicode's categories of what is not seen, and of what turns or breaks lines: control and format characters (bidi
overrides are among them), halves of surrogates, private and unassigned characters, separators."""
_MARKDOWN = re.compile(r"([\\`*_\[\]|#~])")
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def visible(text: str, keep: str = "\n") -> str:
    """The text with everything unseen as an escape (``\\x1b``, ``\\u202e``), but for the characters to ``keep``."""
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() or c in keep or unicodedata.category(c) not in _UNSEEN else _escaped(c) for c in text
    )


def one_line(text: str) -> str:
    """``visible``, and line feeds as ``\\n``: a name stays in its line."""
    return visible(text).replace("\n", "\\n")


def message(text: str, lines: int = LINES, width: int = WIDTH) -> str:
    """An error message for a terminal: ``visible``, at most so many lines and so many characters a line."""
    shown = [line if len(line) <= width else f"{line[: width - 1]}…" for line in visible(text).strip().split("\n")]
    if len(shown) > lines:
        shown = [*shown[: lines - 1], f"… ({len(shown) - lines + 1} more lines)"]
    return "\n".join(shown)


def without_traceback(text: str) -> str:
    """What another program said, without the frames of Python's tracebacks: the errors that end them stay."""
    kept: list[str] = []
    inside = False
    for line in text.split("\n"):
        if line.strip() == "Traceback (most recent call last):":
            inside = True
        elif not inside or not (line.startswith(" ") or not line.strip()):
            inside = False
            kept.append(line)
    return "\n".join(kept)


def markdown(text: str) -> str:
    """One line in which nothing is Markdown or HTML."""
    return escape(_MARKDOWN.sub(r"\\\1", one_line(text)), quote=False)


def csv_cell(value: Any) -> Any:
    """A cell that no spreadsheet takes for a formula: such text gets an apostrophe before it; numbers stay."""
    if not isinstance(value, str):
        return value
    shown = one_line(value)
    if value.startswith(_FORMULA) and not _is_number(value):
        return f"'{shown}"
    return shown


def annotation(text: str, *, name: bool = False) -> str:
    """Text of a GitHub annotation, which ends with the line; ``name``: of a property such as its title."""
    escaped = visible(text).replace("%", "%25").replace("\n", "%0A")
    return escaped.replace(":", "%3A").replace(",", "%2C") if name else escaped


def page(text: str) -> str:
    """A whole page or picture, in which names are escaped already: nothing unseen but the ends of its lines."""
    return visible(text, "\n\t")


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode()


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
