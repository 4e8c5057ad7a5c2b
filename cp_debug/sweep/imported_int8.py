"""Imports for which tasks with fake quantizers would wait: their library, which itself imports for seconds."""

from __future__ import annotations

import contextlib

from cp_debug.errors import CpdebugError
from cp_debug.quantization.library import load_library

with contextlib.suppress(CpdebugError):  # the tasks say it
    load_library()
