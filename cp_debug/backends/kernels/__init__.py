"""ONNX operators written in torch, one file a family. Importing this package fills ``KERNELS``."""

from cp_debug.backends.kernels import (
    activation,
    contrib,
    convolution,
    creation,
    elementwise,
    indexing,
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
    "contrib",
    "convolution",
    "creation",
    "elementwise",
    "indexing",
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
