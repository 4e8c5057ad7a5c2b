"""The table of the field reports still tells the truth: each command prints its line."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from extras import needs
from test_tutorial import DOCS, tutorial

PAGE = (DOCS / "field.md").read_text(encoding="utf-8")
*PARTS, MMDET3D, GPU, ELSEWHERE = PAGE.split("\n## ")[1:]


def rows_of(part: str) -> list[tuple[str, str]]:
    """(command, line that it prints) of a part of the page."""
    return re.findall(r"^\| .* \| `(.+?)` \| ``? ?(.+?) ?`?` \|$", part, re.MULTILINE)


TABLES = [rows_of(part) for part in PARTS]


def test_the_tables_have_commands_of_every_kind() -> None:
    names = {word for table in TABLES for command, _ in table for word in re.findall(r"cpdebug (\w+)", command)}
    assert names >= {"bisect", "export", "verify", "eval", "deploy", "bench", "check", "quantize"}


@pytest.mark.slow
@pytest.mark.timeout(1200)  # the rows of a table run in one folder
@needs("modelopt")
@pytest.mark.parametrize("rows", TABLES)
def test_every_row_prints_its_line(tmp_path: Path, rows: list[tuple[str, str]]) -> None:
    tutorial.write_files(PAGE, tmp_path)
    for command, line in rows:
        ((_, holds),) = tutorial.updated([line], tutorial.run(command, tmp_path))
        assert holds, (command, line)


def test_what_ran_elsewhere_is_recorded_or_tested() -> None:
    recorded = re.findall(r'"(.+)" in \[.+?\]\((.+?)\)', GPU + ELSEWHERE)
    tested = re.findall(r"`(test_\w+)` in (tests/\w+\.py)", ELSEWHERE)
    rows = GPU.count("\n| ") + ELSEWHERE.count("\n| ") - 2
    assert len(recorded) + len(tested) == rows, "each row but the heads"
    for figure, page in recorded:
        assert figure in (DOCS / page).read_text(encoding="utf-8"), page
    for name, path in tested:
        assert f"def {name}(" in (DOCS.parent / path).read_text(encoding="utf-8"), path


def test_what_a_gpu_did_has_its_raw_data_beside_it() -> None:
    rows = re.findall(r"^\| .+ \| `cpdebug (\w+) .+\]\((gpu/data/.+\.json)\) \|$", GPU, re.MULTILINE)
    assert len(rows) == GPU.count("\n| ") - 1
    for command, path in rows:
        assert f"cpdebug {command} " in json.loads((DOCS / path).read_text(encoding="utf-8"))["command"], path
