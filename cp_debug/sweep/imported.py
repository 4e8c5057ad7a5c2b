"""Imports for which tasks of any kind would wait: torch, this project, Dask's worker, ONNX Runtime where it is."""

from __future__ import annotations

import contextlib

from cp_debug.loading import load_torch

load_torch()

import distributed  # noqa: E402, F401

from cp_debug.sweep import ablating, bisecting, evaluating, searching, sensitivity  # noqa: E402, F401

with contextlib.suppress(ImportError):
    import onnxruntime  # noqa: F401
