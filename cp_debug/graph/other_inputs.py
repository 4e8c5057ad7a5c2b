"""Inputs that are no tensors of numbers (strings, sequences, optionals, maps), given as arrays of a plain file.

An input ``s`` is given as follows, and results of these types are called alike:

- strings: an array of them, ``s``;
- a sequence: its elements, ``s[0]``, ``s[1]`` …; an empty one: ``s.length``, which is 0;
- an optional: what it holds, ``s.value``; an empty one: ``s.given``, which is false;
- a map: ``s.keys`` and ``s.values``, of one length.

A graph is made to read them: it takes tensors of numbers, and nodes in front of the others make the sequence, the
optional or the map's vector of them. Strings come as their numbers in a table that the graph holds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from cp_debug.errors import InputError
from cp_debug.graph.graph import Graph, Node, is_numeric, readers, refill
from cp_debug.graph.operators import MOVERS

Given = Mapping[str, np.ndarray]

LONGEST = 4096
"""Largest number of elements of a sequence that is given."""
_ML = "ai.onnx.ml"
_MAP_READERS = (f"{_ML}.DictVectorizer", f"{_ML}.CastMap")


def other_inputs(graph: Graph) -> dict[str, onnx.TypeProto]:
    """Input → its ONNX type, for those that are no tensors of numbers."""
    inputs = {v.name for v in graph.inputs}
    kinds = {v.name: v.type for v in graph.proto.graph.input if v.name in inputs and v.type.WhichOneof("value")}
    return {name: kind for name, kind in kinds.items() if not is_numeric(kind)}


def check_other(name: str, kind: onnx.TypeProto, given: Given, source: str) -> set[str]:
    """The names in ``given`` under which input ``name`` stands there.

    Raises InputError, starting with ``source``, where it does not stand there as its type wants it.
    """
    return set(_checked(name, kind, given, f"{source}: input {name!r} is {_in_words(kind)}"))


def of_objects(name: str, kind: onnx.TypeProto, value: Any) -> dict[str, Any]:
    """An input as a Python program holds it, under the names of a file: lists, None, mappings, strings.

    ``name.value`` and its like, where they are given already, are left to the caller. Arrays come unchanged.
    """
    if kind.HasField("sequence_type") and isinstance(value, (list, tuple)):
        parts: dict[str, Any] = {} if value else {f"{name}.length": np.int64(0)}
        for place, each in enumerate(value):
            parts |= of_objects(f"{name}[{place}]", kind.sequence_type.elem_type, each)
        return parts
    if kind.HasField("optional_type"):
        if value is None:
            return {f"{name}.given": np.bool_(False)}
        return of_objects(f"{name}.value", kind.optional_type.elem_type, value)
    if kind.HasField("map_type") and isinstance(value, Mapping):
        element = kind.map_type.value_type.tensor_type.elem_type
        values = np.array([*value.values()], None if element == TensorProto.STRING else _dtype(element))
        keys = np.array([*value], None if kind.map_type.key_type == TensorProto.STRING else np.int64)
        return {f"{name}.keys": keys, f"{name}.values": values}
    if kind.tensor_type.elem_type == TensorProto.STRING:
        array = np.asarray(value)
        return {name: array.astype(str) if array.dtype == object else array}
    return {name: value}


def _dtype(element: int) -> np.dtype:
    try:
        return helper.tensor_dtype_to_np_dtype(element)
    except KeyError:
        raise InputError(f"an input has elements of the type {element}, which ONNX does not have") from None


def _checked(name: str, kind: onnx.TypeProto, given: Given, text: str) -> Iterator[str]:
    if kind.HasField("map_type"):
        keys, values = f"{name}.keys", f"{name}.values"
        pair = [given[key] for key in (keys, values) if key in given]
        if len(pair) < 2 or any(array.ndim != 1 for array in pair) or len({array.size for array in pair}) > 1:
            raise InputError(f"{text}; expected {keys!r} and {values!r}, two arrays [N]")
        if (map_keys := [*map(str, pair[0])]) and len(set(map_keys)) < len(map_keys):
            raise InputError(f"{text}; {keys!r} holds a key twice")
        _check_type(keys, pair[0], kind.map_type.key_type, text)
        _check_type(values, pair[1], kind.map_type.value_type.tensor_type.elem_type, text)
        yield from (keys, values)
    elif kind.HasField("sequence_type"):
        count = _length(name, kind, given)
        if f"{name}.length" in given:
            yield f"{name}.length"
            if given[f"{name}.length"].size != 1 or int(given[f"{name}.length"].reshape(())) != count:
                raise InputError(f"{text}; {name}.length is {given[f'{name}.length']}, and {count} elements are given")
        elif not count:
            raise InputError(f"{text}; expected its elements, '{name}[0]', '{name}[1]' …, or '{name}.length' of 0")
        for place in range(count):
            yield from _checked(f"{name}[{place}]", kind.sequence_type.elem_type, given, text)
    elif kind.HasField("optional_type"):
        if f"{name}.given" in given:
            yield f"{name}.given"
            if given[f"{name}.given"].size == 1 and not given[f"{name}.given"].reshape(()):
                return
        elif not any(key.startswith(f"{name}.value") for key in given):
            raise InputError(f"{text}; expected '{name}.value', or '{name}.given', which is false for an empty one")
        yield from _checked(f"{name}.value", kind.optional_type.elem_type, given, text)
    else:
        if name not in given:
            raise InputError(f"{text}; {name!r} is missing")
        _check_type(name, given[name], kind.tensor_type.elem_type, text)
        yield name


def _check_type(name: str, array: np.ndarray, element: int, text: str) -> None:
    strings = array.dtype.kind in "USO"
    if element == TensorProto.STRING:
        if not strings:
            raise InputError(f"{text}; {name!r} holds {array.dtype}")
    elif strings or array.dtype != _dtype(element):
        expected = TensorProto.DataType.Name(element).lower()
        raise InputError(f"{text}; {name!r} is {'strings' if strings else array.dtype}; expected {expected}")


def with_tensor_inputs(graph: Graph, samples: Sequence[Given], names: Mapping[str, str] | None = None) -> TensorInputs:
    """The model that takes tensors of numbers in place of other inputs, for samples that ``check_other`` lets pass.

    ``names``: input of the graph → its name in the samples, where that differs. Raises InputError where samples differ
    in the length of a sequence, in whether an optional is given, or in the keys of a map, and for a map that is read
    by something else than ``DictVectorizer`` and ``CastMap``.
    """
    made = TensorInputs(graph.copied())
    front: list[onnx.NodeProto] = []
    inputs: list[onnx.ValueInfoProto] = []
    others = other_inputs(graph)
    for value in made.model.graph.input:
        if (kind := others.get(value.name)) is None:
            inputs.append(value)
            continue
        stands_as = (names or {}).get(value.name, value.name)
        start = _Start(graph, made, samples, stands_as, value.name)
        if kind.HasField("map_type"):
            start.map(kind)
        else:
            start.make(value.name, stands_as, kind)
        front += start.nodes
        inputs += start.inputs
    nodes = (made.replaced.get(node.output[0] if node.output else "", node) for node in made.model.graph.node)
    refill(made.model.graph.input, inputs)
    refill(made.model.graph.node, [*front, *nodes])
    return made


@dataclass
class TensorInputs:
    """A model whose inputs are tensors of numbers, and what these are in the samples."""

    model: onnx.ModelProto
    tables: dict[str, tuple[str, list[str]]] = field(default_factory=dict)
    """Input of numbers → name of the array of strings, and the table of these."""
    plain: dict[str, str] = field(default_factory=dict)
    """Input → name of the array in a sample, which is given as it is."""
    keys: dict[str, np.ndarray] = field(default_factory=dict)
    """Name of the array of a map's keys → these."""
    replaced: dict[str, onnx.NodeProto] = field(default_factory=dict)
    """First output of a node of the file → what stands in its place."""

    def of(self, sample: Given) -> dict[str, np.ndarray]:
        """The arrays of a sample as the model takes them: strings as int64, all others unchanged."""
        own = set(self.plain.values()) | {name for name, _ in self.tables.values()}
        taken = {v.name for v in self.model.graph.input}
        arrays = {name: array for name, array in sample.items() if name in taken and name not in own}
        arrays |= {name: sample[there] for name, there in self.plain.items()}
        for name, (there, table) in self.tables.items():
            number = {text: place for place, text in enumerate(table)}
            codes = [number[text] for text in _texts(sample[there])]
            arrays[name] = np.array(codes, np.int64).reshape(sample[there].shape)
        return arrays

    def sample(self, arrays: Given) -> dict[str, np.ndarray]:
        """The sample of which ``of`` makes these arrays: int64 becomes strings, other dtypes and all shapes stay."""
        back = {there: arrays[name] for name, there in self.plain.items()}
        for name, (there, table) in self.tables.items():
            back[there] = np.array(table)[arrays[name]]
        return {n: a for n, a in arrays.items() if n not in self.plain and n not in self.tables} | back | self.keys


