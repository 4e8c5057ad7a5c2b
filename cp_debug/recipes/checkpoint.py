"""Strict loading of weights: every key and every shape, or a sentence that says what does not fit."""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cp_debug.errors import InputError
from cp_debug.probes.arrays import is_dense
from cp_debug.reading import check_file, load_plain, readable
from cp_debug.safe_text import some

SHOWN = 5


_LOG_OF_TRAINING = (
    "mmengine.logging.history_buffer.HistoryBuffer",
    "builtins.getattr",  # its methods
    "numpy.dtype",
    "numpy.ndarray",
    *(f"{module}.multiarray.{name}" for module in ("numpy.core", "numpy._core") for name in ("_reconstruct", "scalar")),
)
"""Globals that mmengine's checkpoints ask for besides tensors."""


class _LeftOut:
    """Takes the place of an object that nobody looks at, so that no code of it runs."""

    def __init__(self, *args: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


def load_checkpoint(model: nn.Module, path: Path) -> None:
    """Fill ``model`` from a ``.pt``, ``.pth`` or ``.safetensors`` file; mmengine's ``{"state_dict": …}`` is unwrapped.

    Raises InputError for a file that is missing, broken, or needs pickled code, and for keys or shapes that differ
    from the model's; the model is unchanged then.
    """
    load_state(model, read_state_dict(path), str(path))


def load_state(model: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Fill ``model`` with ``state``, which was read from ``source``; InputError as for ``load_checkpoint``."""
    check_fit({key: list(tensor.shape) for key, tensor in model.state_dict().items()}, state, source)
    model.load_state_dict(state)


def check_fit(expected: Mapping[str, Sequence[int]], state: Mapping[str, Tensor], source: str) -> None:
    """Raise InputError where names or shapes of ``state``, read from ``source``, are not those of ``expected``."""
    problems = []
    if missing := expected.keys() - state.keys():
        problems.append(f"missing keys: {some(sorted(missing), SHOWN)}")
    if extra := state.keys() - expected.keys():
        problems.append(f"keys that the model does not have: {some(sorted(extra), SHOWN)}")
    shapes = [
        f"{key} {list(state[key].shape)} (expected {list(shape)})"
        for key, shape in expected.items()
        if key in state and list(state[key].shape) != list(shape)
    ]
    if shapes:
        problems.append(f"wrong shapes: {some(sorted(shapes), SHOWN)}")
    if problems:
        raise InputError("\n".join((f"{source}: the checkpoint does not fit the model", *problems)))


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Tensor name → tensor of a checkpoint, on the CPU. Raises InputError as ``load_checkpoint`` does."""
    return read_checkpoint(path)[0]


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], Any]:
    """Tensor name → tensor of a checkpoint, on the CPU, and what mmengine keeps beside them under ``meta``, or None.

    Raises InputError as ``load_checkpoint`` does.
    """
    check_file(path, "checkpoint")
    state = _read_safetensors(path) if path.suffix == ".safetensors" else read_torch(path)
    if isinstance(state, dict) and str(kind := state.get("format")).startswith("cpdebug quantized"):
        raise InputError(
            f"{path}: a {kind}; expected FP32 weights. bisect, eval, search and sweep read it, and so do bench with an "
            "INT8 backend and a deployment with `quantization: {checkpoint: …}`"
        )
    meta = None
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        meta, state = state.get("meta"), state["state_dict"]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise InputError(f"{path}: expected a dictionary of tensors, or one under the key 'state_dict'")
    check_tensors(state, str(path))
    return state, meta


def check_tensors(state: Mapping[Any, Any], source: str) -> None:
    """Raise InputError, starting with ``source``, for what is no dense tensor of real numbers under a name."""
    for name, tensor in state.items():
        if not isinstance(name, str):
            raise InputError(f"{source}: a tensor's name is {str(name)[:60]!r}, {type(name).__name__}; expected text")
        if not isinstance(tensor, Tensor):
            raise InputError(f"{source}: {name!r} is {type(tensor).__name__}; expected a tensor")
        if not is_dense(tensor) or tensor.is_complex():
            raise InputError(f"{source}: {name!r} is no dense tensor of real numbers ({tensor.dtype}, {tensor.layout})")


def _read_safetensors(path: Path) -> object:
    from safetensors.torch import load_file

    with readable(path, "a readable safetensors file"):
        return load_file(path)


def read_torch(path: Path) -> object:
    """The object that a file of ``torch.save`` holds, on the CPU.

    The log of a training run, which mmengine saves beside the weights, comes as empty objects. Raises InputError for a
    file that would run code, or is broken.
    """
    with readable(path, "a readable torch checkpoint"):
        try:
            with torch.serialization.safe_globals([(_LeftOut, name) for name in _LOG_OF_TRAINING]):
                return load_plain(path)
        except pickle.UnpicklingError:
            raise InputError(
                f"{path}: refused, because loading it would run code pickled into it; only plain tensors are accepted. "
                "If you trust it, save only its weights: "
                f'torch.save(torch.load("{path.name}", weights_only=False)["state_dict"], "weights.pt")'
            ) from None
