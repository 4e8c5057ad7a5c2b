"""The only reader of ONNX files: its results have been checked, so no other code needs to distrust a file.

Text is UTF-8, every value is made once and before it is read, weights hold as many bytes as they claim, external data
lie in the file's folder, attributes have the type that they name.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Collection, Iterable, Iterator, Sequence
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

import onnx
from onnx import AttributeProto, TensorProto

from cp_debug.errors import InputError
from cp_debug.graph.onnx_tensors import BITS, LARGEST_RANK, byte_count, described, external_data, shown
from cp_debug.graph.operators import CONTRIB_INPUTS, RECURRENT
from cp_debug.reading import check_file, read_bytes, readable
from cp_debug.safe_text import amount, one_line

LARGEST = (1 << 31) - 1
"""Bytes of a protobuf message."""
MOST_NODES = 1_000_000
"""Nodes of a graph with its functions written out."""
DEEPEST = 100
"""Functions and bodies inside each other, where functions are written out."""
LONGEST = 4096
"""Characters of a name."""
_CONSTANT = ("value", "sparse_value")
_OF_TEXT = ("Constant", "StringNormalizer", "StringSplit", "TfIdfVectorizer")
"""Operators of which an attribute holds data in bytes of any encoding; of others, it is one of ONNX's own words."""
_COUNTS = {"Scan": ("num_scan_inputs", "input"), "Split": ("num_outputs", "output")}
"""Operator → attribute that counts, and what it counts: whoever believes it makes lists of that length."""
_LENGTHS = {"OneHot": {1: 1, 2: 2}, "Range": {0: 1, 1: 1, 2: 1}, "TopK": {1: 1}, "CumSum": {1: 1}, "Clip": {1: 1, 2: 1}}
"""Operator → place of a parameter → elements that it must have."""
_RANKS = {
    **{convolution: {1: 3} for convolution in ("Conv", "ConvTranspose", "ConvInteger", "DeformConv")},
    "QLinearConv": {3: 3},
    "Gemm": {0: 2, 1: 2},
    **{recurrent: {1: 3, 2: 3} for recurrent in RECURRENT},
    "BatchNormalization": {1: 1, 2: 1, 3: 1, 4: 1},
    "InstanceNormalization": {1: 1, 2: 1},
}
"""Operator → place of a parameter → dimensions that it must have at least."""
_SHORT = {"FLOAT": "f", "INT": "i", "STRING": "s", "TENSOR": "t", "GRAPH": "g", "TYPE_PROTO": "tp"}
_VALUE = {
    number: _SHORT.get(kind, kind.lower())
    for kind, number in AttributeProto.AttributeType.items()
    if number != AttributeProto.UNDEFINED
}
"""Type of an attribute → the field that holds its value."""


_ORT_FORMAT = b"ORTM"
"""Bytes 4 to 7 of a file in ONNX Runtime's own format: the mark of its FlatBuffers."""
OTHER_FORMAT = (
    "in ONNX Runtime's own format, which only it reads; expected the .onnx file that "
    "onnxruntime.tools.convert_onnx_models_to_ort converted"
)


def read_model(path: Path) -> onnx.ModelProto:
    """Read and check an ONNX file; external data stay on disk.

    Raises InputError for what is not a regular file, no ONNX, cut short, or contradicts itself; the message names the
    value, node or weight.
    """
    data = read_bytes(path, what="ONNX file", most=LARGEST)
    if data[4:8] == _ORT_FORMAT:
        raise InputError(f"{path} is {OTHER_FORMAT}")
    with readable(path, "a complete ONNX file"):
        model = onnx.load_model_from_string(data)
    if not model.graph.node and not model.graph.output:
        raise InputError(f"{path}: not a complete ONNX file (it holds no graph{'' if data else ': 0 bytes'})")
    try:
        _decode(model)
        _Check(path, model).all()
    except UnicodeDecodeError as error:
        text = shown(error.object.decode(errors="backslashreplace"))
        raise InputError(f"{path}: holds text that is not UTF-8: {text}") from None
    return model


