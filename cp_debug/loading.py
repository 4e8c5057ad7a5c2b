"""Loading of torch in programs of this project's own: the command line, and the workers of a sweep."""

from __future__ import annotations

import gc
import sys


def load_torch() -> None:
    """Import torch with Python's garbage collector at rest, which would go through all that is loaded again and again.

    What is loaded by then stays until the process ends, so that later collections leave it out.
    """
    if "torch" in sys.modules:
        return
    enabled = gc.isenabled()
    gc.disable()
    try:
        import torch  # noqa: F401
    finally:
        if enabled:
            gc.enable()
    gc.freeze()
