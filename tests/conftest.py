"""Fixtures shared by the tests."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]

# Before torch is imported, here and in the processes that tests start: with one test process a core, threads that wait
# for each other take several times the processor time of the work.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A shell's background ignores Ctrl-C, and so would what tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with real point clouds and mmdet3d parity tensors (CPDEBUG_SHARED, default ../shared)."""
    folder = Path(os.environ.get("CPDEBUG_SHARED", REPO.parent / "shared")).resolve()
    if not (folder / "parity").is_dir():
        pytest.skip(f"no shared material at {folder} (set CPDEBUG_SHARED)")
    return folder
