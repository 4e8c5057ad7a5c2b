"""Files within limits: whatever is wrong is one sentence, and nothing is waited for or allocated."""

from __future__ import annotations

import errno
import os
import zipfile
from pathlib import Path
from typing import Annotated

import numpy as np
import onnx
import pytest
from pydantic import AfterValidator, Strict

from cp_debug import files
from cp_debug.cli.given import check_outputs
from cp_debug.errors import InputError, system_reason
from cp_debug.files import complete_folder, complete_path, partial_name, write_text
from cp_debug.reading import (
    json_text,
    parse_json,
    plain,
    read_json,
    read_npy,
    read_npz,
    read_text,
    sealed,
    typed,
    unsealed,
    within,
)


def test_what_is_no_file_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "zero").symlink_to("/dev/zero")
    for name, why in (
        ("pipe", "is a pipe"),
        ("loop", "levels of symbolic links"),
        ("zero", "is a device"),
        (".", "is a folder"),
        ("gone", "no such file"),
        ("a\0b", "null byte"),
        ("x" * 300, "name too long"),
    ):
        with pytest.raises(InputError, match=why):
            read_text(tmp_path / name)


def test_text_is_utf8_and_limited(tmp_path: Path) -> None:
    path = tmp_path / "a"
    for data, why in ((b"\xff", "not UTF-8"), (b"a\0", "null byte"), (b"x" * (1 << 21), "at most")):
        path.write_bytes(data)
        with pytest.raises(InputError, match=why):
            read_text(path)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("[" * 100_000, "nested too deep|not JSON"),
        ("[" * 70 + "]" * 70, "nested too deep"),
        ("9" * 5000, "more than 64 bits"),
        ('"\\ud800"', r"\(a text holds half of a surrogate pair\)"),
        (b'{"a": "\xe6"}', r"\(no text in UTF-8 at byte 7\)"),
        ("{", "not JSON"),
        ("\x00", "not JSON"),
    ],
)
def test_json_that_nobody_can_use_is_refused(text: str | bytes, why: str) -> None:
    with pytest.raises(InputError, match=why):
        parse_json(text, "a.json")


def test_json_of_names_that_are_no_utf8_can_be_read() -> None:
    given = {"a\udcff": ["é\udcfe", "\N{GRINNING FACE}", r"C:\udcff", 1.5, None]}
    read = {"a\\udcff": ["é\\udcfe", "\N{GRINNING FACE}", r"C:\udcff", 1.5, None]}
    assert parse_json(json_text(given), "a.json") == read
    assert unsealed(sealed(given).encode(), "a.json") == read


def test_json_keeps_what_others_wrote(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"a": [1, 2.5, "NaN", null, 18446744073709551615]}')
    assert read_json(tmp_path / "a.json") == {"a": [1, 2.5, "NaN", None, 2**64 - 1]}


def test_fields_of_other_types_are_named() -> None:
    assert typed(dict[str, float], {"a": "NaN", "b": 1}, "f")["b"] == 1.0
    with pytest.raises(InputError, match=r'^f: b\.0 is "x"; expected a valid integer'):
        typed(dict[str, list[int]], {"a": [1], "b": ["x"]}, "f")
    with pytest.raises(InputError, match=r"^f: b is null; expected a valid dictionary; b is null; expected"):
        typed(dict[str, dict[str, Annotated[int, AfterValidator(abs)]] | list[int]], {"b": None}, "f")
    with pytest.raises(InputError, match=r'^f: b\.c is "x"; expected a valid integer'):
        typed(dict[str, dict[str, int] | None], {"b": {"c": "x"}}, "f")
    circle: list[object] = []
    circle.append(circle)
    for value, says in ((circle, r"\[\[\.\.\.\]\]"), ({(1, 2): 3}, r"{\(1, 2\): 3}"), ("é" * 99, '"é{76}' + r"\.{3}")):
        with pytest.raises(InputError, match=f"^f: the document is {says}; expected a valid integer"):
            typed(int, value, "f")
    with pytest.raises(InputError, match=r'^f: 0 is "0"; .*2 is "2"; expected a valid boolean; and 2 more$'):
        typed(list[Annotated[bool, Strict()]], [*"01234"], "f")


def test_settings_do_not_unfold_without_end() -> None:
    shared: list[object] = [1]
    for _ in range(40):
        shared = [shared, shared]
    with pytest.raises(InputError, match="unfolds to more than"):
        plain({"a": shared}, "c.yaml")
    circle: list[object] = []
    circle.append(circle)
    with pytest.raises(InputError, match="unfolds to more than"):
        plain(circle, "c.yaml")
    with pytest.raises(InputError, match=r"c\.yaml: a\.b: bytes"):
        plain({"a": {"b": b""}}, "c.yaml")
    assert plain({"a": (1, "x", None, 2.5)}, "c.yaml") == {"a": [1, "x", None, 2.5]}


def npy(header: bytes, data: bytes) -> bytes:
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + data


@pytest.mark.parametrize(
    "header",
    [
        b"{'descr': '<f4', 'fortran_order': False, 'shape': (1099511627776,), }\n",
        b"{'descr': '<f4', 'fortran_order': False, 'shape': (-1,), }\n",
        b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }\n",
        b"{'descr': '|V0', 'fortran_order': False, 'shape': (1000000000000,), }\n",
        b"[" * 3000,
    ],
)
def test_arrays_are_as_large_as_their_data(tmp_path: Path, header: bytes) -> None:
    (tmp_path / "a.npy").write_bytes(npy(header, b"1234"))
    with pytest.raises(InputError, match=r"a\.npy: not a readable"):
        read_npy(tmp_path / "a.npy")
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("x.npy", npy(header, b"1234"))
    with pytest.raises(InputError, match=r"a\.npz: not a readable"):
        read_npz(tmp_path / "a.npz")


