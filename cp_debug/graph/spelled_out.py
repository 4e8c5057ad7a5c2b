"""Operators that compute with levels, spelled out as what they mean: floats between quantizers, as in a Q/DQ file.

One operator of levels holds the scales of all that it reads and makes. Spelled out, each stands at a quantizer of its
own, so that whoever reads Q/DQ files reads these as well. Values keep their names, and those that were levels are the
floats behind them; each reader puts them on levels by the scale that they were made with, and takes them from there by
the scale that it was told.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import onnx
from onnx import helper

from cp_debug.graph.constants import Constants
from cp_debug.graph.graph import QUANTIZING, Graph, Node
from cp_debug.graph.integer_values import ScaledProduct, is_constant, produced_grid, scaled_product
from cp_debug.graph.narrow_qdq import BITS
from cp_debug.graph.operators import PRODUCTS, QUANTIZERS

DERIVED = "\x1fscale"
"""End of the name of a bias's scale, which is that of the data times that of the weights."""
BIAS_PLACE = {"QLinearConv": 8, "QGemm": 6}
"""Operator that reads levels → place of its bias, in levels of the data's scale times the weights'."""
PACKED = "com.microsoft.MatMulNBits"
_MADE, _READ = "\x1fmade", "\x1fread"
"""Ends of the names of levels as they are made, and as they are read."""


def spelled_out(graph: Graph, kept: Collection[str] = (), *, unpacks: bool = True) -> Graph:
    """The graph without operators of levels, as far as their scales are known; the graph itself without any.

    ``kept``: values that must be floats, and must not vanish behind a bias. ``unpacks``: also operators with packed
    weights, which take twice the memory then, or more.
    """
    if not computes_with_levels(graph, packed=unpacks) and not any(produced_grid(graph, value) for value in kept):
        return graph
    return _Speller(graph, kept, unpacks).spelled()


def computes_with_levels(graph: Graph, *, packed: bool = True) -> bool:
    """Whether a graph has operators of levels; ``packed``: those with packed weights count as well."""
    left = QUANTIZERS if packed else QUANTIZERS | {PACKED}
    return any(mark in node.op for node in graph.nodes if node.op not in left for mark in QUANTIZING)


