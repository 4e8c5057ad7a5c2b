"""Help of every command: short, in groups, with no name cut, and whole where asked."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import typer
from test_cli import run

from cp_debug.cli.main import application


def commands(found: Any = None, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """(words, command) of every command that runs something."""
    found = found or typer.main.get_command(application())
    if not hasattr(found, "list_commands"):
        yield path, found
        return
    context = typer.Context(found)
    for name in found.list_commands(context):
        yield from commands(found.get_command(context, name), (*path, name))


COMMANDS = list(commands())


def names(command: Any) -> set[str]:
    return {max(p.opts, key=len) for p in command.params if p.param_type_name == "option" and not p.hidden}


@pytest.mark.parametrize(("words", "command"), COMMANDS, ids=[" ".join(words) for words, _ in COMMANDS])
def test_a_help_is_short_and_names_every_option(
    words: tuple[str, ...], command: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    code, text = run(*words, "--help")
    assert code == 0
    lines = text.splitlines()
    assert len(lines) < 60
    assert max(map(len, lines)) <= 80
    assert names(command) <= set(text.replace(",", " ").split())
    code, text = run(*words, "--help-all")
    assert code == 0
    described = {line.split()[0].rstrip(",") for line in text.splitlines() if line.startswith("  -")}
    assert {name for name in names(command) if len(name) > 2} - described <= set(text.replace(",", " ").split())
    assert "--help-all describes" not in text


def test_what_matters_first_is_described_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    _, text = run("bisect", "--help")
    described, _, rest = text.partition("More options, which --help-all describes:")
    first = [line.split()[0] for line in described.partition("Options:")[2].splitlines() if line.startswith("  -")]
    assert first == ["-b,", "--inputs", "--test-model", "--html", "--save", "-h,"]
    groups = [line.split("  ")[1] for line in rest.splitlines() if line.startswith("  ") and line[2] != " "]
    assert groups[:4] == ["Model", "Inputs", "Dumped tensors", "Judgement"]
    assert "TensorRT" in groups


def test_the_list_of_commands_is_not_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    _, text = run("--help")
    assert "..." not in text.partition("Commands:")[2]