def test_arrays_come_back(tmp_path: Path) -> None:
    arrays = {"a": np.asfortranarray(np.arange(6.0).reshape(2, 3)), "b": np.zeros((0, 4), np.int8), "c": np.array(True)}
    np.savez_compressed(tmp_path / "a.npz", **arrays)
    found = read_npz(tmp_path / "a.npz")
    assert all(
        np.array_equal(found[name], array) and found[name].dtype == array.dtype for name, array in arrays.items()
    )
    np.save(tmp_path / "a.npy", arrays["a"])
    assert np.array_equal(read_npy(tmp_path / "a.npy"), arrays["a"])


def test_a_line_that_was_changed_is_known() -> None:
    line = sealed({"a": 1, "b": ["x"]}).encode()
    assert unsealed(line, "log") == {"a": 1, "b": ["x"]}
    for changed in (line.replace(b"1", b"2", 1), line[:-2], b'{"a": 1}', b"[]"):
        with pytest.raises(InputError, match="log"):
            unsealed(changed, "log")


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "", ".", "a/../../x", "a\0"])
def test_files_stay_in_their_folder(tmp_path: Path, name: str) -> None:
    assert within(tmp_path, "a/b", "m") == tmp_path / "a" / "b"
    with pytest.raises(InputError, match="expected one in"):
        within(tmp_path, name, "m")


def test_what_cannot_be_written_is_told_and_nothing_is_left(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    for target in ("folder", "file/x", "no/such", "x" * 300, "", "a\0b"):
        with pytest.raises(InputError, match="cannot be written"):
            write_text("x", tmp_path / target if target else Path())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]


def test_a_device_is_written_to_and_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write_text("through", tmp_path / "pipe")
    assert os.read(reader, 99) == b"through"
    assert (tmp_path / "pipe").is_fifo()


def test_a_pipe_that_nobody_reads_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "READER", 0.2)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match=r"pipe: cannot be written \(a pipe that nothing reads\)"):
        write_text("x", tmp_path / "pipe")


def test_folders_too_deep_to_be_made_are_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nested folders"), complete_folder(Path("d/" * 1500)):
        pass
    with pytest.raises(InputError, match=r"--output: d/d.* 1500 nested folders; expected at most 400"):
        check_outputs({"output": Path("d/" * 1500)}, {"output": "--output"})


def test_a_folder_appears_when_it_is_complete(tmp_path: Path) -> None:
    target = tmp_path / "out"

    def fail() -> None:
        with complete_folder(target / "in" / "new" / "ones") as made:
            (made / "half").touch()
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert list(tmp_path.iterdir()) == []
    with complete_folder(target) as made:
        (made / "a").touch()
        assert not target.exists()
    assert [p.name for p in target.iterdir()] == ["a"]


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    gone = os.fork()
    if gone == 0:
        os._exit(0)
    os.waitpid(gone, 0)
    (tmp_path / f".out.{gone}.partial").mkdir()
    (tmp_path / f".out.{gone}-ab12.partial").touch()
    (tmp_path / f".out.{os.getppid()}.partial").touch()  # of one that runs
    (tmp_path / f".other.{gone}.partial").touch()
    partial_name(tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        [f".out.{os.getppid()}.partial", f".other.{gone}.partial"]
    )


def test_reasons_of_the_system_are_words(tmp_path: Path) -> None:
    assert system_reason(OSError(errno.EMFILE, os.strerror(errno.EMFILE))) == "too many open files"
    assert system_reason(OSError(9999, "odd")) == "odd"
    with pytest.raises(InputError, match="no space left on device"), complete_path(tmp_path / "a"):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_folder_without_a_name_can_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cp_debug.files import complete_folder

    monkeypatch.chdir(tmp_path)
    with complete_folder(Path()) as partial:
        (partial / "a").write_text("x")
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize(("domain", "version"), [("", 1 << 40), ("", 0), ("", -1), ("own", 1 << 40), ("own", -1)])
@pytest.mark.parametrize("of_a_function", [False, True])
def test_versions_of_operators_that_none_has_are_refused(
    tmp_path: Path, domain: str, version: int, of_a_function: bool
) -> None:
    from onnx import TensorProto, helper

    from cp_debug.graph.onnx_file import read_model

    def opsets(changed: bool) -> list[onnx.OperatorSetIdProto]:
        known = {"": 17, "own": 1} | ({domain: version} if changed else {})
        return [helper.make_opsetid(*entry) for entry in known.items()]

    nodes = [helper.make_node("Relu", ["a"], ["b"])]
    function = helper.make_function("own", "F", ["a"], ["b"], nodes, opsets(of_a_function))
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy")
    graph = helper.make_graph([helper.make_node("F", ["x"], ["y"], domain="own")], "g", [x], [y])
    model = helper.make_model(graph, functions=[function], opset_imports=opsets(not of_a_function))
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(InputError, match=f"(opset|version) {version}"):
        read_model(tmp_path / "m.onnx")
