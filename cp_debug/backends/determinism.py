"""Every torch setting that can change a number: set, read back, restored."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from operator import attrgetter
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

_FP32_PRECISION = (
    "backends.cuda.matmul.fp32_precision",
    "backends.cudnn.conv.fp32_precision",
    "backends.cudnn.rnn.fp32_precision",
    "backends.mkldnn.matmul.fp32_precision",
    "backends.mkldnn.conv.fp32_precision",
    "backends.mkldnn.rnn.fp32_precision",
)
"""Settings by torch's new API alone: reading ``allow_tf32`` after both were written raises in torch."""

_FLAGS = {
    "backends.cudnn.benchmark": False,
    "backends.cudnn.deterministic": True,
    "backends.mkldnn.deterministic": True,
    "backends.cuda.matmul.allow_fp16_reduced_precision_reduction": False,
    "backends.cuda.matmul.allow_bf16_reduced_precision_reduction": False,
    "backends.cuda.matmul.allow_fp16_accumulation": False,
}

_CUBLAS = "CUBLAS_WORKSPACE_CONFIG"


@contextmanager
def deterministic(*, tf32: bool = False, seed: int = 0, as_deployed: bool = False) -> Iterator[dict[str, Any]]:
    """Run torch reproducibly, without gradients; yields the settings as read back, JSON-safe.

    ``tf32`` allows TF32 in CUDA's matrix products, convolutions and recurrent kernels; nothing else ever gets it.
    Attention runs as its plain formula, so that its inner values exist and do not depend on the kernel chosen.
    An operation without a deterministic kernel warns. ``as_deployed`` leaves both to the kernels that torch takes by
    itself: for a program of which these are what is asked about. Everything is put back on leaving, random state
    included.
    """
    with ExitStack() as stack:
        if (before := os.environ.get(_CUBLAS)) is not None:
            stack.callback(os.environ.update, {_CUBLAS: before})
        stack.callback(os.environ.pop, _CUBLAS, None)
        os.environ[_CUBLAS] = ":4096:8"
        stack.enter_context(fp32_precision(tf32))
        for name, value in _FLAGS.items():
            stack.callback(_set, name, attrgetter(name)(torch))
            _set(name, value)
        stack.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
        torch.backends.mha.set_fastpath_enabled(False)
        if not as_deployed:
            _deterministic_algorithms(stack)
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
        stack.enter_context(torch.random.fork_rng(devices))
        torch.default_generator.manual_seed(seed)
        if devices:
            torch.cuda.manual_seed_all(seed)
        stack.enter_context(torch.no_grad())
        yield read_settings() | {"seed": seed}


def read_settings() -> dict[str, Any]:
    """The settings that ``deterministic`` is about, as torch reports them now; JSON-safe."""
    settings: dict[str, Any] = {name: attrgetter(name)(torch) for name in (*_FP32_PRECISION, *_FLAGS)}
    return settings | {
        "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
        "deterministic_algorithms_warn_only": torch.is_deterministic_algorithms_warn_only_enabled(),
        "mha_fastpath": torch.backends.mha.get_fastpath_enabled(),
        "sdpa_flash": torch.backends.cuda.flash_sdp_enabled(),
        "sdpa_mem_efficient": torch.backends.cuda.mem_efficient_sdp_enabled(),
        "sdpa_cudnn": torch.backends.cuda.cudnn_sdp_enabled(),
        "sdpa_math": torch.backends.cuda.math_sdp_enabled(),
        "grad": torch.is_grad_enabled(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        _CUBLAS: os.environ.get(_CUBLAS),
    }


def _deterministic_algorithms(stack: ExitStack) -> None:
    """An operation without a deterministic kernel warns, until the stack is left."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled: the other function would import the compiler, 1.7 s
        stack.callback(torch.set_deterministic_debug_mode, torch.get_deterministic_debug_mode())
        torch.set_deterministic_debug_mode("warn")
        return
    stack.callback(
        torch.use_deterministic_algorithms,
        torch.are_deterministic_algorithms_enabled(),
        warn_only=torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True, warn_only=True)


def _set(name: str, value: Any) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(attrgetter(parent)(torch), leaf, value)


@contextmanager
def fp32_precision(tf32: bool) -> Iterator[None]:
    """Context with TF32 on or off for everything on CUDA, off for everything else; restored on leaving."""
    # Most settings follow the general one until they are written, and cuDNN's initial state cannot be written back: so
    # the general one is set, then only what does not follow it, or must not.
    general, common = "backends.fp32_precision", "tf32" if tf32 else "ieee"
    before = {name: attrgetter(name)(torch) for name in (general, *_FP32_PRECISION)}
    followers = []
    try:
        _set(general, common)
        for name in _FP32_PRECISION:
            setting = common if ".mkldnn." not in name else "ieee"
            if (current := attrgetter(name)(torch)) != setting:
                followers += [name] if current == common else []
                _set(name, setting)
        yield
    finally:
        _set(general, before[general])
        for name in followers:
            _set(name, "none")
        for name in _FP32_PRECISION:
            if attrgetter(name)(torch) != before[name]:
                _set(name, before[name])


@contextmanager
def exactly_on(device: str) -> Iterator[None]:
    """Context for an oracle on ``device``: no TF32, no gradients. A CPU needs no setting."""
    if device == "cpu":
        yield
        return
    with fp32_precision(tf32=False), torch.no_grad():
        yield
