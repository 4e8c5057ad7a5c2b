"""ONNX operators written in torch, one file a family. Importing this package fills ``KERNELS``."""

from cp_debug.backends.kernels import (  # noqa: F401 - importing them registers their operators
    contrib,
    elementwise,
    integer,
    products,
    recurrent,
    reduction,
    sampling,
    shaping,
    windows,
)
from cp_debug.backends.kernels.registry import KERNELS, Call, OperatorKernel, kernel

__all__ = ["KERNELS", "Call", "OperatorKernel", "kernel"]
