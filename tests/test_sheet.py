"""Tables as data, in terminals of all widths, pipes, pages, notebooks and Markdown."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console
from rich.progress import Progress
from test_cli import run

from cp_debug.cli import console
from cp_debug.cli.console import SafeConsole
from cp_debug.reports.progress_bar import progress_bar
from cp_debug.reports.sheet import Cell, Column, Row, Sheet
from cp_debug.reports.sheet_markup import table_html, table_markdown, table_notebook
from cp_debug.reports.sheet_terminal import Terminal, shortened

COLUMNS = (
    Column("#", "number", leave_out=4, show=str),
    Column("layer", "name"),
    Column("op", "mark", leave_out=5),
    Column("shape", "number", leave_out=7),
    Column("max |Δ|", "number", leave_out=6),
    Column("rel. L2", "number", leave_out=2),
    Column("introduced", "number"),
    Column("expected", "number", leave_out=3),
    Column("excess", "number"),
    Column("verdict", "mark"),
)
LONG = "pts_backbone_neck_head.pts_backbone.blocks.{}.{}.convolution_with_a_long_name"
NAMES = [
    *(LONG.format(block, layer) for block in range(3) for layer in (1, 4)),
    "骨干网络.第一个卷积层.权重归一化.输出特征图.最后一层",
    "🚗🚙🚌.detector.🚗🚙🚌.head.🚗🚙🚌.a_name_with_emoji_in_it",
    "relu",
]
FIGURE = 5.72e-06


def sheet(names: list[str] = NAMES) -> Sheet:
    rows = [
        (i, name, "ConvTranspose", "1×64×128×128", FIGURE, FIGURE, FIGURE, FIGURE, 1234.0, Cell("guilty 62%", "worst"))
        for i, name in enumerate(names, 11)
    ]
    return Sheet(COLUMNS, [*rows[:2], Row(gap=True), *rows[2:]])


def drawn(table: Sheet, width: int, *, pipe: bool = False) -> str:
    out = SafeConsole(width=width if pipe else None)
    out.file, out.pipe = io.StringIO(), pipe
    out.width = width
    out.print(Terminal(table))
    return out.file.getvalue()


GOLDEN = Path(__file__).parent / "data" / "tables"
WIDTHS = (30, 60, 80, 100, 120, 200)


@pytest.mark.parametrize("width", WIDTHS)
def test_a_table_of_layers_at_each_width(width: int) -> None:
    """``python tests/test_sheet.py`` writes the expected files anew; read what changed before it is committed."""
    assert drawn(sheet(), width) == (GOLDEN / f"layers-{width}.txt").read_text(encoding="utf-8")


def test_a_pipe_has_every_column_and_the_whole_of_every_name() -> None:
    text = drawn(sheet(), 140, pipe=True)
    assert text == drawn(sheet(), 200)
    assert all(name in text for name in NAMES)


@settings(suppress_health_check=[HealthCheck.too_slow])  # making names of all of Unicode is, on a busy machine
@given(
    names=st.lists(st.text(st.characters(codec="utf-8"), min_size=1, max_size=60), min_size=1, max_size=8, unique=True),
    width=st.integers(20, 220),
)
def test_no_width_cuts_a_number_or_a_verdict_or_makes_a_line_too_long(names: list[str], width: int) -> None:
    text = drawn(sheet(names), width)
    assert max(map(cell_len, text.splitlines())) <= width
    words = text.split()
    assert {word for word in words if word.startswith("5.")} - set("".join(names).split()) <= {"5.72e-06"}
    assert words.count("62%") >= len(names)
    assert words.count("1.23e+03") >= len(names)


@given(
    names=st.lists(st.text("ab.1é骨🚗", min_size=1, max_size=40), min_size=1, max_size=12, unique=True),
    width=st.integers(12, 50),
)
def test_names_are_shortened_to_the_width_and_no_further(names: list[str], width: int) -> None:
    for name, short in zip(names, shortened(names, width), strict=True):
        assert cell_len(short) <= width
        assert (short == name) == (cell_len(name) <= width)
        if short != name:
            assert "…" in short
            assert cell_len(short) >= width - 4


def test_names_that_differ_in_the_middle_stay_different() -> None:
    names = [LONG.format(block, layer) for block in range(12) for layer in range(12)]
    assert len(set(shortened(names, 28))) == len(names)


def test_text_goes_on_below_and_is_never_cut() -> None:
    fix = "pip install '.[quant]' in a checkout of cpdebug, or name another Python that has nvidia-modelopt"
    table = Sheet((Column("package", "mark"), Column("version", "mark"), Column("")), [("modelopt", "missing", fix)])
    for width in (40, 60, 80):
        lines = drawn(table, width).splitlines()
        assert max(map(cell_len, lines)) <= width
        assert " ".join(line[18:].strip() for line in lines[1:]) == fix


def test_foreign_text_steers_no_terminal() -> None:
    text = drawn(sheet(["a\x1b[31m\nb", "[bold]c[/bold]"]), 200)
    assert "a\\x1b[31m\\nb" in text
    assert "[bold]c[/bold]" in text


ODD = Sheet(
    (Column("layer", "name"), Column("error", "number", unit="dB"), Column("nodes")),
    [("a|b<i>.c", None, ("x", "y")), Row(("d", 1.5, Cell("z", badge="lost")), "bad"), Row(gap=True)],
    "Title",
)


def test_a_column_without_a_title_has_no_empty_header() -> None:
    sheet = Sheet((Column("", "mark"), Column("layer", "name")), [("better", "conv")])
    for page in (table_html(sheet), table_notebook(sheet)):
        assert "<thead><tr><td></td><th" in page  # readers of screens would announce an empty header


def test_pages_notebooks_and_markdown_show_the_same_values() -> None:
    page, notebook, markdown = table_html(ODD), table_notebook(ODD), "\n".join(table_markdown(ODD))
    assert '<th scope="col" class="n">error, dB</th>' in page
    assert '<td class="name">a|b&lt;i&gt;.<wbr>c</td>' in page
    guilty = '<td class="name">d</td><td class="n">1.5</td><td><span class="badge lost">z</span></td>'
    assert f'<tr class="guilty">{guilty}</tr>' in page
    assert 'aria-label="Title"' in page
    assert "<td>a|b&lt;i&gt;.c</td><td>–</td><td>x y</td>" in notebook
    assert markdown.splitlines() == [
        "| layer | error, dB | nodes |",
        "|---|---:|---|",
        r"| a\|b&lt;i&gt;.c | – | x<br>y |",
        "| d | 1.5 | z |",
    ]


def test_a_row_has_a_value_for_every_column() -> None:
    with pytest.raises(ValueError, match="shorter"):
        drawn(Sheet(COLUMNS, [("1", "a")]), 80)


def test_names_that_differ_in_the_middle_and_at_the_end_keep_their_end() -> None:
    heads = [
        f"pts_bbox_head.task_heads.{i}.reg.0.conv.{kind}_quantizer" for i in (0, 1) for kind in ("input", "weight")
    ]
    short = shortened(heads, 32)
    assert len(set(short)) == 4
    assert all(name.endswith("_quantizer") for name in short)


@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_a_line_of_progress_cuts_no_number_and_waits_with_what_is_not_known(width: int) -> None:
    out = io.StringIO()
    bar = progress_bar(Console(file=out, width=width, force_terminal=True, color_system=None))
    task = bar.add_task("", total=None)
    shown = [line(bar, width)]
    bar.update(task, description="ort.test, sample 0: noise floor of a long name", completed=45, total=146)
    bar.tasks[0].start_time = bar.get_time() - 3725
    shown.append(line(bar, width))
    assert re.fullmatch(r". +━* *0:00 *", shown[0]), "no 0/?, and no time left where nobody knows"
    assert shown[1].rstrip().endswith("45/146 1:02:05")
    assert "ort.test" in shown[1]


def line(bar: Progress, width: int) -> str:
    """The one line that ``bar`` shows."""
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(bar.get_renderable())
    (one,) = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    return str(one)


def test_progress_leaves_nothing_in_a_log() -> None:
    out = io.StringIO()
    with progress_bar(Console(file=out)) as bar:
        bar.add_task("exporting", total=3)
    assert out.getvalue() == ""


@pytest.mark.parametrize("sign", ["e\u0301", "🇩🇪", "👍🏽", "\\u200d", "\\x1b", "नि"])
def test_what_a_reader_takes_for_one_sign_is_never_cut(sign: str) -> None:
    for width in range(6, 24):
        (short,) = shortened([sign * 30], width)
        assert set(short.replace(sign, "")) == {"…"}
        assert cell_len(short) <= width


def test_doctor_and_the_list_of_models_fit_any_width(monkeypatch: pytest.MonkeyPatch) -> None:
    fixes: list[list[str]] = []
    for width in (60, 80, 120):
        monkeypatch.setattr(console.console, "width", width)
        monkeypatch.setattr(console.console, "pipe", False)
        codes, texts = zip(*map(run, ("doctor", "models")), strict=True)
        assert codes == (0, 0)
        lines = "".join(texts).splitlines()
        fixes.append([line for line in lines if re.match(r"(?!warning: )\S+: .*|.*  # .* here$", line)])
        assert max(cell_len(line) for line in lines if line not in fixes[-1]) <= width
    assert fixes[0] == fixes[1] == fixes[2], "what is to be copied is one line at any width"


def test_long_words_go_on_below_behind_their_dots() -> None:
    table = Sheet((Column("setting"),), [("torch backends.cuda.matmul.allow_fp16_reduced_precision_reduction",)])
    lines = drawn(table, 40).splitlines()[1:]
    assert lines == ["torch", "backends.cuda.matmul.allow_fp16_reduced_", "precision_reduction"]


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for width in WIDTHS:
        (GOLDEN / f"layers-{width}.txt").write_text(drawn(sheet(), width), encoding="utf-8")
