"""ONNX operators written in torch, one file a family. Importing this package fills ``KERNELS``."""

from cp_debug.backends.kernels import (  # noqa: F401 - importing them registers their operators
    activation,
    attention,
    contrib,
    convolution,
    creation,
    elementwise,
    indexing,
    integer,
    matmul,
    normalization,
    pooling,
    quantization,
    recurrent,
    reduction,
    regions,
    resize,
    shaping,
    signal,
)
from cp_debug.backends.kernels.registry import KERNELS, Call, OperatorKernel, kernel

__all__ = ["KERNELS", "Call", "OperatorKernel", "kernel"]
