"""Foreign text in each place where it is shown."""

from __future__ import annotations

import copy
import io
import sys
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from cp_debug.cli.console import no_library_warnings
from cp_debug.errors import InputError
from cp_debug.safe_text import (
    LimitedStream,
    annotation,
    csv_cell,
    flags,
    markdown,
    message,
    no_command,
    one_line,
    page,
    visible,
    without_traceback,
)


@pytest.mark.parametrize(("count", "ends"), [(8, "'n 7'"), (9, "'n 8'"), (10, "'n 7' and 2 more")])
def test_options_are_cut_where_that_makes_them_shorter(count: int, ends: str) -> None:
    assert flags("--keep-fp32", [f"n {i}" for i in range(count)]).endswith(f"--keep-fp32 {ends}")


@given(st.text())
def test_nothing_unseen_is_left(text: str) -> None:
    assert all(c == "\n" or c.isprintable() or c.isspace() for c in visible(text))
    assert "\n" not in one_line(text)


def test_control_characters_become_escapes_and_the_rest_stays() -> None:
    assert visible("\x1b[31mred\x07\u202e\x9b") == "\\x1b[31mred\\x07\\u202e\\x9b"
    assert visible("Größe 名前 ✓ Δ\n") == "Größe 名前 ✓ Δ\n"
    assert one_line("a\nb") == "a\\nb"
    assert page("a\tb\n\x1b") == "a\tb\n\\x1b"


def test_a_message_has_twelve_lines_of_limited_length() -> None:
    told = message("\n".join(["x" * 5000] * 100))
    assert len(told.splitlines()) == 12
    assert max(map(len, told.splitlines())) <= 400
    assert "89 more lines" in told
    assert message("short") == "short"


@pytest.mark.parametrize("text", ["=1+1", "+1+1", "-1+1", "@SUM(1)", "\t=1", "\r=1", " =1+1"])
def test_a_cell_is_no_formula(text: str) -> None:
    assert str(csv_cell(text)).startswith("'")


@pytest.mark.parametrize("value", ["-1.5", "+3", "conv1", -1.5, None, 3])
def test_numbers_and_names_are_cells_as_they_are(value: object) -> None:
    assert csv_cell(value) == value


def test_markdown_and_annotations_stay_in_their_line() -> None:
    assert markdown("a|b<c>\n# d") == "a\\|b&lt;c&gt;\\\\n\\# d"
    assert annotation("50%\n::error::x") == "50%25%0A::error::x"
    assert annotation("a:b,c", name=True) == "a%3Ab%2Cc"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("@user", "@<!-- -->user"),
        ("torch@cuda", "torch@cuda"),
        ("see #12", "see \\#<!-- -->12"),
        ("gh-7", "gh-<!-- -->7"),
        ("high-7", "high-7"),
        ("http://a.b", "http:<!-- -->//a.b"),
        ("WWW.a.b", "W<!-- -->WW.a.b"),
    ],
)
def test_markdown_addresses_nobody_and_links_nowhere(text: str, shown: str) -> None:
    assert markdown(text) == shown


def test_commands_of_the_older_kind_are_none_anywhere_in_a_line() -> None:
    assert no_command("layer ##[error]x") == "layer \\x23#[error]x"
    assert no_command("a\n  ::error::b ::c::") == "a\n  \\x3a:error::b ::c::"
    assert annotation("a ##[add-mask]b") == "a \\x23#[add-mask]b"


def test_letters_that_nobody_sees_are_escapes() -> None:
    assert visible("a\u034fb\u3164c\u115f") == "a\\u034fb\\u3164c\\u115f"
    assert visible("naïve 日本 ❤️") == "naïve 日本 ❤️"


@pytest.mark.parametrize("text", ["＝1+1", "＠SUM(A1)", " ＋1", "－x"])
def test_wide_signs_begin_no_formula_either(text: str) -> None:
    assert csv_cell(text) == f"'{text}"


