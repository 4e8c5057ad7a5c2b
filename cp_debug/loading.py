"""Loading of torch in programs of this project's own: the command line, and the workers of a sweep."""

from __future__ import annotations

import gc
import sys
import threading
import traceback
from contextlib import suppress
from pathlib import Path

from cp_debug.errors import MissingPackage, in_one_line, raise_if_interrupted


def load_torch() -> None:
    """Import torch with Python's garbage collector at rest, which would go through all that is loaded again and again.

    What is loaded by then stays until the process ends, so that later collections leave it out. They are rarer, too:
    an export makes millions of small objects and hardly any rubbish; looking for it took an eighth of a first bisect.

    Raises MissingPackage where torch is installed and cannot be loaded: damaged, out of memory, or a variable of its
    own set to nonsense.
    """
    if "torch" in sys.modules:
        return
    enabled = gc.isenabled()
    gc.disable()
    try:
        import torch  # noqa: F401
    except MemoryError:
        raise
    except Exception as error:
        raise_if_interrupted(error)
        raise MissingPackage(_not_loaded(error)) from error
    finally:
        if enabled:
            gc.enable()
    gc.freeze()
    gc.set_threshold(10_000)


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


def kept_torch_out(error: Exception) -> str:
    """Sentence for an error that came while torch was imported, by whichever module; empty for any other."""
    names = ((frame.f_code.co_filename, frame.f_code.co_name) for frame, _ in traceback.walk_tb(error.__traceback__))
    loading = any(Path(file).parts[-2:] == ("torch", "__init__.py") and name == "<module>" for file, name in names)
    return _not_loaded(error) if loading else ""


def _not_loaded(error: Exception) -> str:
    return f"torch cannot be loaded ({in_one_line(error)})"
