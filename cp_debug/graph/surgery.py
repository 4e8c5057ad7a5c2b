"""Models derived from a graph: with more outputs, a part of it, in another opset. The caller's file is never changed.

Everything works on protobufs; weights in external data stay where they are, so that a model of any size costs
milliseconds. A model made here is run from memory with ``weights_folder`` as the place of its external data, or
written with ``save``. Another opset is made by ONNX's own converter, up or down.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import defs, external_data_helper, helper, version_converter

from cp_debug.doing import doing
from cp_debug.errors import InputError, in_one_line
from cp_debug.files import complete_path, resolved
from cp_debug.graph.graph import Graph, Node, external_files
from cp_debug.graph.operators import BODIES

INLINE_LIMIT = 1 << 30
"""Weights up to this many bytes go into the file itself; protobuf ends at 2 GiB."""


def extract(
    graph: Graph, nodes: Sequence[Node], outputs: Sequence[str], types: Mapping[str, onnx.TypeProto] | None = None
) -> onnx.ModelProto:
    """A model of ``nodes`` (in order) alone, with the weights that they read and their metadata.

    Its inputs are the values that the nodes read and do not compute; its ``outputs`` are values that they compute.
    ``types`` goes before the graph's own knowledge of types. An input of unknown type is left untyped, which ONNX
    Runtime refuses. Raises InputError when an output is not computed by the nodes.
    """
    types_by_value = {**graph.types, **(types or {})}
    computed = {o for node in nodes for o in node.outputs}
    if stray := next((o for o in outputs if o not in computed), None):
        raise InputError(f"{graph}: the segment does not compute {stray!r}")
    reads = dict.fromkeys(name for node in nodes for name in node.inputs if name not in computed)
    source = graph.proto
    model = onnx.ModelProto(
        ir_version=source.ir_version,
        opset_import=source.opset_import,
        functions=source.functions,
        metadata_props=source.metadata_props,
        producer_name=source.producer_name,
    )
    part = model.graph
    part.name = source.graph.name
    part.node.extend(node.proto for node in nodes)
    part.initializer.extend(graph.weight(name) for name in reads if name in graph.initializers)
    for name in reads:
        if name not in graph.initializers:
            part.input.add(name=name, type=types_by_value.get(name))
    for name in dict.fromkeys(outputs):
        part.output.add(name=name, type=types_by_value.get(name))
    part.value_info.extend(
        onnx.ValueInfoProto(name=o, type=types_by_value[o]) for o in computed - set(outputs) if o in types_by_value
    )
    return model


def unused_names(graph: Graph) -> Callable[[str], str]:
    """A function that makes a name for a new node or value: the wish, with underscores appended until it is free."""
    used = {*graph.values, *graph.initializers, *(v.name for v in graph.inputs), *(n.name for n in graph.nodes)}

    def fresh(name: str) -> str:
        while name in used:
            name += "_"
        used.add(name)
        return name

    return fresh


def tensor_type(dtype: np.dtype | type, shape: Sequence[int | str | None] | None = None) -> onnx.TypeProto:
    """The ONNX type of a tensor of this numpy dtype; without a shape, of any rank."""
    return onnx.helper.make_tensor_type_proto(onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), shape)


def weights_folder(graph: Graph) -> Path:
    """Folder of the external data of models made from ``graph``."""
    return resolved(graph.path).parent


def save(model: onnx.ModelProto, graph: Graph, path: Path) -> None:
    """Write a model made from ``graph`` as ``path``, complete or not at all.

    Beside the original, external data is shared with it. Elsewhere the file carries its weights inside, up to
    ``INLINE_LIMIT``; beyond, the external data files are hard-linked to its folder, or copied across file systems.
    """
    home = weights_folder(graph)
    files = external_files(model, home)
    if files and resolved(path).parent != home:
        if sum(map(tensor_bytes, model.graph.initializer)) <= INLINE_LIMIT:
            inline = onnx.ModelProto()
            inline.CopyFrom(model)
            external_data_helper.load_external_data_for_model(inline, str(home))
            model = inline
        else:
            _bring(files, home, path.parent)
    with complete_path(path) as partial:
        partial.write_bytes(model.SerializeToString())


def tensor_bytes(tensor: onnx.TensorProto) -> int:
    """Bytes of a weight in memory, wherever it is stored."""
    size = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    return size * math.prod(tensor.dims)


def _bring(files: Collection[Path], home: Path, folder: Path) -> None:
    """Hard-link or copy external data files into ``folder``. Raises InputError where another file is in the way."""
    for file in files:
        target = folder / file.relative_to(home)
        if target.exists():
            if not target.samefile(file):
                raise InputError(f"{target}: in the way of the external data of {home}")
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            target.hardlink_to(file)
        except OSError:  # another file system, or one without links
            with complete_path(target) as partial:
                shutil.copyfile(file, partial)


InputShapes = Sequence[Sequence[int]]
"""Shapes that one input takes, the smallest and the largest for instance."""


def distinct_dimensions(graph: Graph, shapes: Mapping[str, InputShapes], path: Path) -> Path:
    """The graph's file, or a copy at ``path`` where an input's dimension has another size than another of its name.

    Converters write ``?`` or ``None`` for every dimension that they do not know. ONNX Runtime takes no notice; TensorRT
    refuses the file, as a name is one size there. ``shapes``: input → the shapes that it takes; inputs that it lacks
    are left alone.
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


OLDEST = 7
"""Oldest opset whose operators ONNX's converter describes well enough to be used here."""