@pytest.mark.parametrize("text", ["a ##[error]b", "::error::b", "  ::add-mask::b"])
def test_no_row_of_a_printed_table_is_a_command(text: str) -> None:
    assert no_command(csv_cell(text)) == csv_cell(text) != text


def test_a_list_in_a_cell_is_json_and_no_command() -> None:
    assert csv_cell([1, "ä", None]) == '[1, "ä", null]'
    assert csv_cell({"a": ("##[error]x\n\x1b",)}) == '{"a": ["\\x23#[error]x\\n\\u001b"]}'


def test_bytes_of_a_module_are_made_safe() -> None:
    written = io.StringIO()
    stream = LimitedStream(written)
    assert stream.buffer.write(b"a\x1b[31m\xff\n" * 20) == 160
    stream.finish()
    assert written.getvalue().startswith("a\\x1b[31m\ufffd\n")
    assert len(written.getvalue().splitlines()) == 13


def test_frames_of_tracebacks_are_left_out() -> None:
    text = 'before\nTraceback (most recent call last):\n  File "a", line 1\n    x\nValueError: no\nafter'
    assert without_traceback(text) == "before\nValueError: no\nafter"


def test_a_console_shows_markup_and_escapes_as_text() -> None:
    from cp_debug.cli.console import SafeConsole
    from cp_debug.reports.sheet import Column, Sheet
    from cp_debug.reports.sheet_terminal import Terminal

    stream = io.StringIO()
    console = SafeConsole(width=80)
    console.file = stream
    table = Terminal(Sheet([Column("name", "name")], [["[red]a[/]\x1b[0m\nb"]]))
    console.print(table)
    console.print("[b]plain[/b] :warning: \u202e")
    shown = stream.getvalue()
    assert "[red]a[/]\\x1b[0m\\nb" in shown
    assert "[b]plain[/b] :warning: \\u202e" in shown
    own = Console(file=io.StringIO(), width=80)  # as a user's, who prints a result
    own.print(table)
    assert "[red]a[/]" in own.file.getvalue()  # type: ignore[attr-defined]


def test_what_others_print_has_twelve_lines_of_limited_length() -> None:
    stream = io.StringIO()
    aside = LimitedStream(stream)
    for number in range(2000):
        aside.write("x" * 1000)
        aside.write(f"{number}\n")
    aside.write("the last, without an end")
    aside.finish()
    *lines, last = stream.getvalue().splitlines()
    assert lines == ["x" * 399 + "…"] * 12
    assert last == "… (1989 more lines printed by the model or a library)"


@pytest.mark.parametrize("pieces", [["::error::x"], [":", ":error::x"], [" :", ":", "error"], ["#", "#[group]x"]])
def test_no_command_of_a_workflow_comes_in_pieces(pieces: list[str]) -> None:
    stream = io.StringIO()
    aside = LimitedStream(stream)
    for piece in pieces:
        aside.write(piece)
    assert no_command(stream.getvalue()) == stream.getvalue()


def test_an_error_is_safe_to_print() -> None:
    assert str(InputError("a\x1b[31m\u202e: no such\nfile")) == "a\\x1b[31m\\u202e: no such\nfile"


def test_warnings_of_libraries_are_left_out_and_those_of_a_module_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"torch": torch.__file__, "copy": copy.__file__, "mine": "/home/nets.py", "theirs": "/site-packages/x/y.py"}
    told: list[str] = []

    def warn() -> list[str]:
        told.clear()
        for what, file in files.items():
            warnings.showwarning(what, UserWarning, file, 1)
        return told

    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: told.append(str(message))
        monkeypatch.setattr(sys, "warnoptions", [])
        with no_library_warnings():
            assert warn() == ["mine", "theirs"]
        assert warn() == list(files)
        monkeypatch.setattr(sys, "warnoptions", ["default"])
        with no_library_warnings():
            assert warn() == list(files)
