"""The mutation run puts what a changed file makes at import in the place of what it made."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent / "mutation"))
from parts import Parts

SOURCE = """
from __future__ import annotations
import enum
from dataclasses import dataclass, field, fields

LIMIT = 3
TABLE = {"a": 1, "b": LIMIT}


def beyond(value, limit=LIMIT, *, strict=True):
    return value > limit if strict else value >= limit


@dataclass(frozen=True)
class Row:
    name: str
    size: int = 1
    parts: list = field(default_factory=list, metadata={"written": False})

    factor = 2

    @property
    def scaled(self):
        return self.size * self.factor

    def more(self, by=1):
        return self.size + by


@dataclass(frozen=True)
class LongRow(Row):
    length: float = 0.5


class Kind(enum.Enum):
    A = 1


LONG = LongRow("x")
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A module of a folder ``cp_debug``, and another that has taken its constants over."""
    path = tmp_path / "cp_debug" / "made_up_for_mutants.py"
    path.parent.mkdir()
    path.write_text(SOURCE, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("made_up_for_mutants", path)
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "made_up_for_mutants", made)
    spec.loader.exec_module(made)
    reader: Any = ModuleType("reads_made_up_for_mutants")
    reader.LIMIT, reader.TABLE, reader.Row = made.LIMIT, made.TABLE, made.Row
    monkeypatch.setitem(sys.modules, "reads_made_up_for_mutants", reader)
    return made


def execute(module: Any, old: str, new: str) -> None:
    assert SOURCE.count(old) == 1
    Parts().execute(module.__file__, SOURCE, SOURCE.replace(old, new))


def test_a_constant_is_replaced_where_it_was_imported(module: Any) -> None:
    execute(module, "LIMIT = 3", "LIMIT = 4")
    assert module.LIMIT == sys.modules["reads_made_up_for_mutants"].LIMIT == 4
    execute(module, '{"a": 1,', '{"a": 2,')
    assert sys.modules["reads_made_up_for_mutants"].TABLE == {"a": 2, "b": 4}


def test_defaults_of_a_function_are_replaced(module: Any) -> None:
    beyond = module.beyond
    execute(module, "strict=True", "strict=False")
    assert beyond is module.beyond
    assert beyond(3)
    execute(module, "limit=LIMIT", "limit=2")
    assert beyond(2.5)


@pytest.mark.few(2)
@pytest.mark.parametrize(
    ("old", "new", "figure", "value"),
    [
        ("size: int = 1", "size: int = 5", lambda m: m.Row("a").size, 5),
        ("factor = 2", "factor = 3", lambda m: m.Row("a").scaled, 3),
        ("by=1", "by=7", lambda m: m.Row("a").more(), 8),
        ("by=1", "by=7", lambda m: m.LONG.more(), 8),
        ("length: float = 0.5", "length: float = 1.5", lambda m: m.LongRow("a").length, 1.5),
        ('"written": False', '"written": True', lambda m: m.fields(m.Row)[2].metadata["written"], True),
        ('"written": False', '"written": True', lambda m: m.fields(m.LongRow)[2].metadata["written"], True),
    ],
)
def test_a_class_stays_and_has_the_other_default(module: Any, old: str, new: str, figure: Any, value: Any) -> None:
    row = module.Row
    execute(module, old, new)
    assert row is module.Row is sys.modules["reads_made_up_for_mutants"].Row  # type: ignore[attr-defined]
    assert figure(module) == value
    assert isinstance(module.LONG, row)


def test_what_cannot_be_replaced_is_refused(module: Any) -> None:
    with pytest.raises(ValueError, match="Kind is of a kind of its own"):
        execute(module, "A = 1", "A = 2")