class _Speller:
    def __init__(self, graph: Graph, kept: Collection[str], unpacks: bool) -> None:
        self._graph, self._kept, self._unpacks, self._held = graph, kept, unpacks, Constants(graph)
        self._constants: dict[str, np.ndarray] = {}
        self._nodes: list[onnx.NodeProto] = []
        self._products = {n.name: found for n in graph.nodes if (found := self._scaled(n)) is not None}
        grids = ((v, produced_grid(graph, v)) for v in graph.values if not is_constant(graph, v))
        self._grids = {v: g for v, g in grids if g and all(n in self._held for n in g)}

    def spelled(self) -> Graph:
        graph = self._graph
        merged = {each.name for found in self._products.values() for each in found.nodes}
        for node in graph.nodes:
            if node.name in merged:
                continue
            if not self._spell(node):
                reads = [name + _READ * (name in self._grids) for name in node.proto.input]
                makes = [name + _MADE * (name in self._grids) for name in node.proto.output]
                self._nodes.append(node.changed(reads, makes).proto)
                self._nodes[-1].name = node.name
            for value in node.outputs:
                if value in self._grids:
                    grid = self._grids[value]
                    own = node.proto.attribute if node.op == "QuantizeLinear" else ()
                    how = {a.name: helper.get_attribute_value(a) for a in own}
                    along = {name: how[name] for name in ("axis", "block_size") if name in how}
                    self._add("DequantizeLinear", [value + _MADE, *grid], value, f"{node.name} (result)", **along)
                    self._add("QuantizeLinear", [value, *grid], value + _READ, f"{node.name} (result)", **how)
        return graph.with_nodes(self._nodes, self._constants)

    def _add(self, op: str, inputs: Sequence[str], output: str, name: str, **attributes: object) -> str:
        self._nodes.append(helper.make_node(op, inputs, [output], name, **attributes))
        return output

    def _scaled(self, node: Node) -> ScaledProduct | None:
        """The scales of an integer product, with the bias that an Add puts to a convolution."""
        found = scaled_product(self._graph, node)
        if found is None or not all(each.op in ("Cast", "Mul") for each in found.nodes):
            return None
        product = found.nodes[-1].outputs[0]
        readers = self._graph.consumers.get(product, [])
        if node.op != "ConvInteger" or product in self._kept or [reader.op for reader in readers] != ["Add"]:
            return found
        return found._replace(nodes=(*found.nodes, *readers)) if self._bias(readers[0]) else found

    def _bias(self, total: Node) -> str:
        """The constant of one axis that an Add puts to a convolution; empty without one."""
        makers = (self._graph.producer.get(name) for name in total.proto.input)
        names = (maker.proto.input[0] for maker in makers if maker is not None and maker.op == "Reshape")
        return next((name for name in names if name in self._held and self._held[name].ndim == 1), "")

    def _float(self, node: Node, levels: str, scale: str, zero: str, place: int, **attributes: object) -> str:
        """The float behind levels that a node reads."""
        read = levels + _READ * (levels in self._grids)
        parts = [read, scale, zero] if zero else [read, scale]
        name = f"{node.name} (input {place})"
        return self._add("DequantizeLinear", parts, f"{node.outputs[0]}\x1f{place}", name, **attributes)

    def _spell(self, node: Node) -> bool:
        """Add what a node means; False for one that is left as it is.

        An operator has its operands in front of their scales and zero points; a bias and those of the result are
        behind.
        """
        read, op = [*node.proto.input], node.op.removeprefix("com.microsoft.")
        own = "Gemm" if op == "QGemm" else op.removeprefix("QLinear").removesuffix("Integer")
        value, bias, held, found = node.outputs[0], "", self._held, self._products.get(node.name)
        grid = self._grids.get(value, [])
        plain = [read.pop(0)] if op == "QLinearWhere" else []
        if node.op == PACKED:
            return self._unpacks and self._packed(node)
        if found is not None:
            operands = [*zip(read[:2], found.scales, [*read[2:], "", ""], strict=False)]
            value = found.nodes[-1].outputs[0]
        elif (
            own == op
            or node.attribute("channels_last")
            or node.attribute("opset", 13) < 13
            or not (grid or (op == "QGemm" and len(read) <= BIAS_PLACE[op] + 1))
        ):
            return False
        else:
            read = [*read[2:], *read[:2]] if own == "Concat" else read
            bias = "".join(read[BIAS_PLACE[op] :][:1]) if op in BIAS_PLACE else ""
            read = read[:6] if own in PRODUCTS else read[: len(read) - len(read) % 3]
            operands = [*zip(read[::3], read[1::3], read[2::3], strict=True)]
        if bias and not all(name in held for name in (bias, *(scale for _, scale, _ in operands))):
            return False
        values = []
        for place, (levels, scale, zero) in enumerate(operands):
            by_rows = own == "Conv" or node.attribute("transB") or levels not in held
            axis = {"axis": 0 if by_rows else held[levels].ndim - 1} if own in PRODUCTS and place == 1 else {}
            values.append(self._float(node, levels, scale, zero, place, **axis))
        if bias:
            scale = f"{value}{DERIVED}"
            self._constants[scale] = (held[operands[0][1]] * held[operands[1][1]]).astype(np.float32)
            values.append(self._float(node, bias, scale, "", 2, axis=0))
        if found is not None and found.nodes[-1].op == "Add":
            values.append(self._bias(found.nodes[-1]))
        known = onnx.defs.get_schema(own).attributes
        self._add(own, [*plain, *values], f"{value}\x1fexact" if grid else value, node.name)
        self._nodes[-1].attribute.extend(a for a in node.proto.attribute if a.name in known)
        if grid:
            self._add("QuantizeLinear", [f"{value}\x1fexact", *grid], value + _MADE, f"{node.name} (result)")
        return True

    def _packed(self, node: Node) -> bool:
        """Levels of few bits, which lie packed along the rows of a transposed weight."""
        data, packed, scales, zeros, order, bias = [*node.proto.input, *[""] * 6][:6]
        held = self._held
        if order or any(n and (n not in held or held[n].dtype.kind == "f") for n in (packed, zeros)):
            return False
        bits, rows, columns, block = (node.attribute(n, 4) for n in ("bits", "N", "K", "block_size"))
        own, blocks = node.outputs[0], -(-columns // block)
        codes = _unpacked(held[packed].reshape(rows, -1), bits)[:, :columns]
        middles = np.full((rows, blocks), 1 << (bits - 1), np.uint8)
        middles = _unpacked(held[zeros].reshape(rows, -1), bits)[:, :blocks] if zeros else middles
        names = [f"{own}\x1f{part}" for part in ("codes", "scales", "zeros")]
        arrays = (codes, held[scales].reshape(rows, blocks), middles)
        self._constants |= {name: np.ascontiguousarray(a.T) for name, a in zip(names, arrays, strict=True)}
        weight = self._add("DequantizeLinear", names, f"{own}\x1f1", f"{node.name} (input 1)", axis=0, block_size=block)
        helper.set_metadata_props(self._nodes[-1], {BITS: str(bits)})
        exact = self._add("MatMul", [data, weight], f"{own}\x1fexact" if bias else own, node.name)
        if bias:
            self._add("Add", [exact, bias], own, f"{node.name} (bias)")
        return True


def _unpacked(packed: np.ndarray, bits: int) -> np.ndarray:
    """uint8 [rows, bytes] → [rows, bytes · 8 ÷ bits], the lowest bits first."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    return ((packed[..., None] >> shifts) & ((1 << bits) - 1)).reshape(len(packed), -1)
