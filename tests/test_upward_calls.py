"""Calls against the order of the rooms during a bisect: only of what was handed down, as the architecture page says."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from test_layout import ROOMS

import cp_debug
from cp_debug.bisect.engine import bisect

PACKAGE = Path(cp_debug.__file__).parent
HANDED_DOWN = {
    ("backends", "programs"): "a sink",
    ("backends", "bisect"): "a mode of torch in which the executor runs",
    ("programs", "bisect"): "a sink",
    ("probes", "backends"): "a sink of the trace",
    ("probes", "bisect"): "a mode of torch in which arrays become tensors",
    ("probes", "programs"): "a sink of the trace",
    ("probes", "recipes"): "the model's own forward",
}
"""Rooms (caller, called) → what is called."""
NETWORK = """
import torch

def build():
    torch.manual_seed(0)
    layers = torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU(), torch.nn.Conv2d(4, 2, 3)
    return torch.nn.Sequential(*layers), (torch.randn(1, 3, 8, 8),)
"""


@contextmanager
def watched() -> Iterator[set[tuple[str, str]]]:
    """The modules (caller, called) between which calls went up the order of the rooms."""
    upward: set[tuple[str, str]] = set()
    seen: set[tuple[str, str]] = set()
    stack: list[str] = []

    def watch(frame: FrameType, event: str, _: Any) -> None:
        if event == "call":
            caller = stack[-1] if stack else ""
            called = module_of(frame.f_code.co_filename) or caller  # what torch calls in between, its caller calls
            if called != caller and (caller, called) not in seen:
                seen.add((caller, called))
                if caller and rank(called) > rank(caller):
                    upward.add((caller, called))
            stack.append(called)
        elif event == "return" and stack:
            stack.pop()

    sys.setprofile(watch)
    try:
        yield upward
    finally:
        sys.setprofile(None)


@cache
def module_of(file: str) -> str:
    """The path of a file in the package; empty outside."""
    return file.removeprefix(f"{PACKAGE}/") if file.startswith(f"{PACKAGE}/") else ""


def room(module: str) -> str:
    """The room of a module, by its path in the package."""
    return module.split("/")[0].removesuffix(".py")


def rank(module: str) -> int:
    """The place of a module's room; modules of no room are in none's way."""
    return ROOMS.index(room(module)) if room(module) in ROOMS else -1


@pytest.mark.slow
def test_a_bisect_calls_upward_only_what_was_handed_down(tmp_path: Path) -> None:
    file = tmp_path / "net.py"
    file.write_text(NETWORK)
    with watched() as upward:
        bisect(f"{file}:build", "torch,ort")
    kinds = {(room(caller), room(called)) for caller, called in upward}
    assert kinds <= HANDED_DOWN.keys(), sorted(upward)
    assert {("backends", "programs"), ("programs", "bisect")} <= kinds  # or nothing was watched
    page = (PACKAGE.parent / "docs" / "architecture.md").read_text()
    assert not [caller for caller, _ in upward if caller.startswith("probes/") and caller not in page]
    assert not [called for _, called in upward if not called.startswith("recipes/") and called not in page]
