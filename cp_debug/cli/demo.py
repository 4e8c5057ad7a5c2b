"""``cpdebug demo``: a known fault, and the tool finding it."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated

import typer

from cp_debug.cli.flags import JsonFile
from cp_debug.cli.typed import refuse
from cp_debug.errors import InputError
from cp_debug.loading import load_torch
from cp_debug.safe_text import did_you_mean

if TYPE_CHECKING:
    from rich.text import Text

    from cp_debug.bisect.demos import Seeded
    from cp_debug.bisect.result import TestResult
    from cp_debug.reports.sheet import Sheet


def demo(
    fault: Annotated[str | None, typer.Argument(help="A fault to inject; without one, they are listed.")] = None,
    json: JsonFile = None,
    html: Annotated[Path | None, typer.Option(help="Write the HTML report: one file, works offline.")] = None,
) -> None:
    """Watch cpdebug find a known fault in the built-in model."""
    from rich.text import Text

    load_torch()
    from cp_debug.bisect.demos import DEMOS
    from cp_debug.bisect.engine import Options, bisect
    from cp_debug.cli.console import command_line, console, show, steps
    from cp_debug.reports.page import write_page
    from cp_debug.reports.saved import SavedResult
    from cp_debug.reports.sheet_terminal import Terminal

    if fault is None:
        refuse(("json", "html"), unless=False, why="the list of faults is no result; name a FAULT")
        console.print(Terminal(catalogue()))
        console.print("\nrun one:  cpdebug demo weight-scale")
        return
    if fault not in DEMOS:
        hint = did_you_mean(fault, DEMOS) or f"; expected one of {', '.join(DEMOS)}"
        raise InputError(f"FAULT: there is no fault {fault!r}{hint}")
    seeded = DEMOS[fault].seed()
    with TemporaryDirectory(prefix="cpdebug-") as folder, steps() as on_step:
        captures = Path(folder, "kept") if html else None  # the report shows tensors
        result = bisect(
            seeded.model,
            seeded.backends,
            test_model=seeded.test_model,
            options=Options(save=captures),
            on_step=on_step,
        )
        result.command = command_line()
        if html:
            write_page(SavedResult.of(result, captures), html)
    if json != "-":
        console.print(Text.assemble(("injected:", "bold"), f" {DEMOS[fault].summary} ({seeded.where})"))
        console.print(Text.assemble(("in the field:", "bold"), f" {DEMOS[fault].symptom}\n"))
    show(result, json=json, csv=None, rest="--html has all")
    if json != "-":
        console.print(verdict(seeded, result.tests[0]))
    raise typer.Exit(0 if found(seeded, result.tests[0]) else 1)


def catalogue() -> Sheet:
    """Table of all faults: name, what is wrong, what one would see."""
    from cp_debug.bisect.demos import DEMOS
    from cp_debug.reports.sheet import Column, Sheet

    rows = [(name, fault.summary, fault.symptom) for name, fault in DEMOS.items()]
    return Sheet((Column("fault", "name"), Column("what is wrong"), Column("in the field")), rows)


def found(seeded: Seeded, test: TestResult) -> bool:
    """Whether the guilty layers are the injected ones, no more and no fewer."""
    return [row.name for row in test.rows if seeded.strikes(row.name, row.op)] == [row.name for row in test.guilty]


def verdict(seeded: Seeded, test: TestResult) -> Text:
    """One line: what was found, and what was missed or wrongly accused."""
    from rich.text import Text

    injected = [row.name for row in test.rows if seeded.strikes(row.name, row.op)]
    guilty = [row.name for row in test.guilty]
    if found(seeded, test):
        what = f"the {len(guilty)} injected layers" if len(guilty) > 1 else "the one injected layer"
        return Text(f"found: {what}, and no other", "bold green")
    wrong = [f"{name} is innocent" for name in guilty if name not in injected]
    missed = [f"{name} was missed" for name in injected if name not in guilty]
    return Text(f"not found: {'; '.join(wrong + missed)}", "bold red")