@functools.cache
def _needed(op_type: str, version: int) -> tuple[tuple[list[int], int], tuple[list[int], int]]:
    """Places of the inputs and of the outputs that an operator of ONNX's own must have in an opset, and how many it may
    have; none and any number for others."""
    try:
        schema = onnx.defs.get_schema(op_type, version, "")
    except onnx.defs.SchemaError:
        return ([], sys.maxsize), ([], sys.maxsize)
    single = onnx.defs.OpSchema.FormalParameterOption.Single
    inputs, outputs = schema.inputs[: schema.min_input], schema.outputs[: schema.min_output]
    return ([i for i, v in enumerate(inputs) if v.option == single], schema.max_input), (
        [i for i, v in enumerate(outputs) if v.option == single],
        schema.max_output,
    )


class _Check:
    """Checks everything that must hold in a file. Raises InputError, or UnicodeDecodeError where text is read."""

    def __init__(self, path: Path, model: onnx.ModelProto) -> None:
        self.path, self.model = path, model
        self._sizes: dict[Path, int] = {}
        self._functions = {(function.domain, function.name) for function in model.functions}
        self._version = 0
        self._in_function = False

    def all(self) -> None:
        """Run every check."""
        self._opsets()
        graph = self.model.graph
        if graph.sparse_initializer:
            raise self._error("holds sparse weights, which are not read; store them dense")
        if not graph.output:
            raise self._error("the graph has no outputs")
        for kind, values in (("input", graph.input), ("output", graph.output)):
            names = [self._name(value.name, f"an {kind} of the graph", empty=False) for value in values]
            if twice := _twice(names):
                raise self._error(f"two {kind}s of the graph are called {shown(twice)}")
            for value in values:
                self._declared(value, kind)
        for value in graph.value_info:
            self._name(value.name, "a described value")
        computed = self._graph(graph, set())
        for value in graph.output:
            if value.name not in computed:
                raise self._error(f"nothing computes the output {shown(value.name)}")
        outer, self._in_function = self._version, True
        for function in self.model.functions:
            self._name(function.name, "a function")
            own = [entry.version for entry in function.opset_import if entry.domain in ("", "ai.onnx")]
            self._version = own[0] if own else outer
            for node in function.node:
                self._node(node)
        self._finite_functions()
        self._external()

    def _finite_functions(self) -> None:
        """Refuse functions that call themselves, and those that are too many nodes or too deep, written out."""
        within = {(f.domain, f.name): _called(f.node) for f in self.model.functions}
        calls = {name: within.keys() & (called for called, _ in inside) for name, inside in within.items()}
        sizes: dict[tuple[str, str], int] = {}
        depths: dict[tuple[str, str], int] = {}

        def written_out(inside: list[tuple[tuple[str, str], int]]) -> tuple[int, int]:
            deepest = max((depths[called] + depth for called, depth in inside if called in depths), default=0)
            return sum(sizes.get(called, 1) for called, _ in inside), deepest + 1

        try:
            for name in TopologicalSorter(calls).static_order():
                sizes[name], depths[name] = written_out(within[name])
        except CycleError as error:
            raise self._error(f"the function {shown(error.args[1][0][1])} calls itself, or one that calls it") from None
        count, depth = written_out(_called(self.model.graph.node))
        for found, most, what in ((count, MOST_NODES, "nodes"), (depth, DEEPEST, "levels")):
            if sizes and found > most:
                raise self._error(f"functions, expanded where they are called, become {found} {what}: {most} at most")

    def _opsets(self) -> None:
        versions: dict[str, int] = {}
        for entry in self.model.opset_import:
            domain = self._name(entry.domain, "the domain of an opset")
            versions["" if domain == "ai.onnx" else domain] = entry.version
            self._known(entry, "is in")
        if not versions:
            raise self._error("names no opset of ONNX")
        for function in self.model.functions:
            for entry in function.opset_import:
                self._known(entry, f"function {function.name!r} is in")
        self._version = versions.get("", onnx.defs.onnx_opset_version())

    def _known(self, opset: onnx.OperatorSetIdProto, what: str) -> None:
        newest = onnx.defs.onnx_opset_version()
        if opset.domain in ("", "ai.onnx"):
            if not 1 <= opset.version <= newest:
                raise self._error(f"{what} opset {opset.version}; the installed onnx package knows 1 to {newest}")
        elif not 0 <= opset.version < 1 << 31:
            raise self._error(f"{what} version {opset.version} of the domain {opset.domain!r}, which is none")

    def _graph(self, graph: onnx.GraphProto, outer: Collection[str]) -> set[str]:
        """Check a graph or body; return the values that exist behind its last node.

        ``outer``: values around a subgraph.
        """
        weights = [self._name(weight.name, "a weight", empty=False) for weight in graph.initializer]
        if twice := _twice(weights):
            raise self._error(f"two weights are called {shown(twice)}")
        for weight in graph.initializer:
            self._tensor(weight)
        inputs = {self._name(value.name, "an input", empty=False) for value in graph.input}
        computed = {*inputs, *weights}
        for node in graph.node:
            self._node(node)
            for output in node.output:
                if output and output in computed:
                    raise self._error(f"{shown(output)} is computed twice, the second time by {_title(node)}")
                if output:
                    computed.add(output)
        around = {*outer, *computed}
        for node in graph.node:
            for name in node.input:
                if name and name not in around:
                    raise self._error(f"{_title(node)} reads {shown(name)}, which nothing computes")
            for inner in bodies(node):
                inside = self._graph(inner, around)
                for value in inner.output:
                    if value.name not in inside and value.name not in around:
                        raise self._error(
                            f"a subgraph of {_title(node)} outputs {shown(value.name)}, which nothing computes"
                        )
        self._order(graph)
        self._lengths(graph)
        return computed

    def _lengths(self, graph: onnx.GraphProto) -> None:
        """Raise InputError where a stored parameter is too short, which ONNX Runtime reads beyond its end, or flat."""
        stored = {tensor.name: tensor.dims for tensor in graph.initializer}
        for node in graph.node:
            if node.domain not in ("", "ai.onnx") or (node.domain, node.op_type) in self._functions:
                continue
            for unit, table in (("element", _LENGTHS), ("dimension", _RANKS)):
                for place, least in table.get(node.op_type, {}).items():
                    name = node.input[place] if place < len(node.input) else ""
                    if name not in stored:
                        continue
                    has = math.prod(stored[name]) if unit == "element" else len(stored[name])
                    if has < least:
                        counted = f"{has} {unit}{'s' * (has != 1)}; expected {least}"
                        raise self._error(f"{_title(node)}: its parameter {shown(name)} has {counted}")

    def _order(self, graph: onnx.GraphProto) -> None:
        """Raise InputError if the graph has a cycle."""
        maker = {output: i for i, node in enumerate(graph.node) for output in node.output if output}
        needs = {i: {maker[name] for name in reads(node) if name in maker} for i, node in enumerate(graph.node)}
        try:
            TopologicalSorter(needs).prepare()
        except CycleError as error:
            title = _title(graph.node[error.args[1][0]])
            raise self._error(f"{title} depends on its own output through other nodes") from None

    def _node(self, node: onnx.NodeProto) -> None:
        names = [attribute.name for attribute in node.attribute]
        texts = (node.name, node.op_type, node.domain, *node.input, *node.output, *names)
        if max(map(len, texts)) > LONGEST or any("\0" in text for text in texts):
            for text in texts:
                self._name(text, f"something of {_title(node)}")
        if not node.op_type:
            raise self._error(f"{_title(node)} has no operator")
        if not all(names):
            raise self._error(f"{_title(node)} has an attribute without a name")
        if twice := _twice(names):
            raise self._error(f"{_title(node)} has the attribute {shown(twice)} twice")
        if node.op_type == "Constant" and not node.domain and (len(names) != 1 or not names[0].startswith(_CONSTANT)):
            raise self._error(f"{_title(node)} is a Constant with the attributes {names}; expected one value")
        for attribute in node.attribute:
            self._attribute(node, attribute)
        self._counts(node)
        if not any(node.output):
            raise self._error(f"{_title(node)} has no outputs")
        if (node.domain, node.op_type) in self._functions:
            return
        if node.domain in ("", "ai.onnx"):
            inputs, outputs = _needed(node.op_type, self._version)
            for kind, values, (places, most) in (("input", node.input, inputs), ("output", node.output, outputs)):
                given = sum(place < len(values) and bool(values[place]) for place in places)
                if given < len(places):
                    raise self._error(f"{_title(node)} has {given} of {len(places)} {kind}s")
                if len(values) > most:
                    raise self._error(f"{_title(node)} has {amount(len(values), kind)}; expected at most {most}")
        elif node.domain == "com.microsoft" and len(node.input) < (least := CONTRIB_INPUTS.get(node.op_type, 0)):
            raise self._error(f"{_title(node)} has {len(node.input)} of {least} inputs")

    def _counts(self, node: onnx.NodeProto) -> None:
        """Raise InputError where an attribute counts more inputs or outputs than the node has."""
        name, values = _COUNTS.get(node.op_type, ("", ""))
        if not name or node.domain not in ("", "ai.onnx"):
            return
        most = len(getattr(node, values))
        for attribute in node.attribute:
            given = attribute.name == name and attribute.type == AttributeProto.INT and not attribute.ref_attr_name
            if given and not 1 <= attribute.i <= most:
                there = f"{most} {values}{'s' * (most != 1)}"
                raise self._error(f"{_title(node)} says {name} {attribute.i}, but has {there}")

    def _attribute(self, node: onnx.NodeProto, attribute: AttributeProto) -> None:
        if attribute.ref_attr_name:
            if self._in_function:
                return
            problem = f"refers to the argument {shown(attribute.ref_attr_name)} of a function, but stands in none"
            raise self._error(f"attribute {shown(attribute.name)} of {_title(node)} {problem}")
        field = _VALUE.get(attribute.type)
        single = field in (*_SHORT.values(), "sparse_tensor")
        if field is None or (single and not attribute.HasField(field)):
            problem = f"is of the type {attribute.type}" if field is None else f"has no value in its field {field!r}"
            raise self._error(f"attribute {shown(attribute.name)} of {_title(node)} {problem}")
        if node.domain in ("", "ai.onnx") and node.op_type not in _OF_TEXT:
            for text in [attribute.s] if field == "s" else attribute.strings:
                text.decode()
        for tensor in [attribute.t] if field == "t" else attribute.tensors if field == "tensors" else ():
            self._tensor(tensor, f"attribute {shown(attribute.name)} of {_title(node)}")

    def _tensor(self, tensor: TensorProto, what: str = "") -> None:
        what = what or f"weight {shown(tensor.name)}"
        if tensor.data_type == TensorProto.STRING and not tensor.HasField("raw_data"):
            if any(size < 0 for size in tensor.dims) or len(tensor.string_data) != math.prod(tensor.dims):
                actual = len(tensor.string_data)
                raise self._error(f"{what} is {described(tensor)}; the file has {actual} strings")
            return
        needed = byte_count(tensor, str(self.path))
        if tensor.data_location == TensorProto.EXTERNAL:
            place = external_data(tensor, self.path)
            self._sizes[place.file] = max(self._sizes.get(place.file, 0), place.offset + place.length)
            return
        if tensor.HasField("raw_data"):
            actual = len(tensor.raw_data)
            if actual != needed:
                raise self._error(f"{what} is {described(tensor)}, {needed} bytes; the file has {actual}")
            return
        kind = TensorProto.DataType.Name(tensor.data_type)
        count = math.prod(tensor.dims)
        if BITS[kind] < 8:
            count = needed
        if kind.startswith("COMPLEX"):
            count *= 2
        actual = len(getattr(tensor, onnx.helper.tensor_dtype_to_field(tensor.data_type)))
        if actual != count:
            raise self._error(f"{what} is {described(tensor)}, {count} elements; the file has {actual}")

    def _declared(self, value: onnx.ValueInfoProto, kind: str) -> None:
        element = value.type.tensor_type.elem_type
        if not 0 <= element < len(TensorProto.DataType.keys()):
            raise self._error(f"the {kind} {shown(value.name)} is of the data type {element}")
        dims = value.type.tensor_type.shape.dim
        if len(dims) > LARGEST_RANK:
            raise self._error(f"the {kind} {shown(value.name)} has {len(dims)} dimensions")
        for dim in dims:
            self._name(dim.dim_param, f"a dimension of {shown(value.name)}")

    def _external(self) -> None:
        for file, size in self._sizes.items():
            try:
                actual = check_file(file, "file")
            except InputError as error:
                if file.exists():
                    raise InputError(f"{self.path}: its external data: {error}") from None
                message = f"its external data file {one_line(file.name)} is missing (expected at {one_line(str(file))})"
                raise self._error(message) from None
            if actual < size:
                raise InputError(f"{file}: {actual} bytes, but {self.path} reads {size}: it is cut short")

    def _name(self, name: str, what: str, *, empty: bool = True) -> str:
        if len(name) > LONGEST:
            raise self._error(
                f"the name of {what} has {len(name)} characters ({shown(name)}); at most {LONGEST} are read"
            )
        if "\0" in name:
            raise self._error(f"the name of {what} holds a null byte ({shown(name)})")
        if not name and not empty:
            raise self._error(f"{what} has no name")
        return name

    def _error(self, problem: str) -> InputError:
        return InputError(f"{self.path}: {problem}")