class _Start:
    """Nodes and inputs that make one other input."""

    def __init__(self, graph: Graph, made: TensorInputs, samples: Sequence[Given], name: str, value: str) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self._graph, self._made, self._samples, self._name, self._value = graph, made, samples, name, value

    def make(self, value: str, there: str, kind: onnx.TypeProto) -> None:
        """Have ``value`` computed of what stands as ``there`` in the samples."""
        if kind.HasField("sequence_type"):
            inner = kind.sequence_type.elem_type
            count = self._same([_length(there, kind, sample) for sample in self._samples], "length", "elements")
            parts = [f"{value}[{place}]" for place in range(count)]
            for place, part in enumerate(parts):
                self.make(part, f"{there}[{place}]", inner)
            if parts:
                self._node("SequenceConstruct", parts, value)
            else:
                self._node("SequenceEmpty", [], value, dtype=inner.tensor_type.elem_type)
        elif kind.HasField("optional_type"):
            inner = kind.optional_type.elem_type
            if self._same([_is_given(there, sample) for sample in self._samples], "presence", "(given or not)"):
                self.make(f"{value}.value", f"{there}.value", inner)
                self._node("Optional", [f"{value}.value"], value)
            else:
                self._node("Optional", [], value, type=inner)
        else:
            self._tensor(value, there, kind.tensor_type)

    def map(self, kind: onnx.TypeProto) -> None:
        """Have the readers of a map replaced by nodes that compute the same of its values."""
        keys, there = f"{self._name}.keys", f"{self._name}.values"
        first = [*_keys(self._samples[0][keys])]
        self._made.keys[keys] = self._samples[0][keys]
        self._same([str(_keys(sample[keys])) for sample in self._samples], "keys", "")
        # In the first sample's order: another sample that has them in another one is refused above.
        values, element = f"{self._value}.values", kind.map_type.value_type.tensor_type.elem_type
        self._tensor(values, there, helper.make_tensor_type_proto(element, [len(first)]).tensor_type)
        nothing = helper.make_tensor(f"{values}/0", element, [1], [b"" if element == TensorProto.STRING else 0])
        self._made.model.graph.initializer.append(nothing)
        self._node("Concat", [values, nothing.name], f"{values}/all", axis=0)
        for node in self._graph.consumers.get(self._value, []):
            if node.op not in _MAP_READERS or len(node.inputs) != 1:
                raise InputError(
                    f"{self._graph}: input {self._value!r} is a map, which {node.name!r} ({node.op}) reads; "
                    f"expected {' or '.join(name.partition('ml.')[2] for name in _MAP_READERS)} alone"
                )
            self._vector(node, first, f"{values}/all", element)

    def _vector(self, node: Node, keys: list[Any], values: str, element: int) -> None:
        if node.op == f"{_ML}.DictVectorizer":
            wanted = _vocabulary(node)
        elif node.attribute("map_form") == b"SPARSE":
            wanted = [*range(node.attribute("max_map", 1))]
        else:
            wanted = sorted(keys)
        places = np.array([keys.index(key) if key in keys else len(keys) for key in wanted], np.int64)
        result = node.outputs[0]
        constants = {f"{result}/places": places, f"{result}/shape": np.array([1, len(wanted)], np.int64)}
        self._made.model.graph.initializer.extend(numpy_helper.from_array(a, n) for n, a in constants.items())
        self._node("Gather", [values, f"{result}/places"], f"{result}/chosen")
        to = {b"TO_STRING": TensorProto.STRING, b"TO_INT64": TensorProto.INT64}.get(
            node.attribute("cast_to"), TensorProto.FLOAT
        )
        if node.op == f"{_ML}.CastMap" and to != element:
            self._node("Cast", [f"{result}/chosen"], f"{result}/cast", to=to)
        chosen = self.nodes[-1].output[0]
        self._made.replaced[result] = helper.make_node(
            "Reshape", [chosen, f"{result}/shape"], [result], name=node.proto.name
        )

    def _tensor(self, value: str, there: str, kind: onnx.TypeProto.Tensor) -> None:
        if kind.elem_type != TensorProto.STRING:
            self._input(value, kind)
            self._made.plain[value] = there
            return
        table = sorted({text for sample in self._samples for text in _texts(sample[there])}) or [""]
        coded = onnx.TypeProto.Tensor()
        coded.CopyFrom(kind)
        coded.elem_type = TensorProto.INT64
        self._input(f"{value}.codes", coded)
        self._made.tables[f"{value}.codes"] = there, table
        encoded = [text.encode(errors="surrogateescape") for text in table]
        strings = helper.make_tensor(f"{value}.strings", TensorProto.STRING, [len(table)], encoded)
        self._made.model.graph.initializer.append(strings)
        self._node("Gather", [strings.name, f"{value}.codes"], value)

    def _input(self, name: str, kind: onnx.TypeProto.Tensor) -> None:
        self.inputs.append(onnx.ValueInfoProto(name=name, type=onnx.TypeProto(tensor_type=kind)))

    def _node(self, op: str, reads: Sequence[str], result: str, **attributes: Any) -> None:
        self.nodes.append(helper.make_node(op, reads, [result], name=f"{result}/{op}", **attributes))

    def _same(self, of_samples: list[Any], what: str, many: str) -> Any:
        if any(each != of_samples[0] for each in of_samples):
            place = next(i for i, each in enumerate(of_samples) if each != of_samples[0])
            differ = f"{of_samples[0]} and {of_samples[place]} {many}".strip()
            raise InputError(
                f"--inputs: samples 0 and {place} differ in the {what} of {self._name!r}, {differ}; "
                "expected samples of one structure: give the others in a separate run"
            )
        return of_samples[0]


