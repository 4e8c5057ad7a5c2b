"""Conversion of an ONNX file's graph to another opset, up or down, by ONNX's own converter."""

from __future__ import annotations

import onnx
from onnx import defs, external_data_helper, helper, version_converter

from cp_debug.doing import doing
from cp_debug.errors import InputError, in_one_line
from cp_debug.graph.graph import Graph, Node, external_files
from cp_debug.graph.operators import BODIES
from cp_debug.graph.surgery import INLINE_LIMIT, tensor_bytes, weights_folder

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
        for kind, values, kept in (
            ("input", graph.proto.graph.input, new.graph.input),
            ("output", graph.proto.graph.output, new.graph.output),
        ):
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
