"""Fixtures shared by the tests."""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import random
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import typer.testing
from extras import installed

REPO = Path(__file__).resolve().parents[1]

# Before torch is imported, here and in the processes that tests start: with one test process a core, threads that wait
# for each other take several times the processor time of the work.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# How long an example takes says nothing about the code on a machine that does other work.
with contextlib.suppress(ImportError):
    from hypothesis import HealthCheck, settings

    settings.register_profile("cpdebug", settings.default, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("cpdebug")

# What commands keep for the next run is no business of the user's own cache folder.
if "XDG_CACHE_HOME" not in os.environ:
    _cache = tempfile.TemporaryDirectory(prefix="cpdebug-tests-")
    os.environ["XDG_CACHE_HOME"] = _cache.name

# ``CliRunner`` has typer make all commands anew for every call, which takes longer than most of the calls.
typer.testing._get_command = functools.cache(typer.testing._get_command)

# A shell's background ignores Ctrl-C, and so would what tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what reads the shared folder; of functions marked ``few(N)``, N sets of parameters stay in the quick run."""
    functions: dict[str, list[pytest.Item]] = {}
    for item in items:
        if "shared" in getattr(item, "fixturenames", ()):
            item.add_marker("shared")
        if item.get_closest_marker("few"):
            functions.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for same in functions.values():
        (count,) = same[0].get_closest_marker("few").args  # type: ignore[union-attr]
        quick = [item for item in same if not item.get_closest_marker("slow")]
        stay = {len(quick) * n // count for n in range(count)}  # spread over all of them
        for place, item in enumerate(quick):
            if place not in stay:
                item.add_marker("slow")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Let one process run a file whole: its fixtures, and what its functions remember, are made once."""
    from xdist.scheduler import LoadFileScheduling

    return LoadFileScheduling(config, log) if config.getvalue("dist") == "load" else None


def pytest_collection_finish() -> None:
    """What thousands of tests and their libraries are made of stays: collecting garbage need not visit it each time."""
    gc.collect()
    gc.freeze()


def _seed() -> None:
    """The same random numbers whichever tests ran before. torch begins with a seed that is always the same."""
    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    if "draws" in sys.modules:
        sys.modules["draws"].begin()
    if "torch" in sys.modules:
        # ``manual_seed`` also keeps a traceback for each device that was not used yet: 2 % of all tests' time.
        torch = sys.modules["torch"]
        (torch.manual_seed if torch.cuda.is_initialized() else torch.default_generator.manual_seed)(0)


@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup() -> None:
    """A fixture of a module is made by whichever of its tests comes first."""
    _seed()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call() -> None:
    """Fixtures have drawn numbers."""
    _seed()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what needs a package that is not here; see ``extras.needs``."""
    for mark in item.iter_markers("needs_extra"):
        package, reason = mark.args
        if not installed(package):
            pytest.skip(reason)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with real point clouds and mmdet3d parity tensors (CPDEBUG_SHARED, default ../shared)."""
    folder = Path(os.environ.get("CPDEBUG_SHARED", REPO.parent / "shared")).resolve()
    if not (folder / "parity").is_dir():
        pytest.skip(f"no shared material at {folder} (set CPDEBUG_SHARED)")
    return folder


@pytest.fixture
def exports(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the components that were exported."""
    from cp_debug.programs import pipeline

    names: list[str] = []
    export = pipeline._export

    def counted(component: Any, *rest: Any) -> Any:
        names.append(component.name)
        return export(component, *rest)

    monkeypatch.setattr(pipeline, "_export", counted)
    return names
