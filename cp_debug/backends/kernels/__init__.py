"""ONNX operators written in torch, one file a family. Importing this package fills ``KERNELS``."""

from cp_debug.backends.kernels import (
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
    resize,
    shaping,
)
from cp_debug.backends.kernels.registry import KERNELS, Call, Kernel, kernel

__all__ = [
    "KERNELS",
    "Call",
    "Kernel",
    "activation",
    "attention",
    "contrib",
    "convolution",
    "creation",
    "elementwise",
    "indexing",
    "integer",
    "kernel",
    "matmul",
    "normalization",
    "pooling",
    "quantization",
    "recurrent",
    "reduction",
    "resize",
    "shaping",
]
