"""Outputs that are no tensors of numbers (sequences, optionals, maps, strings), given as tensors that can be compared.

A sequence becomes its length and its elements, an optional whether it holds something and what, a map from ``ZipMap``
the tensor of its values and the keys, and strings become numbers that are equal where the strings are. Nodes that say
so are added to the graph; nothing that the network computes is changed.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from cp_debug.graph.graph import Graph, is_numeric, refill

MOST = 256
"""Elements of a sequence that are compared each by itself; of a longer one only the length is."""
_ML = "ai.onnx.ml"
_CODE_BYTES = 6
_PART = re.compile(r"(\.given|(\.value)?(\.length|\.values|\.keys|\[\d+\])|\.value)$")


def other_outputs(graph: Graph) -> list[str]:
    """Names of the outputs that are known to be no tensors of numbers, and that a node computes."""
    names = [v.name for v in graph.outputs if v.name in graph.producer and v.name in graph.types]
    return [name for name in names if name not in graph.tensors]


def as_arrays(
    graph: Graph, outputs: Mapping[str, Any], array: Callable[[Any], np.ndarray] = np.asarray
) -> dict[str, np.ndarray]:
    """A run's outputs as arrays, those that are no tensors under the names by which nodes would give their parts.

    ``outputs``: name → array of numbers or strings, a list of them, a list of maps, None for an empty optional. Shapes
    and dtypes stay, ``array`` makes them of a runtime's tensors. Of sequences longer than ``MOST`` only the length is
    given.
    """
    arrays: dict[str, np.ndarray] = {}
    for name, value in outputs.items():
        kind = graph.types.get(name)
        if kind is not None and kind.HasField("optional_type"):
            arrays[f"{name}.given"] = np.array(value is not None)
            name = f"{name}.value"
        if value is not None:
            arrays |= _parts(name, value, array)
    return arrays


def part_of(name: str) -> str:
    """The output that ``name`` is a part of, by the names that ``as_arrays`` gives."""
    return _PART.sub("", name)


def _parts(name: str, value: Any, array: Callable[[Any], np.ndarray]) -> dict[str, np.ndarray]:
    if not isinstance(value, list | tuple):
        return {name: array(value)}
    if value and isinstance(value[0], dict):  # what ``ZipMap`` gives: one map a row, all of the same keys
        keys = [[k if isinstance(k, int) else str(k) for k in each] for each in value]
        return {f"{name}.values": np.array([[*each.values()] for each in value]), f"{name}.keys": np.array(keys)}
    elements = value if len(value) <= MOST else ()
    return {
        f"{name}.length": np.array(len(value), np.int64),
        **{f"{name}[{place}]": array(element) for place, element in enumerate(elements)},
    }


def without_maps(graph: Graph) -> onnx.ModelProto | None:
    """The model with the tensors that ``ZipMap`` reads, and its keys, in place of maps; None where there are none."""
    outputs = other_outputs(graph)
    zips = [n for n in graph.nodes if n.op == f"{_ML}.ZipMap" and n.outputs[0] in outputs]
    if not zips:
        return None
    model = graph.copied()
    added: list[onnx.NodeProto] = []
    for node in zips:
        keys = node.attribute("classlabels_int64s") or list(map(_code, node.attribute("classlabels_strings", ())))
        name, tensor = node.outputs[0], numpy_helper.from_array(np.array(keys, np.int64))
        added.append(helper.make_node("Identity", [node.inputs[0]], [f"{name}.values"], name=f"{name}.values"))
        # The keys beside each value, [N, C] as these: a constant is no result of a run, and is not compared.
        added.append(helper.make_node("Constant", [], [f"{name}/keys"], name=f"{name}/keys", value=tensor))
        added.append(helper.make_node("IsNaN", [f"{name}.values"], [f"{name}/nan"], name=f"{name}/nan"))
        choice = [f"{name}/nan", f"{name}/keys", f"{name}/keys"]
        added.append(helper.make_node("Where", choice, [f"{name}.keys"], name=f"{name}.keys"))
        _replace_output(model.graph, name, {f"{name}.values": TensorProto.FLOAT, f"{name}.keys": TensorProto.INT64})
    dropped = {node.outputs[0] for node in zips}
    others = (proto for proto in model.graph.node if not dropped.intersection(proto.output))
    refill(model.graph.node, [*others, *added])
    return model


def with_tensors(model: onnx.ModelProto, graph: Graph, seen: Mapping[str, Any]) -> bool:
    """Give ``model`` tensors in place of the outputs of ``graph`` that are none; returns whether it had such.

    ``seen``: output → its value in a run: a list, an array of strings, None for an empty optional.
    """
    changed, strings = False, _strings(model.graph)
    for name in other_outputs(graph):
        if name in seen and graph.producer[name].op != f"{_ML}.ZipMap":
            nodes, types = _as_tensors(name, graph.types[name], seen[name], strings)
            model.graph.node.extend(nodes)
            _replace_output(model.graph, name, types)
            changed = True
    if any(node.domain == _ML for node in model.graph.node) and not any(o.domain == _ML for o in model.opset_import):
        model.opset_import.append(helper.make_opsetid(_ML, 3))
    return changed


def _strings(graph: onnx.GraphProto) -> set[str]:
    """The strings in the attributes of a graph's nodes: labels that a run may give, whatever this one gave."""
    lists = (a.strings for node in graph.node for a in node.attribute)
    return {text.decode(errors="surrogateescape") for texts in lists for text in texts}


