"""Loading of torch in programs of this project's own: the command line, and the workers of a sweep."""

from __future__ import annotations

import gc
import sys
import threading
from contextlib import suppress


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


def start_gpu(device: str) -> None:
    """Start CUDA and the library of convolutions on a GPU, ``cuda:0``, in a thread, while other things are read.

    That of products is left alone: it looks once at the environment, which a deterministic run sets. Where there is no
    GPU, or no memory on it, nothing happens: whoever uses it will say so.
    """

    def start() -> None:
        import torch

        with suppress(Exception), torch.no_grad():
            if torch.cuda.is_available():
                image = torch.zeros(1, 8, 8, 8, device=device)
                torch.nn.functional.conv2d(image, torch.zeros(8, 8, 3, 3, device=device))

    threading.Thread(target=start).start()  # no daemon: CUDA must not be shut down while it starts
