"""Foreign text made safe for each place where it is shown: a terminal, Markdown, HTML, CSV, annotations of GitHub.

Names of layers, files, classes and backends come from files that anybody may have written. What reaches a terminal
raw can move its cursor, and what reaches a spreadsheet or a page can be run.
"""

from __future__ import annotations

import difflib
import io
import json
import os
import re
import shlex
import sys
import unicodedata
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from html import escape
from typing import IO, Any, TextIO, cast

LINES = 12
"""Largest number of lines of an error message."""
WIDTH = 400
"""Largest number of characters in a line of an error message."""

_UNSEEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
"""Unicode's categories of what is not seen, and of what turns or breaks lines: control and format characters (bidi
overrides are among them), halves of surrogates, private and unassigned characters, separators."""
_IGNORED = re.compile("[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u3164\uffa0]")
"""Marks and letters that nobody sees either (Unicode's property Default_Ignorable_Code_Point), but for the selectors of
emoji."""
_MARKDOWN = re.compile(r"([\\`*\[\]|#~]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9]))")  # inside a word, _ is a letter
_COMMAND = re.compile(r"^(\s*)::|##\[", re.M)
_REFERENCE = re.compile(r"(?<!\w)@(?=\w)|(?<=\\#)(?=\d)|\bGH-(?=\d)|://|\bwww\.", re.I)
"""Text that GitHub makes a link of, or a message to somebody, wherever it stands in a page of Markdown."""
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def visible(text: str, keep: str = "\n") -> str:
    """The text with everything unseen as an escape (``\\x1b``, ``\\u202e``), but for the characters to ``keep``."""
    if text.isprintable():
        return text if text.isascii() else _IGNORED.sub(lambda found: _escaped(found[0]), text)
    shown = (c if c.isprintable() or c in keep or unicodedata.category(c) not in _UNSEEN else _escaped(c) for c in text)
    return _IGNORED.sub(lambda found: _escaped(found[0]), "".join(shown))


def in_utf8(text: str) -> str:
    """The text with halves of surrogates as escapes: bytes of a file's name that are no UTF-8 are held as such."""
    return text.encode(errors="backslashreplace").decode()


def no_command(text: str) -> str:
    """Text of a line in a log, of which GitHub's runner takes none for a command of its workflow: ``::error::…`` where
    a line begins, ``##[error]`` anywhere."""
    return _COMMAND.sub(lambda found: "\\x23#[" if found[1] is None else f"{found[1]}\\x3a:", text)


class SafeStream:
    """A stream for text of others: what is written goes to ``stream``, with control characters as escapes."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write the text; a carriage return begins a new line, as it could hide the old one."""
        lines = visible(text.replace("\r\n", "\n").replace("\r", "\n"), keep="\n\t").split("\n")
        self._stream.write("\n".join(map(no_command, lines)))
        return len(text)

    def writelines(self, texts: Iterable[str]) -> None:
        """Write the texts one after the other."""
        for text in texts:
            self.write(text)

    @property
    def buffer(self) -> SafeBuffer:
        """A stream of bytes, which are text of the same kind."""
        return SafeBuffer(self)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class SafeBuffer(io.RawIOBase):
    """Bytes for a ``SafeStream``, in UTF-8; others are shown as U+FFFD."""

    def __init__(self, stream: SafeStream) -> None:
        super().__init__()
        self._stream = stream

    def writable(self) -> bool:
        """Whether it can be written to."""
        return True

    def write(self, data: Any) -> int:
        """Write what a buffer of bytes holds; returns their number."""
        content = bytes(data)
        self._stream.write(content.decode("utf-8", "replace"))
        return len(content)


class LimitedStream(SafeStream):
    """A ``SafeStream`` that passes on so many lines, of so many characters each, and counts those that follow."""

    def __init__(self, stream: TextIO, lines: int = LINES, width: int = WIDTH) -> None:
        super().__init__(stream)
        self._left, self._width = lines, width
        self._line = ""
        """The part of an unfinished line that was passed on."""
        self._more = 0
        self._open = False
        """Whether a line that is not passed on has begun."""

    def write(self, text: str) -> int:
        """Write the text as far as it goes."""
        first, *others = visible(text.replace("\r\n", "\n").replace("\r", "\n"), keep="\n\t").split("\n")
        self._pass_on(first)
        for piece in others:
            self._end_line()
            self._pass_on(piece)
        return len(text)

    def _pass_on(self, piece: str) -> None:
        if self._left <= 0:
            self._open = self._open or bool(piece)
            return
        if self._line:  # a command of a workflow may come in pieces
            if piece and no_command(self._line + piece) != self._line + piece:
                piece = f"\\x{ord(piece[0]):02x}{piece[1:]}"
        else:
            piece = no_command(piece)
        room = self._width - len(self._line)
        if room <= 0:
            return
        shown = piece if len(piece) <= room else f"{piece[: room - 1]}…"
        self._line += shown
        self._stream.write(shown)

    def _end_line(self) -> None:
        if self._left > 0:
            self._left -= 1
            self._line = ""
            self._stream.write("\n")
        else:
            self._more += 1
            self._open = False

    def finish(self) -> None:
        """Say how many lines were not passed on."""
        more = self._more + self._open
        if more:
            self._stream.write(f"… ({amount(more, 'more line')} printed by the model or a library)\n")
        self._more, self._open = 0, False