def _as_tensors(
    name: str, kind: onnx.TypeProto, value: Any, known: Collection[str]
) -> tuple[list[onnx.NodeProto], dict[str, int]]:
    """Nodes that make tensors of an output, and the element types of these by name.

    ``known``: strings that have a number of their own besides those in ``value``; all others have one together.
    """

    def node(op: str, reads: Sequence[str], result: str, **attributes: Any) -> onnx.NodeProto:
        return helper.make_node(op, reads, [result], name=result, **attributes)

    if kind.HasField("optional_type"):
        inner, held = kind.optional_type.elem_type, f"{name}.value"
        given = node("OptionalHasElement", [name], f"{name}.given")
        if value is None or not is_numeric(inner):
            return [given], {f"{name}.given": TensorProto.BOOL}
        element = node("OptionalGetElement", [name], held)
        return [given, element], {f"{name}.given": TensorProto.BOOL, held: inner.tensor_type.elem_type}
    if kind.HasField("sequence_type"):
        inner, types = kind.sequence_type.elem_type, {f"{name}.length": int(TensorProto.INT64)}
        nodes = [node("SequenceLength", [name], f"{name}.length")]
        for place in range(len(value) if is_numeric(inner) and len(value) <= MOST else 0):
            constant = numpy_helper.from_array(np.int64(place))
            nodes.append(node("Constant", [], f"{name}/{place}", value=constant))
            nodes.append(node("SequenceAt", [name, f"{name}/{place}"], f"{name}[{place}]"))
            types[f"{name}[{place}]"] = inner.tensor_type.elem_type
        return nodes, types
    strings = sorted({*known, *(str(text) for text in np.asarray(value).reshape(-1))})
    codes = [_code(text) for text in strings]
    encoder = node("LabelEncoder", [name], f"{name}.codes", keys_strings=strings, values_int64s=codes, domain=_ML)
    return [encoder], {f"{name}.codes": TensorProto.INT64}


def _code(text: str | bytes) -> int:
    """A number for a string, exact in FP64, the same in every run."""
    raw = text if isinstance(text, bytes) else text.encode(errors="surrogateescape")
    return int.from_bytes(hashlib.blake2s(raw, digest_size=_CODE_BYTES).digest(), "big")


def _replace_output(graph: onnx.GraphProto, name: str, types: Mapping[str, int]) -> None:
    outputs = [v for v in graph.output if v.name != name]
    place = next(i for i, v in enumerate(graph.output) if v.name == name)
    outputs[place:place] = [helper.make_tensor_value_info(n, kind, None) for n, kind in types.items()]
    refill(graph.output, outputs)
