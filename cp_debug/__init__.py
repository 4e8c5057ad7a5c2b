"""cpdebug names the first layer whose result its precision cannot explain.

``cp_debug.bisect(...)`` is the main job as a function; it returns a result with ``.layers`` (a pandas DataFrame) that
shows itself in a terminal.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cp_debug.version import __version__ as __version__

if TYPE_CHECKING:
    from cp_debug.bisect.engine import bisect as bisect
    from cp_debug.probes.capture import Capture as Capture
    from cp_debug.probes.statistics import compare as compare

_EXPORTS = {
    "bisect": "cp_debug.bisect.engine",
    "Capture": "cp_debug.probes.capture",
    "compare": "cp_debug.probes.statistics",
}


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'cp_debug' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_EXPORTS[name]), name)
