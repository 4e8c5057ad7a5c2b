"""Faults in an ONNX file: one layer is spoilt, and every value keeps its name.

Each function spoils the layer that makes ``value``. ``size`` is a relative size where a fault has one.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from cp_debug.errors import InputError

HALF = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}

Step = tuple[str, list[np.ndarray], dict[str, Any]]
"""An operator, its constant inputs after the first, its attributes."""


class Editor:
    """An ONNX file in memory, weights included, to be spoilt and written elsewhere."""

    def __init__(self, path: Path) -> None:
        self.model = onnx.load(str(path))
        self.graph = self.model.graph

    def node(self, value: str) -> onnx.NodeProto:
        """The node that makes ``value``. Raises InputError for a name that is no value of the graph."""
        maker = next((n for n in self.graph.node if value in n.output), None)
        if maker is None:
            raise InputError(f"no value {value!r} in this graph")
        return maker

    def weight(self, value: str, place: int = 1) -> np.ndarray | None:
        """The constant input number ``place`` of the node that makes ``value``; None where it has none.

        A copy, in the dtype and shape that the file declares.
        """
        inputs = self.node(value).input
        name = inputs[place] if place < len(inputs) else ""
        return next((numpy_helper.to_array(t).copy() for t in self.graph.initializer if t.name == name), None)

    def set_weight(self, value: str, array: np.ndarray, place: int = 1) -> None:
        """Give the node that makes ``value`` a constant of its own; others that shared the old one keep it.

        ``array`` may have any shape and dtype that the node takes.
        """
        self.node(value).input[place] = self.constant(f"{value}.{place}.spoilt", array)

    def constant(self, name: str, array: np.ndarray) -> str:
        """Add an initializer; returns its name, ``name`` or a free one.

        Dtype and shape are those of ``array``.
        """
        names_in_use = {t.name for t in self.graph.initializer}
        while name in names_in_use:
            name += "'"
        self.graph.initializer.append(numpy_helper.from_array(array, name))
        return name

    def after(self, value: str, *steps: Step) -> None:
        """Change ``value`` by some operators right where it is made, for all readers."""
        node = self.node(value)
        place = next(i for i, n in enumerate(self.graph.node) if n is node or n.output == node.output)
        current = f"{value}.unspoilt"
        node.output[list(node.output).index(value)] = current
        for number, (op, constants, attributes) in enumerate(steps):
            output_name = value if number == len(steps) - 1 else f"{value}.spoilt.{number}"
            constant_names = [self.constant(f"{output_name}.{op}.{i}", c) for i, c in enumerate(constants)]
            added = helper.make_node(
                op, [current, *constant_names], [output_name], name=f"{output_name}.{op}", **attributes
            )
            place += 1
            self.graph.node.insert(place, added)
            current = output_name

    def save(self, path: Path) -> Path:
        """Write the spoilt model, weights inside."""
        onnx.save(self.model, str(path))
        return path


def scale_weights(editor: Editor, value: str, size: float) -> None:
    """Multiply every weight by 1 + size."""
    weight = editor.weight(value)
    assert weight is not None
    editor.set_weight(value, (weight * (1 + size)).astype(weight.dtype))


def scale_channel(editor: Editor, value: str, size: float, channel: int = 0) -> None:
    """Multiply one output channel of a convolution by 1 + size."""
    weight = editor.weight(value)
    assert weight is not None
    weight[channel] *= 1 + size
    editor.set_weight(value, weight)


def scale_bias(editor: Editor, value: str, size: float, place: int = 2) -> None:
    """Multiply the bias by 1 + size."""
    bias = editor.weight(value, place)
    assert bias is not None
    editor.set_weight(value, (bias * (1 + size)).astype(bias.dtype), place)


def epsilon(editor: Editor, value: str, eps: float) -> None:
    """Give a BatchNormalization or LayerNormalization another epsilon."""
    node = editor.node(value)
    other_attributes = [a for a in node.attribute if a.name != "epsilon"]
    del node.attribute[:]
    node.attribute.extend([*other_attributes, helper.make_attribute("epsilon", eps)])


def stale_statistics(editor: Editor, value: str, size: float) -> None:
    """Let a BatchNormalization's statistics lag behind: mean + size·σ, variance × (1 + size)."""
    mean, variance = editor.weight(value, 3), editor.weight(value, 4)
    assert mean is not None
    assert variance is not None
    editor.set_weight(value, (mean + size * np.sqrt(variance)).astype(mean.dtype), 3)
    editor.set_weight(value, (variance * (1 + size)).astype(variance.dtype), 4)