def inlined(graph: Graph) -> onnx.ModelProto:
    """A copy of the graph's model with all weights inside.

    Raises InputError where they are more than ``INLINE_LIMIT``, which a protobuf message cannot hold.
    """
    model = graph.copied()
    if files := external_files(model, home := weights_folder(graph)):
        if (size := sum(map(tensor_bytes, model.graph.initializer))) > INLINE_LIMIT:
            raise InputError(
                f"{graph}: holds {size / 2**30:.1f} GiB of weights in {', '.join(sorted(f.name for f in files))}; "
                f"expected at most {INLINE_LIMIT >> 30} GiB to rewrite the graph; export the model again"
            )
        external_data_helper.load_external_data_for_model(model, str(home))
    return model


def converted(model: onnx.ModelProto, graph: Graph, opset: int) -> onnx.ModelProto:
    """A model made from ``graph``, its weights inside, in ``opset``: only relabelled where every operator is the same.

    Raises InputError for an opset that the installed ``onnx`` does not know, and as ``convert`` does.
    """
    old, newest = graph.opsets.get("", 1), defs.onnx_opset_version()
    if old == opset:
        return model
    if not OLDEST <= opset <= newest:
        raise InputError(
            f"--opset: {opset}; expected {OLDEST} to {newest}, to which the installed onnx package converts"
        )
    changed = [node for node in graph.nodes if node.proto.domain in ("", "ai.onnx") and not _same(node.op, old, opset)]
    where = f"--opset: {graph} is in opset {old}, and ONNX's converter"
    convert(model, graph, opset, where, relabel=not changed and not model.functions)
    return model


def raised(graph: Graph, opset: int, need: str) -> onnx.ModelProto:
    """A copy of the model in ``opset`` at least: as it is where that means the same, else converted by ONNX, which puts
    nodes beside it. Every node has a name of its own: one without is called after its place, which changes.

    ``need``: what needs the opset, for messages. Raises InputError where ONNX does not convert one of the operators, or
    would lose one of the values.
    """
    old = graph.opsets.get("", 1)
    onnx_nodes = [node for node in graph.nodes if node.proto.domain in ("", "ai.onnx") and old < opset]
    changed = [n for n in onnx_nodes if n.op in BODIES or _signature(n, old) != _signature(n, opset)]
    model = inlined(graph) if changed else graph.copied()
    for proto, node in zip(model.graph.node, graph.nodes, strict=True):
        proto.name = node.name
    if old < opset:
        first = f", where {changed[0].op} (node {changed[0].name!r}) is another operator" if changed else ""
        where = f"{graph}: opset {old}, but {need} needs {opset}{first}; export the model again: ONNX's converter"
        convert(model, graph, opset, where, relabel=not changed)
    return model


def convert(model: onnx.ModelProto, graph: Graph, opset: int, where: str, *, relabel: bool) -> None:
    """Bring a model made from ``graph``, its weights inside, to ``opset``; ``relabel``: all means the same there.

    ``where`` begins the messages. Raises InputError where ONNX converts an operator not at all, and where its
    conversion loses a value, an input or an output.
    """
    if not relabel:
        try:
            with doing(f"onnx converted {graph} to opset {opset}"):
                new = version_converter.convert_version(model, opset)
        except Exception as error:  # the converter raises whatever its adapters do
            reason = in_one_line(error).rpartition("failed: ")[2]  # behind a line of its C++ source
            raise InputError(f"{where} cannot convert it to {opset}: {reason}") from error
        produced = {name for proto in new.graph.node for name in proto.output}
        if lost := [value for value in graph.producer if value not in produced]:
            raise InputError(f"{where} loses the value {lost[0]!r} when converting to {opset}")
        for kind in ("input", "output"):
            values, kept = (getattr(each, kind) for each in (graph.proto.graph, new.graph))
            if missing := [v.name for v in values if v.name not in {k.name for k in kept}]:
                raise InputError(f"{where} loses the {kind} {missing[0]!r} when converting to {opset}")
        _keep_notes(model.graph, new.graph)
        model.graph.CopyFrom(new.graph)
    for entry in model.opset_import:
        if entry.domain in ("", "ai.onnx"):
            entry.version = opset
    needed = helper.find_min_ir_version_for([e for e in model.opset_import if e.domain in ("", "ai.onnx")])
    model.ir_version = max(model.ir_version, needed)


def _same(operator: str, old: int, new: int) -> bool:
    """Whether ONNX defined the operator once for both opsets, and it holds no graph whose operators may differ."""
    if operator in BODIES:
        return False
    try:
        return bool(defs.get_schema(operator, old).since_version == defs.get_schema(operator, new).since_version)
    except defs.SchemaError:
        return False


def _signature(node: Node, opset: int) -> object:
    """Inputs and defaults of a node's operator; None for one that is not in the schemas of ``opset``."""
    if (schema := node.schema({"": opset})) is None:
        return None
    defaults = {n: a.default_value.SerializeToString() for n, a in schema.attributes.items() if a.default_value.type}
    return [formal.name for formal in schema.inputs], defaults


def _keep_notes(old: onnx.GraphProto, new: onnx.GraphProto) -> None:
    """Give nodes back what the converter drops: the exporter's notes on modules and source lines."""
    notes = {node.output[0]: node.metadata_props for node in old.node if node.output}
    for node in new.node:
        if node.output and not node.metadata_props and (kept := notes.get(node.output[0])):
            node.metadata_props.extend(kept)
