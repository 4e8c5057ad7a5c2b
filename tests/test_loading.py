"""Start-up: a command loads itself alone, and nothing is looked through while torch is loaded."""

from __future__ import annotations

import gc
import subprocess
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
from typer.testing import CliRunner

from cp_debug.cli.main import COMMANDS, application
from cp_debug.loading import load_torch


def names(first: str) -> list[str | None]:
    made = application(first)
    groups = [group.typer_instance and group.typer_instance.info.name for group in made.registered_groups]
    return [command.name for command in made.registered_commands] + groups


def test_the_first_word_decides_what_is_loaded() -> None:
    assert names("bisect") == ["bisect"]
    assert names("sweep") == ["sweep"]
    assert names("") == names("bisekt") == names("--help") == list(COMMANDS)


@pytest.mark.parametrize("word", ["import", "eval", "sweep", "models"])
def test_a_command_alone_is_the_same_command(word: str) -> None:
    alone, whole = (CliRunner().invoke(application(first), [word, "--help"]) for first in (word, ""))
    assert (alone.exit_code, alone.output) == (0, whole.output)


def test_one_command_leaves_the_others_where_they_are() -> None:
    code = (
        "import sys; from cp_debug.cli.main import main\n"
        "sys.argv = ['cpdebug', 'models', '--help']\n"
        "try: main()\n"
        "finally: assert not {'cp_debug.cli.sweep', 'cp_debug.cli.bisect'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


class Watched(MetaPathFinder, Loader):
    """A torch whose loading notes whether the collector is on."""

    on: bool | None = None

    def find_spec(self, name: str, *_: object) -> ModuleSpec | None:
        return ModuleSpec(name, self) if name == "torch" else None

    def exec_module(self, _: ModuleType) -> None:
        self.on = gc.isenabled()


@pytest.mark.parametrize("enabled", [True, False])
def test_the_collector_rests_while_torch_is_loaded(monkeypatch: pytest.MonkeyPatch, enabled: bool) -> None:
    frozen, thresholds, watched = list[str](), list[int](), Watched()
    if not enabled:
        gc.disable()
    monkeypatch.setattr(gc, "freeze", lambda: frozen.append("frozen"))
    monkeypatch.setattr(gc, "set_threshold", thresholds.append)
    monkeypatch.setattr(sys, "meta_path", [watched, *sys.meta_path])
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    try:
        load_torch()
        load_torch()  # is there by now
    finally:
        sys.modules.pop("torch", None)  # the watched one
        monkeypatch.undo()
        after = gc.isenabled()
        gc.enable()
    assert (watched.on, after, frozen) == (False, enabled, ["frozen"])
    assert thresholds
    assert thresholds[0] > 10 * gc.get_threshold()[0]  # collections after it are rare
