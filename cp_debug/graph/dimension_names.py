"""Names of an ONNX file's input dimensions, told apart where one name stands for different sizes.

Converters write ``?`` or ``None`` for every dimension that they do not know. ONNX Runtime takes no notice; TensorRT
refuses the file, as a name is one size there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from cp_debug.graph.graph import Graph
from cp_debug.graph.surgery import save

Shapes = Sequence[Sequence[int]]
"""Shapes that one input takes, the smallest and the largest for instance."""


def tell_apart(graph: Graph, shapes: Mapping[str, Shapes], path: Path) -> Path:
    """The graph's file, or a copy at ``path`` where an input's dimension has another size than another of its name.

    ``shapes``: input → the shapes that it takes; inputs that it lacks are left alone.
    """
    sizes: dict[str, set[tuple[int, ...]]] = {}
    named = [
        (value.name, axis, dim.dim_param, tuple(int(shape[axis]) for shape in shapes[value.name]))
        for value in graph.proto.graph.input
        if value.name in shapes
        for axis, dim in enumerate(value.type.tensor_type.shape.dim)
        if dim.dim_param and all(axis < len(shape) for shape in shapes[value.name])
    ]
    for _, _, name, size in named:
        sizes.setdefault(name, set()).add(size)
    ambiguous = {(value, axis) for value, axis, name, _ in named if len(sizes[name]) > 1}
    if not ambiguous:
        return graph.path
    model = graph.copied()
    for value in model.graph.input:
        for axis, dim in enumerate(value.type.tensor_type.shape.dim):
            if (value.name, axis) in ambiguous:
                dim.dim_param = f"{value.name}.{axis}"
    for value in (*model.graph.output, *model.graph.value_info):  # inferred with the names as they were
        for dim in value.type.tensor_type.shape.dim:
            if len(sizes.get(dim.dim_param, ())) > 1:
                dim.ClearField("dim_param")
    save(model, graph, path)
    return path