@contextmanager
def redirected(descriptor: int, file: IO[Any]) -> Iterator[None]:
    """Context in which what libraries write to a file descriptor of this process goes into ``file``."""
    try:
        before = os.dup(descriptor)
    except OSError:  # closed
        yield
        return
    try:
        os.dup2(file.fileno(), descriptor)
        yield
    finally:
        os.dup2(before, descriptor)
        os.close(before)


@contextmanager
def prints_aside() -> Iterator[None]:
    """Context in which what is printed, as by a user's module, goes to stderr as ``LimitedStream`` writes it."""
    out, err = sys.stdout, sys.stderr
    aside = LimitedStream(err)
    sys.stdout = sys.stderr = cast(TextIO, aside)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = out, err
        with suppress(OSError, ValueError):  # stderr may be full, or closed by now
            aside.finish()


def one_line(text: str) -> str:
    """Text in one line: made ``visible``, with line feeds written as a backslash and an n."""
    return visible(text).replace("\n", "\\n")


def message(text: str, lines: int = LINES, width: int = WIDTH) -> str:
    """An error message for a terminal: ``visible``, at most so many lines and so many characters a line."""
    shown_lines = [
        line if len(line) <= width else f"{line[: width - 1]}…" for line in visible(text).strip().split("\n")
    ]
    if len(shown_lines) > lines:
        shown_lines = [*shown_lines[: lines - 1], f"… ({len(shown_lines) - lines + 1} more lines)"]
    return "\n".join(shown_lines)


def without_traceback(text: str) -> str:
    """Output of another program without the frames of Python's tracebacks: the errors that end them stay."""
    kept_lines: list[str] = []
    inside = False
    for line in text.split("\n"):
        if line.strip() == "Traceback (most recent call last):":
            inside = True
        elif not inside or not (line.startswith(" ") or not line.strip()):
            inside = False
            kept_lines.append(line)
    return "\n".join(kept_lines)


def markdown(text: str) -> str:
    """The text in one line in which nothing is Markdown or HTML, and nothing a link or addresses anybody."""
    return _REFERENCE.sub(_broken, escape(_MARKDOWN.sub(r"\\\1", one_line(text)), quote=False))


def _broken(found: re.Match[str]) -> str:
    """A reference with an empty comment in it: readers see the same."""
    text = found[0]
    return f"{text[0]}<!-- -->{text[1:]}" if text[:1] in tuple(":wW") else f"{text}<!-- -->"


def code_span(text: str) -> str:
    """The text as Markdown's code, in one line; its own backticks are apostrophes."""
    inside = one_line(text).replace("`", "'").replace("##[", "\\x23#[")
    return f"`{inside}`"


def csv_cell(value: Any) -> Any:
    """A cell that no spreadsheet takes for a formula: such text gets an apostrophe before it; numbers stay.

    Nor does GitHub's runner take a row for a command, where the table is printed. Lists and mappings are JSON.
    """
    if isinstance(value, list | tuple | dict):
        return no_command(one_line(json.dumps(value, ensure_ascii=False, default=str)))
    if not isinstance(value, str):
        return value
    cell_text = no_command(one_line(value))
    # Spreadsheets in East Asian languages take wide signs for the narrow ones.
    begins = [unicodedata.normalize("NFKC", text[:1]) for text in (value, value.lstrip())]
    formula = any(first.startswith(_FORMULA) for first in begins) and not _is_number(value)
    return f"'{cell_text}" if formula else cell_text


def annotation(text: str, *, name: bool = False) -> str:
    """Text of a GitHub annotation, which ends with the line; ``name``: of a property such as its title."""
    escaped = visible(text).replace("##[", "\\x23#[").replace("%", "%25").replace("\n", "%0A")
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


def did_you_mean(word: str, known: Iterable[str], n: int = 1) -> str:
    """``; did you mean emu-fp16?``, the ``n`` most similar of the known words; empty where none is similar."""
    near = difflib.get_close_matches(word, list(known), n)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def some(names: Collection[Any], most: int = 8) -> str:
    """The first names of many, and how many more there are: ``a, b and 3 more``."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(str, [*names][:most])) + more


def flags(flag: str, names: Sequence[str], most: int = 8) -> str:
    """``flag`` once for each of the first names, quoted for a shell, and how many more there are."""
    shown = names if len(names) <= most + 1 else names[:most]  # "and 1 more" is as long as the one
    more = f" and {len(names) - most} more" if shown is not names else ""
    return " ".join(f"{flag} {shlex.quote(name)}" for name in shown) + more


def amount(count: int, noun: str) -> str:
    """A count and what is counted: ``1 layer``, ``2 layers``."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def percent(share: float) -> str:
    """``62%``; ``0%`` also for negative shares that round to zero."""
    return f"{round(share, 2) + 0.0:.0%}"


def in_digits(value: float) -> str:
    """Six digits, ``0.0233179``; whole numbers with all of theirs, up to fifteen: ``16777217``."""
    return f"{value:.{15 if abs(value) < 1e15 and float(value).is_integer() else 6}g}"
