"""Caches of engines and exports: what is listed, what is cleared, and what is left alone."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
from test_cli import run

KEYS = [character * 64 for character in "abc"]
DAY = 86400


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's caches: two engines, one of them ten days old, with a timing cache, an export, and foreign files."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    engines, exports = tmp_path / "cpdebug/engines", tmp_path / "cpdebug/exports"
    engines.mkdir(parents=True)
    exports.mkdir(parents=True)
    for key, age in zip(KEYS, (0, 10), strict=False):
        (engines / f"{key}.zip").write_bytes(bytes(3500))
        os.utime(engines / f"{key}.zip", (time.time() - age * DAY,) * 2)
    (engines / f"{KEYS[2]}.timings").write_bytes(bytes(40))
    (engines / "notes.zip").write_text("mine")
    (exports / f"{KEYS[2]}.zip").write_bytes(bytes(700))
    (exports / "mine").mkdir()
    (exports / KEYS[0]).mkdir()  # a folder: another tool's
    return tmp_path / "cpdebug"


def entries(*words: str) -> dict[str, list[str]]:
    """Cache → keys that ``cpdebug cache`` lists."""
    code, text = run("cache", *words, "--json")
    assert code == 0, text
    return {kind: [entry["key"] for entry in found["entries"]] for kind, found in json.loads(text).items()}


def test_each_entry_is_listed_once_the_latest_first(home: Path) -> None:
    found = entries()
    assert found["exports"] == [KEYS[2]]
    assert set(found["engines"][:2]) == {KEYS[0], KEYS[2]}
    assert found["engines"][2] == KEYS[1]
    assert entries("exports") == {"exports": [KEYS[2]]}
    assert entries("--unused", "5") == {"engines": [KEYS[1]], "exports": []}
    (engines, _) = json.loads(run("cache", "--json")[1]).values()
    assert engines["bytes"] == 2 * 3500 + 40


def test_only_what_the_tool_wrote_is_removed(home: Path) -> None:
    code, text = run("cache", "--clear")
    assert code == 0
    assert "engines: removed 3 entries, 7.0 kB" in text
    assert "exports: removed 1 entry" in text
    left = sorted(str(path.relative_to(home)) for path in home.rglob("*"))
    assert left == ["engines", "engines/notes.zip", "exports", f"exports/{KEYS[0]}", "exports/mine"]
    assert (home / "engines/notes.zip").read_text() == "mine"


def test_what_was_used_lately_stays(home: Path) -> None:
    run("cache", "engines", "--unused", "5", "--clear")
    assert set(entries("engines")["engines"]) == {KEYS[0], KEYS[2]}


def test_what_a_killed_run_left_is_cleared_and_what_is_being_written_is_not(home: Path) -> None:
    left, fresh = home / "exports/.0123456789ab.partial", home / "exports/.ba9876543210.partial"
    for file in (left, fresh):
        file.write_bytes(bytes(10))
    os.utime(left, (time.time() - DAY,) * 2)
    assert left.name in entries("exports")["exports"]
    run("cache", "--clear")
    assert not left.exists()
    assert fresh.exists()


def test_a_link_and_what_it_leads_to_stay(home: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_text("{}")
    (home / f"exports/{KEYS[1]}.zip").symlink_to(other)
    run("cache", "--clear")
    assert other.is_file()
    assert (home / f"exports/{KEYS[1]}.zip").is_symlink()


def test_a_folder_of_engines_that_was_named(home: Path, tmp_path: Path) -> None:
    named = tmp_path / "named"
    (home / "engines").rename(named)
    assert entries("--cache", str(named)).keys() == {"engines"}
    assert len(entries("--cache", str(named))["engines"]) == 3
    assert entries("engines") == {"engines": []}
    assert run("cache", "--cache", str(tmp_path / "none")) == (2, f"--cache: {tmp_path / 'none'}: no such folder")
    code, text = run("cache", "exports", "--cache", str(named))
    assert code == 2
    assert text.startswith("--cache: it would do nothing here")


def test_the_table_says_where_and_how_much(home: Path) -> None:
    code, text = run("cache")
    assert code == 0
    assert str(home / "engines") in text
    assert "7.0 kB" in text
    assert "cpdebug cache --clear" in text