def _vocabulary(node: Node) -> list[Any]:
    """The keys of a map that a DictVectorizer knows."""
    texts = node.attribute("string_vocabulary", ())
    return [text.decode() for text in texts] or [*node.attribute("int64_vocabulary", ())]


def _length(name: str, kind: onnx.TypeProto, given: Given) -> int:
    """Number of the elements of a sequence that are given."""
    inner = kind.sequence_type.elem_type
    ends = [""] if inner.HasField("tensor_type") else [".value", ".given", ".values", "[0]", ".length"]
    for place in range(LONGEST):
        if not any(f"{name}[{place}]{end}" in given for end in ends):
            return place
    return LONGEST


def _is_given(name: str, sample: Given) -> bool:
    flag = sample.get(f"{name}.given")
    return flag is None or bool(flag.reshape(()))


def _keys(array: np.ndarray) -> list[Any]:
    return _texts(array) if array.dtype.kind in "USO" else [int(key) for key in array]


def _texts(array: np.ndarray) -> list[str]:
    flat = array.reshape(-1)
    return [each.decode(errors="surrogateescape") if isinstance(each, bytes) else str(each) for each in flat]


def _in_words(kind: onnx.TypeProto) -> str:
    """Type in words: ``a sequence of strings``."""
    if kind.HasField("sequence_type"):
        return f"a sequence of {_in_words(kind.sequence_type.elem_type).removeprefix('a tensor of ')}"
    if kind.HasField("optional_type"):
        return f"an optional {_in_words(kind.optional_type.elem_type).removeprefix('a ')}"
    if kind.HasField("map_type"):
        return "a map"
    name = TensorProto.DataType.Name(kind.tensor_type.elem_type).lower()
    return "strings" if name == "string" else f"a tensor of {name}"