def scale(editor: Editor, value: str, size: float) -> None:
    """Multiply the result by 1 + size."""
    editor.after(value, ("Mul", [np.array(1 + size, np.float32)], {}))


def add(editor: Editor, value: str, error: np.ndarray | float) -> None:
    """Add ``error`` to the result, a number or one for each element.

    ``error`` is taken as float32 and broadcasts to the result.
    """
    editor.after(value, ("Add", [np.array(error, np.float32)], {}))


def clip(editor: Editor, value: str, limit: float) -> None:
    """Saturate the result at ±limit."""
    editor.after(value, ("Clip", [np.array(-limit, np.float32), np.array(limit, np.float32)], {}))


def shift_padding(editor: Editor, value: str) -> None:
    """Let a convolution or pooling pad all on the low side: the map moves by the padding."""
    node = editor.node(value)
    pads = next(a for a in node.attribute if a.name == "pads")
    low, high = np.split(np.array(pads.ints), 2)
    pads.ints[:] = [*(low + high).tolist(), *(0 * high).tolist()]


def drop(editor: Editor, value: str) -> None:
    """Leave the operator out: its first input passes unchanged."""
    node = editor.node(value)
    del node.input[1:], node.attribute[:]
    node.op_type, node.domain = "Identity", ""


def swap_channels(editor: Editor, value: str, order: Sequence[int], axis: int = 1) -> None:
    """Put the result's channels in another order."""
    editor.after(value, ("Gather", [np.array(order, np.int64)], {"axis": axis}))


def scramble(editor: Editor, value: str, shape: Sequence[int]) -> None:
    """Transpose the last two axes, then reshape to the shape that the reader expects."""
    axes = [*range(len(shape) - 2), len(shape) - 1, len(shape) - 2]
    editor.after(value, ("Transpose", [], {"perm": axes}), ("Reshape", [np.array(shape, np.int64)], {}))


def store_as(editor: Editor, value: str, precision: str) -> None:
    """Store the result in FP16 or BF16 (``HALF``) and read it back."""
    editor.after(value, ("Cast", [], {"to": HALF[precision]}), ("Cast", [], {"to": TensorProto.FLOAT}))


def quantize(editor: Editor, value: str, largest: float) -> None:
    """Pass the result through an INT8 quantizer that saturates at ±largest."""
    parameters: list[np.ndarray] = [np.array(largest / 127, np.float32), np.array(0, np.int8)]
    editor.after(value, ("QuantizeLinear", parameters, {}), ("DequantizeLinear", parameters, {}))


def zero_times_infinity(editor: Editor, value: str) -> None:
    """Multiply the result by an Inf: zeros become NaN, the rest Inf."""
    editor.after(value, ("Mul", [np.array(np.inf, np.float32)], {}))


def rescale(editor: Editor, value: str, reader: str, factor: float) -> None:
    """Multiply one layer by ``factor`` and divide the layer that makes ``reader`` by it.

    With a power of two the function stays the same in FP32, bit for bit, when everything between is homogeneous (ReLU,
    pooling).
    """
    scale_weights(editor, value, factor - 1)
    if editor.weight(value, 2) is not None:
        scale_bias(editor, value, factor - 1)
    scale_weights(editor, reader, 1 / factor - 1)