def reads(node: onnx.NodeProto) -> Iterable[str]:
    """The values that a node reads, those that its subgraphs take from around them included."""
    yield from (name for name in node.input if name)
    for graph in bodies(node):
        inner = {v.name for v in graph.input} | {t.name for t in graph.initializer}
        for child in graph.node:
            yield from (name for name in reads(child) if name not in inner)
            inner.update(child.output)
        yield from (value.name for value in graph.output if value.name not in inner)


def _called(nodes: Iterable[onnx.NodeProto], depth: int = 0) -> list[tuple[tuple[str, str], int]]:
    """Domain and name of each node's operator, those of bodies too, and in how many bodies it stands."""
    found = []
    for node in nodes:
        found.append(((node.domain, node.op_type), depth))
        for inner in bodies(node):
            found += _called(inner.node, depth + 1)
    return found


def bodies(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """The graphs in a node's attributes."""
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def _decode(message: Any) -> None:
    """Look at every text of a message. Raises UnicodeDecodeError for one that is not UTF-8."""
    if isinstance(message, TensorProto):  # whose bytes are left where they are
        texts = [message.name, message.doc_string, *(part for e in message.external_data for part in (e.key, e.value))]
    else:
        texts = []
        for field, value in message.ListFields():
            if field.message_type is not None:
                for part in value if isinstance(value, Sequence) else (value,):
                    _decode(part)
            elif field.type == field.TYPE_STRING:
                texts += value if isinstance(value, Sequence) and not isinstance(value, str | bytes) else [value]
    for text in texts:
        if isinstance(text, bytes):  # how some versions of protobuf hand out what is no UTF-8
            text.decode("utf-8")


def _twice(names: Iterable[str]) -> str | None:
    """The first name that occurs a second time, or None."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None


def _title(node: onnx.NodeProto) -> str:
    return f"node {shown(node.name or node.op_type)}"
