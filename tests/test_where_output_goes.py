"""Where outputs go: the forms of --json, folders that are missing, and a ~ that the shell left alone."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from nets import NetBuilder
from test_cli import run
from typer.main import get_command

from cp_debug.cli.main import JSON_ALONE, application
from cp_debug.cli.typed import JsonCommand


@pytest.fixture
def net(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    b = NetBuilder()
    b.save(tmp_path / "net.onnx", {"x": (1, [1, 4])}, [b.op("Relu", "x")])
    monkeypatch.chdir(tmp_path)
    return "net.onnx"


@pytest.mark.parametrize(
    "words",
    ["net.onnx --json", "--json net.onnx", "--json - net.onnx", "net.onnx --json -", "--json --seed 1 net.onnx",
     "net.onnx --json=-", "--json -- net.onnx"],
)  # fmt: skip
def test_json_alone_goes_to_stdout_and_the_model_stays_one(net: str, words: str) -> None:
    before = Path(net).read_bytes()
    code, text = run("check", *words.split())
    assert (code, json.loads(text)) == (0, [])
    assert Path(net).read_bytes() == before


@pytest.mark.parametrize(
    "words",
    ["net.onnx --json out.txt", "--json out.txt net.onnx", "net.onnx --json=out.txt", "--json out.json net.onnx"],
)
def test_json_goes_to_a_file_and_the_rest_is_shown(net: str, words: str) -> None:
    code, text = run("check", *words.split())
    assert code == 0
    assert "nothing found" in text
    [written] = Path().glob("out.*")
    assert json.loads(written.read_text()) == []


def test_json_of_cache_and_doctor_takes_a_file_too(net: str) -> None:
    assert list(json.loads(run("cache", "--json", "engines")[1])) == ["engines"]
    assert "engines" in run("cache", "engines", "--json", "c.txt")[1]
    assert list(json.loads(Path("c.txt").read_text())) == ["engines"]
    assert "python" in run("doctor", "--json", "d.txt")[1]
    assert "packages" in json.loads(Path("d.txt").read_text())
    assert "packages" in json.loads(run("doctor", "--json", "-")[1])


def test_json_is_a_flag_alone_in_no_command() -> None:
    found = 0
    for command in all_commands(get_command(application())):
        for parameter in command.params:
            if "--json" in parameter.opts:
                found += 1
                assert not parameter.is_flag, command.name
                assert isinstance(command, JsonCommand) == (command.name in JSON_ALONE)
    assert found > 15


def all_commands(command: Any) -> Iterator[Any]:
    """The commands with flags below ``command``, groups opened."""
    for inner in getattr(command, "commands", {}).values():
        yield from all_commands(inner)
    if not hasattr(command, "commands"):
        yield command


@pytest.mark.parametrize("flag", ["csv", "json", "html"])
def test_a_missing_folder_is_told_before_anything_runs(net: str, flag: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cp_debug.cli.bisect.load_torch", lambda: pytest.fail("it runs"))
    code, text = run("bisect", net, "-b", "ort,ort-all", f"--{flag}", f"none/out.{flag}")
    assert (code, text) == (2, f"--{flag}: none/out.{flag}: cannot be written (there is no such folder)")


def test_a_folder_that_the_command_makes_is_not_missing(net: str) -> None:
    code, text = run("bisect", net, "-b", "ort,ort-all", "--save", "kept", "--csv", "kept/layers.csv")
    assert code == 0, text
    assert Path("kept/layers.csv").is_file()


@pytest.mark.parametrize("given", ["~/x", "~"])
def test_a_tilde_that_the_shell_left_is_no_folder(net: str, given: str) -> None:
    code, text = run("capture", net, "-b", "ort", f"--output={given}")
    assert code == 2
    assert text.startswith(f"--output: {given}: ~ is for the shell")
    assert not Path("~").exists()


def test_csv_alone_goes_to_stdout(net: str) -> None:
    code, text = run("bisect", net, "-b", "ort,emu-fp16", "--csv", "-")
    rows = [line.split(",") for line in text.splitlines() if line]
    assert code == 0
    assert rows[0][:2] == ["backend", "index"]
    assert {row[0] for row in rows[1:]} == {"emu-fp16"}
    assert not Path("-").exists()


@pytest.mark.parametrize("given", ["--csv - --json -", "--html -"])
def test_stdout_takes_one_document(net: str, given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cp_debug.cli.bisect.load_torch", lambda: pytest.fail("it runs"))
    code, text = run("bisect", net, "-b", "ort,emu-fp16", *given.split())
    assert code == 2
    assert given.split()[0] in text
    assert "standard output" in text


@pytest.mark.skipif(sys.platform != "linux", reason="file systems of others take UTF-8 alone")
def test_names_that_are_no_utf8_are_read_and_written(net: str) -> None:
    """A folder that another encoding named: its results are shown with escapes, and can be read back."""
    odd = os.fsdecode(b"gr\xf6sse")
    Path(odd).mkdir()
    Path(net).rename(f"{odd}/{odd}.onnx")
    given = ("bisect", f"{odd}/{odd}.onnx", "-b", "ort,emu-fp16", "--save", f"{odd}/run", "--json", f"{odd}.json")
    assert run(*given, "--csv", f"{odd}.csv")[0] == 0
    assert "gr\\udcf6sse" in run("report", f"{odd}/run", "--format", "csv")[1]
    assert Path(f"{odd}.csv").read_text(encoding="utf-8").count("gr\\udcf6sse") == 2
    assert run("diff", f"{odd}/run", f"{odd}.json")[0] == 0