def made_up_structure(graph: Graph) -> list[Given]:
    """Samples with the structure that other inputs are given when nobody gave any: a sequence holds two elements.

    Their strings are those that the graph's operators know. Arrays are empty but for keys and strings.
    """
    sample: dict[str, np.ndarray] = {}
    for name, kind in other_inputs(graph).items():
        sample |= dict(_example(graph, name, name, kind))
    return [sample]


def _example(graph: Graph, value: str, name: str, kind: onnx.TypeProto) -> Iterator[tuple[str, np.ndarray]]:
    if kind.HasField("map_type"):
        keys: list[Any] = []
        for node in graph.consumers.get(value, []):
            keys += [*_vocabulary(node), *range(node.attribute("max_map", 0))]
        strings = kind.map_type.key_type == TensorProto.STRING
        keys = [*dict.fromkeys(keys)] or (["a", "b", "c"] if strings else [0, 1, 2])
        element = kind.map_type.value_type.tensor_type.elem_type
        yield f"{name}.keys", np.array(keys, None if strings else np.int64)
        yield f"{name}.values", _filled(graph, value, element, len(keys))
    elif kind.HasField("sequence_type"):
        for place in range(2):
            yield from _example(graph, value, f"{name}[{place}]", kind.sequence_type.elem_type)
    elif kind.HasField("optional_type"):
        yield from _example(graph, value, f"{name}.value", kind.optional_type.elem_type)
    else:
        yield name, _filled(graph, value, kind.tensor_type.elem_type, 1)


def _filled(graph: Graph, value: str, element: int, count: int) -> np.ndarray:
    if element == TensorProto.STRING:
        return np.array(_known_strings(graph, value))
    return np.zeros(count, _dtype(element))


_WORDS = ("the", "quick brown fox", "jumps over", "a", "lazy dog", "Zürich", "12")
_NUMBERS = ("0", "1", "2", "10", "-3", "0.5")
_PASS_ON = MOVERS | {"OptionalGetElement", "SequenceAt", "StringNormalizer", "Where"}


def _known_strings(graph: Graph, value: str) -> list[str]:
    """Strings that the readers of an input can take: those in their attributes, numbers for a Cast, else words."""
    known: dict[str, None] = {}
    for node, _ in readers(graph, value, lambda node, _: node.op in _PASS_ON):
        if node.op == "Cast":
            return [*_NUMBERS]
        listed = ("keys_strings", "cats_strings", "pool_strings", "classes_strings")
        texts = [t for a in node.proto.attribute if a.name in listed for t in a.strings]
        known |= dict.fromkeys(text.decode(errors="surrogateescape") for text in texts)
    return [*known] or [*_WORDS]
