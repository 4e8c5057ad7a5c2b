"""The log of a sweep: whole lines or none, nothing twice, and nobody else's file touched."""

from __future__ import annotations

import json
from pathlib import Path

import pandas
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cp_debug.errors import InputError
from cp_debug.sweep.log import SweepLog, write_table


def record(key: str, **outcome: object) -> dict[str, object]:
    return {"key": key, "kind": "test", "params": {}, "seconds": 0.0, "worker": "", **outcome}


def test_records_come_back(tmp_path: Path) -> None:
    with SweepLog(tmp_path / "sub" / "log.jsonl") as log:
        log.append(record("a", result={"x": 0.1 + 0.2}))
    with SweepLog(tmp_path / "sub" / "log.jsonl") as log:
        assert [(r["key"], r["result"]["x"]) for r in log] == [("a", 0.1 + 0.2)]


@settings(max_examples=60, deadline=None)
@given(cut=st.integers(0, 400), results=st.lists(st.text(max_size=10), min_size=1, max_size=5))
def test_cut_anywhere_it_keeps_the_whole_lines_and_goes_on(
    tmp_path_factory: pytest.TempPathFactory, cut: int, results: list[str]
) -> None:
    path = tmp_path_factory.mktemp("log") / "log.jsonl"
    with SweepLog(path) as log:
        for index, text in enumerate(results):
            log.append(record(str(index), result={"text": text}))
    whole = path.read_bytes()[:cut]
    path.write_bytes(whole)
    kept = max(whole.count(b"\n") - 1, 0)
    with SweepLog(path) as log:
        assert [r["result"]["text"] for r in log] == results[:kept]
        log.append(record("next", result={}))
        assert [r["key"] for r in log] == [*map(str, range(kept)), "next"]


def test_one_record_a_key_the_first_result_else_the_last_error(tmp_path: Path) -> None:
    with SweepLog(tmp_path / "log.jsonl") as log:
        log.append(record("a", error="first"))
        log.append(record("b", error="first"))
        log.append(record("a", result=1))
        log.append(record("a", result=2))
        log.append(record("b", error="second"))
        log.append(record("another grid's", result=3))
        found = {r["key"]: r.get("result", r.get("error")) for r in log.records({"a", "b"})}
    assert found == {"a": 1, "b": "second"}


@pytest.mark.parametrize("content", [b"a,b\n1,2\n", b'{"schema": "another/1"}\n', b"\x00\x01"])
def test_another_file_is_refused_and_left_as_it_is(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "table.csv"
    path.write_bytes(content)
    with pytest.raises(InputError, match="not the log of a sweep"):
        SweepLog(path)
    assert path.read_bytes() == content


def test_a_broken_line_within_is_told_by_its_number(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    with SweepLog(path) as log:
        log.append(record("a", result=1))
    with path.open("ab") as stream:
        stream.write(b"garbage\n")
    with SweepLog(path) as log, pytest.raises(InputError, match="line 3 is not JSON"):
        list(log)


def test_a_folder_is_no_log(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be written"):
        SweepLog(tmp_path)


def test_parquet_has_a_row_for_each_row_of_each_record(tmp_path: Path) -> None:
    records = [record(str(i), result={"values": list(range(i % 4))}) for i in range(600)]
    path = tmp_path / "log.parquet"
    write_table(
        records,
        lambda r: [{"key": r["key"], "value": v if v else None} for v in r["result"]["values"]],
        {"key": str, "value": float},
        path,
    )
    table = pandas.read_parquet(path)
    assert len(table) == sum(i % 4 for i in range(600))
    assert table.value.isna().sum() == sum(bool(i % 4) for i in range(600))
    assert json.loads(table.key.iloc[-1]) == 599


def test_a_log_without_a_record_goes_with_the_error(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "log.jsonl"
    with pytest.raises(InputError), SweepLog(path):
        raise InputError("bad")
    assert not list(tmp_path.iterdir())
    log = SweepLog(path)
    log.append({"key": "a", "result": 1})
    with pytest.raises(InputError), log:
        raise InputError("bad")
    assert path.is_file()
    with SweepLog(tmp_path / "kept.jsonl"):
        pass
    with pytest.raises(InputError), SweepLog(tmp_path / "kept.jsonl"):
        raise InputError("bad")
    assert (tmp_path / "kept.jsonl").is_file()


def test_records_of_other_grids_are_left_alone_and_counted(tmp_path: Path) -> None:
    with SweepLog(tmp_path / "log.jsonl") as log:
        for key in ("mine", "theirs", "theirs", "hers"):
            log.append({"key": key, "result": {}})
        assert [record["key"] for record in log.records({"mine"})] == ["mine"]
        assert log.others == {"theirs", "hers"}
