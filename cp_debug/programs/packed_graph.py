"""A graph whose weights are levels again, as the folder behind it stores them: what was exported has them in floats."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from onnx import TensorProto

from cp_debug.backends.base import Program
from cp_debug.graph.constants import Constants
from cp_debug.graph.graph import Graph
from cp_debug.graph.narrow_qdq import NarrowLayer, StoredWeight, insert_narrow_qdq
from cp_debug.recipes.packed_weights import PackedWeight


def with_levels(program: Program, packed: Mapping[str, PackedWeight], folder: Path) -> Program:
    """``program`` with the weights of ``packed`` as levels behind DequantizeLinear; the numbers stay, bit for bit.

    Weights are recognized in the graph by what they hold. Those that are not there (fused with others, or read by no
    ``MatMul`` or ``Gemm``) stay in floats. The graph is written to ``folder``, and its nodes and values keep their
    names.
    """
    found = dict(_layers(program.graph, packed))
    if not found:
        return program
    path = insert_narrow_qdq(program.graph, found, folder / f"{program.name}.levels.onnx", "levels in groups")
    return program.rewritten(Graph(path, source=program.graph))


def _layers(graph: Graph, packed: Mapping[str, PackedWeight]) -> list[tuple[str, NarrowLayer]]:
    constants = Constants(graph)
    shapes = {weight.levels.shape for weight in packed.values()}
    by_contents: dict[bytes, PackedWeight] = {}
    for weight in packed.values():
        by_contents.setdefault(weight.weight().tobytes(), weight)
    layers = []
    for node in graph.nodes:
        name = node.proto.input[1] if node.op in ("MatMul", "Gemm") and len(node.proto.input) > 1 else ""
        if name not in constants:
            continue
        turned = bool(node.attribute("transB", 0))
        array = constants[name]
        if array.ndim != 2 or (array.T if turned else array).shape not in shapes or array.dtype != np.float32:
            continue
        found = by_contents.get(np.ascontiguousarray(array if turned else array.T).tobytes())
        if found is not None:
            layers.append((node.name, NarrowLayer(stored(found, turned=turned), None)))
    return layers


def stored(weight: PackedWeight, *, turned: bool) -> StoredWeight:
    """The weight as DequantizeLinear has it, [inputs, outputs] or ``turned``, in blocks of inputs.

    Groups whose inputs do not stand together are put together, each filled up to the length of the longest with levels
    that stand for 0; ``order`` says where each input went.
    """
    counts = np.bincount(weight.groups, minlength=len(weight.scale))
    block = int(counts.max())
    inputs = len(weight.groups)
    order = None
    if (weight.groups != np.arange(inputs) // block).any():
        sequence = np.argsort(weight.groups, kind="stable")
        starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
        order = np.empty(inputs, np.int64)
        order[sequence] = np.arange(inputs) - starts[weight.groups[sequence]] + weight.groups[sequence] * block
    levels, zero, scale = weight.levels, weight.zero, weight.scale
    if order is not None:
        levels = np.repeat(zero, block, axis=0).astype(np.uint8)
        levels[order] = weight.levels
    # Types of 4 bits allow no scale below 0, which some quantizers make.
    kind = TensorProto.UINT4 if weight.bits == 4 and (scale > 0).all() else TensorProto.UINT8
    parts = [np.ascontiguousarray(part.T) if turned else part for part in (levels, scale, zero)]
    return StoredWeight(kind, parts[0], parts[1], int(turned), block, parts[2], bits=weight.bits, order=order)
