"""Layers of a graph in FP8, block-scaled types and INT4: weights in codes, scales of data, and the same emulated."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from onnx import TensorProto
from torch import Tensor

from cp_debug.backends.arithmetic import Arithmetic, narrow_arithmetic
from cp_debug.backends.executor import Executor
from cp_debug.backends.narrow_options import NarrowOptions
from cp_debug.backends.scaling import (
    E2M1,
    E4M3,
    MX_BLOCK,
    NVFP4_BLOCK,
    Axes,
    FixedScaling,
    Scaling,
    axes_of,
    int4_levels,
)
from cp_debug.errors import InputError
from cp_debug.graph.graph import Graph, Node
from cp_debug.graph.narrow_qdq import DataCodes, NarrowLayer, StoredWeight
from cp_debug.graph.qdq import quantizable
from cp_debug.quantization.onnx_ptq import weight_of

_KINDS = {"e4m3": TensorProto.FLOAT8E4M3FN, "e5m2": TensorProto.FLOAT8E5M2, "e2m1": TensorProto.FLOAT4E2M1}
_BLOCKS = {"mxfp8": MX_BLOCK, "mxfp4": MX_BLOCK, "nvfp4": NVFP4_BLOCK}
_RULES = {"mxfp8": "mx", "mxfp4": "mx", "nvfp4": "nvfp4"}


@dataclass(frozen=True)
class NarrowLayers:
    """Layers of one graph in a narrow precision."""

    options: NarrowOptions
    layers: Mapping[str, NarrowLayer]
    """Node → its weight in codes, and how its data is encoded."""
    left_out: Mapping[str, str]
    """Layer that stays in FP32 → the reason."""

    def emulated(self) -> dict[str, Arithmetic]:
        """Node → the arithmetic in which the same layer of the FP32 graph gives what the Q/DQ nodes give."""
        plain = narrow_arithmetic(self.options)
        fixed = {
            name: replace(plain, scaling=FixedScaling(self.options, (layer.data.scale, None)))
            for name, layer in self.layers.items()
            if layer.data is not None and layer.data.scale is not None
        }
        return dict.fromkeys(self.layers, plain) | fixed


def check_exportable(options: NarrowOptions) -> None:
    """Raise InputError for options that no Q/DQ node can say: how sums are taken, and the type between layers."""
    if options.significant is not None or options.half_sum or options.out != "fp32":
        raise InputError(
            f"--precision: {options}: a file cannot set accumulation or the type of other values; remove acc=, round=, "
            "promote= and out="
        )


def opset_of(options: NarrowOptions) -> int:
    """The oldest ONNX opset that can say it: FP8 19, INT4 and blocks 21, FLOAT4E2M1 23."""
    if options.family in ("mxfp4", "nvfp4"):
        return 23
    return 19 if options.family == "fp8" and options.granularity == "tensor" else 21


def calibrated(options: NarrowOptions) -> bool:
    """Whether some layers have constant scales for their data, which are found on samples."""
    return options.family == "nvfp4" or (options.family == "fp8" and options.granularity != "block")


def narrow_layers(
    graph: Graph, options: NarrowOptions, amax: Mapping[str, float], chosen: Collection[str] | None = None
) -> NarrowLayers:
    """Layers of ``graph`` in a precision: those with a weight, or the ``chosen`` ones of them (nodes by name).

    ``amax``: node → largest magnitude of its data, for layers whose data has a constant scale. INT4 takes MatMul and
    Gemm only. Raises InputError where a weight holds NaN or Inf.
    """
    executor, layers, left_out = Executor(graph, weight_cache=0), dict[str, NarrowLayer](), dict[str, str]()
    for node in quantizable(graph):
        if chosen is not None and node.name not in chosen:
            continue
        if options.family == "int4" and node.op not in ("MatMul", "Gemm"):
            left_out[node.name] = f"{node.op} has no INT4"
            continue
        weight = torch.as_tensor(weight_of(node, executor)).float()
        if why := _unsuited(node, weight, options):
            left_out[node.name] = why
            continue
        if not bool(weight.isfinite().all()):
            kind = "NaN" if bool(weight.isnan().any()) else "Inf"
            raise InputError(f"{graph}: node {node.name!r}: its weight {node.proto.input[1]!r} holds {kind}")
        layers[node.name] = NarrowLayer(
            _stored(weight, axes_of(node)[1], options), _data(node, weight, options, amax.get(node.name))
        )
    return NarrowLayers(options, layers, left_out)


def _unsuited(node: Node, weight: Tensor, options: NarrowOptions) -> str:
    if weight.dim() < 2:
        return "its weight is not a matrix"
    groups, channels = node.attribute("group", 1), _channels(node, weight)
    block = _block(options)
    if groups > 1 and block and channels > block and channels % block:
        return f"groups of {channels} channels are not a multiple of a block of {block}"
    transposed = node.op == "ConvTranspose" and groups > 1 and options.granularity == "channel"
    return "ONNX has no scale for each output channel of a grouped ConvTranspose" if transposed else ""


def _channels(node: Node, weight: Tensor) -> int:
    """Input channels of one group."""
    if node.op == "ConvTranspose":
        return weight.shape[0] // node.attribute("group", 1)
    return weight.shape[axes_of(node)[1].reduced]


def _block(options: NarrowOptions) -> int:
    """Length of the blocks of data; 0: it has one scale."""
    return Scaling(options).segment or _BLOCKS.get(options.family, 0)


def _data(node: Node, weight: Tensor, options: NarrowOptions, amax: float | None) -> DataCodes | None:
    if options.family == "int4":
        return None
    codec = Scaling(options).codec
    assert codec is not None
    kind, convolves = _KINDS[codec.name], node.op in ("Conv", "ConvTranspose")
    channels = _channels(node, weight)
    rule = _RULES.get(options.family, "amax") + ("-up" if options.scale_up else "")
    size = channels * node.attribute("group", 1) if convolves else channels
    axis = 1 if convolves else 0 if node.attribute("transA", 0) else -1
    rows = options.family == "fp8" and options.granularity == "channel" and not convolves
    block = channels if rows else min(_block(options), channels)
    if block and options.family != "nvfp4":
        return DataCodes(kind, rule, None, axis, size, block)  # type: ignore[arg-type]
    if amax is None:
        raise InputError(f"node {node.name!r}: there is no calibrated range for its data")
    largest = E4M3.largest * E2M1.largest if options.family == "nvfp4" else codec.largest
    scale = float(np.float32(amax) / np.float32(largest)) or 1.0
    if not block:
        return DataCodes(kind, "amax", scale)
    return DataCodes(kind, "nvfp4", scale, axis, size, block)


def _stored(weight: Tensor, axes: Axes, options: NarrowOptions) -> StoredWeight:
    reduced, rank = axes.reduced % weight.dim(), weight.dim()
    kept = None if axes.kept is None else axes.kept % rank
    size = weight.shape[reduced]
    if options.family == "int4":
        return _int4(weight, axes, options, reduced)
    encoded = Scaling(options).encode(weight, axes, 1)
    codec = Scaling(options).codec
    assert codec is not None
    kind, codes = _KINDS[codec.name], encoded.codes.numpy()
    if encoded.fine is not None:
        block = min(_block(options), size)
        fine = _first_of_blocks(torch.where(encoded.fine > 0, encoded.fine, 1.0), reduced, block)
        coarse = float(encoded.coarse) if options.family == "nvfp4" else None
        return StoredWeight(kind, codes, fine, reduced, block, coarse=coarse)
    if encoded.coarse.dim() == 0:
        return StoredWeight(kind, codes, encoded.coarse.numpy())
    if rank == 2 or encoded.coarse.numel() == weight.shape[kept or 0]:
        return StoredWeight(kind, codes, encoded.coarse.flatten().numpy(), kept or 0)
    return StoredWeight(kind, codes, encoded.coarse.numpy(), reduced, size)  # a matrix of a batch has its own


def _int4(weight: Tensor, axes: Axes, options: NarrowOptions, reduced: int) -> StoredWeight:
    block = min(options.group, weight.shape[reduced])
    levels, zero, scale = int4_levels(weight, axes, options)
    if options.symmetric:
        scales = _first_of_blocks(torch.where(scale > 0, scale, 1.0), reduced, block)
        return StoredWeight(TensorProto.INT4, levels.numpy(), scales, reduced, block)
    if not options.asymmetric:  # a scale below 0 becomes one above it, with levels mirrored: -8 … 7 is 15 … 0 then
        levels, zero = torch.where(scale < 0, 7 - levels, levels + 8), torch.where(scale < 0, 7.0, 8.0)
        scale = scale.abs()
    scales, zeros = (
        _first_of_blocks(part, reduced, block) for part in (torch.where(scale > 0, scale, 1.0), zero.expand_as(levels))
    )
    empty = scale == 0
    levels = torch.where(empty, zero, levels)
    return StoredWeight(TensorProto.UINT4, levels.numpy(), scales, reduced, block, zeros)


def _first_of_blocks(spread: Tensor, axis: int, block: int) -> np.ndarray:
    """Numbers that all elements of a block share, once for each block of ``axis``."""
    return spread.index_select(axis, torch.arange(0, spread.shape[axis], block)).contiguous().numpy()


def weighted_layers(graph: Graph, options: NarrowOptions) -> Iterator[Node]:
    """Nodes of ``graph`` that ``narrow_layers`` may take."""
    return (n for n in quantizable(graph) if options.family != "int4" or n.op in ("MatMul", "Gemm"))
