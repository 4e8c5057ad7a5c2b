"""The graph that a run really executes: bodies of If, Loop and Scan, and the file's own functions, put in their place.

Which branch an If takes and how often a Loop runs depends on data; that is decided by whoever ran the graph once, and
handed in. Names tell where a node stands: ``If_3/then_branch/Conv_1``, ``Loop_2/#0/Add_4``. Values that the main graph
computes keep their names. Bodies that no sample ran were compared nowhere: ``idle_bodies`` names them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import helper, numpy_helper

from cp_debug.graph.bodies import Body
from cp_debug.graph.control_flow import IdleBody
from cp_debug.graph.graph import Graph, Node, refill
from cp_debug.graph.onnx_file import bodies
from cp_debug.graph.operators import BODIES

Decision = str | int
"""The branch that an If took (``then_branch``), or how often a Loop or Scan ran."""

MOST_NODES = 512
"""Nodes that one loop may become; a longer one stays whole, and is replayed as one layer."""


@dataclass(frozen=True)
class Branch:
    """One control flow node that was put flat."""

    path: str
    op: str
    decision: Decision
    decided_by: tuple[str, ...]
    """The values that decide: the condition, for a Loop the trip count and the condition after each pass."""
    outputs: tuple[str, ...]


def needs_flattening(graph: Graph) -> bool:
    """Whether the graph holds bodies, or calls functions of its own file."""
    local = {(f.domain, f.name) for f in graph.proto.functions}
    return any(any(bodies(n.proto)) or (n.proto.domain, n.proto.op_type) in local for n in graph.nodes)


def has_control_flow(graph: Graph) -> bool:
    """Whether what runs depends on data, in a body or function, too."""
    functions = [n for f in graph.proto.functions for n in f.node]
    return any(n.op_type in BODIES for n in _all_nodes([*graph.proto.graph.node, *functions]))


def flatten(graph: Graph, decisions: Mapping[str, Decision]) -> tuple[onnx.ModelProto, list[Branch]]:
    """The model with bodies and functions in their place, as far as ``decisions`` (by path) tell, and what was decided.

    What is not decided, runs too often, or never and so leaves no shape, stays as it is.
    """
    model = graph.copied()
    flat = _Flattener(graph, decisions)
    flat.copy(graph.nodes, "", {})
    refill(model.graph.node, flat.nodes)
    model.graph.initializer.extend(flat.weights.values())
    used = {(n.domain, n.op_type) for n in _all_nodes(flat.nodes)}
    refill(model.functions, (f for f in model.functions if (f.domain, f.name) in used))
    return model, flat.branches


class _Flattener:
    """Copies nodes into one flat list, with names that tell the body and iteration they come from."""

    def __init__(self, graph: Graph, decisions: Mapping[str, Decision]) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: dict[str, onnx.TensorProto] = {}
        self.branches: list[Branch] = []
        self._decisions = decisions
        self._opsets = graph.opsets
        self._functions = {(f.domain, f.name): f for f in graph.proto.functions}

    def copy(self, nodes: Sequence[Node], path: str, scope: Mapping[str, str]) -> None:
        """Append ``nodes`` of the body at ``path``; ``scope``: what a name in it is called outside."""
        names = dict(scope)
        for node in nodes:
            names.update({o: f"{path}{o}" for o in node.proto.output if o and o not in scope and path})
            self._put(node, path, names)

    def _put(self, node: Node, path: str, names: Mapping[str, str]) -> None:
        place = path + node.name
        proto = renamed(node.proto, names)
        proto.name = place if path else node.proto.name
        decision = self._decisions.get(place)
        function = self._functions.get((node.proto.domain, node.proto.op_type))
        if function is not None and self._compatible(function):
            self._inline(Body.of_function(function, node), proto, place + "/", {})
        elif node.op == "If" and isinstance(decision, str):
            self.branches.append(Branch(place, "If", decision, (proto.input[0],), tuple(filter(None, proto.output))))
            body = Body.of_graph(node.attribute(decision), self._opsets)
            self._inline(body, proto, f"{place}/{decision}/", names)
        elif node.op in ("Loop", "Scan") and isinstance(decision, int) and self._unrolls(node, decision):
            by = proto.input[:2] if node.op == "Loop" else proto.input[-1:]
            index = len(self.branches)  # in front of the control flow inside
            body = Body.of_graph(node.attribute("body"), self._opsets)
            conditions = self._unroll(node, body, proto, place, names, decision)
            decided_by = tuple(dict.fromkeys(filter(None, (*by, *conditions))))
            branch = Branch(place, node.op, decision, decided_by, tuple(filter(None, proto.output)))
            self.branches.insert(index, branch)
        else:
            self.nodes.append(proto)

    def _compatible(self, function: onnx.FunctionProto) -> bool:
        """Whether the function means the same operators as the graph."""
        return all(
            self._opsets.get("" if o.domain == "ai.onnx" else o.domain, o.version) == o.version
            for o in function.opset_import
        )

    def _unrolls(self, node: Node, count: int) -> bool:
        """Whether ``count`` iterations of a loop are few enough nodes to be written out."""
        old_scan = node.op == "Scan" and self._opsets.get("", 1) < 9
        return count > 0 and count * len(node.attribute("body").node) <= MOST_NODES and not old_scan

    def _inline(self, body: Body, caller: onnx.NodeProto, path: str, outer: Mapping[str, str]) -> None:
        """The nodes of a branch or function in place of ``caller``, whose names are those of the outside already.

        The body of a branch takes no inputs: what its If reads is the condition alone.
        """
        results = self._body(body, path, outer, caller.input, dict(zip(body.outputs, caller.output, strict=False)))
        self._give(results, caller, path)

    def _give(self, results: Sequence[str], caller: onnx.NodeProto, path: str) -> None:
        """Call ``results`` as the outputs of ``caller``, where their names differ."""
        for result, outside in zip(results, caller.output, strict=False):
            if outside and result != outside:
                self._add("Identity", [result], [outside], f"{path}{outside}")

    def _body(
        self,
        body: Body,
        path: str,
        outer: Mapping[str, str],
        arguments: Sequence[str],
        wanted: Mapping[str, str],
        weights_path: str | None = None,
    ) -> list[str]:
        """Append the nodes of ``body``; return the names that its outputs have outside.

        ``wanted``: body output → name it should get, where possible.
        """
        scope = dict(outer) | dict.fromkeys(body.inputs, "")
        scope |= dict(zip(body.inputs, arguments, strict=False))
        for name, array in body.constants.items():
            scope[name] = f"{path if weights_path is None else weights_path}{name}"
            if scope[name] not in self.weights:
                self.weights[scope[name]] = numpy_helper.from_array(array, scope[name])
        computed = {o for n in body.nodes for o in n.outputs}
        used_names: set[str] = set()
        for name, outside in wanted.items():
            if name in computed and outside and outside not in used_names:
                scope[name] = outside
                used_names.add(outside)
        self.copy(body.nodes, path, scope)
        return [scope.get(o) or (f"{path}{o}" if o in computed else o) for o in body.outputs]

    def _unroll(
        self, node: Node, body: Body, caller: onnx.NodeProto, place: str, outer: Mapping[str, str], count: int
    ) -> list[str]:
        """Append ``count`` passes of a Loop or Scan; return the conditions after each, as they are called outside."""
        first = 2 if node.op == "Loop" else 0  # behind the trip count and the condition
        start = len(caller.input) - node.attribute("num_scan_inputs", 0)
        state, columns = list(caller.input[first:start]), caller.input[start:]
        begin, end = first // 2, first // 2 + len(state)  # places of the states among what the body gives
        conditions: list[str] = []
        scans: list[list[str]] = [[] for _ in body.outputs[end:]]
        for k in range(count):
            path = f"{place}/#{k}/"
            arguments = [*state, *self._rows(node, columns, place, k, count)]
            if first:
                true = self._constant(f"{place}/true", np.bool_(True))
                arguments = [self._constant(f"{path}iteration", body.counter(k)), true, *arguments]
            last = dict(zip(body.outputs[begin:end], caller.output, strict=False)) if k == count - 1 else {}
            results = self._body(body, path, outer, arguments, last, f"{place}/")
            conditions += results[:begin]
            state = results[begin:end]
            for scan, value in zip(scans, results[end:], strict=True):
                scan.append(value)
        self._give(state, caller, f"{place}/")
        axes, backwards = (node.attribute(f"scan_output_{n}") or [0] * len(scans) for n in ("axes", "directions"))
        for values, outside, axis, backward in zip(scans, caller.output[len(state) :], axes, backwards, strict=False):
            self._stack(values[::-1] if backward else values, outside, place, axis)
        return conditions

    def _rows(self, node: Node, columns: Sequence[str], place: str, k: int, count: int) -> Iterator[str]:
        """What pass ``k`` of a Scan reads of the values that it goes along."""
        axes, backwards = (node.attribute(f"scan_input_{n}") or [0] * len(columns) for n in ("axes", "directions"))
        for column, axis, backward in zip(columns, axes, backwards, strict=True):
            row, name = count - 1 - k if backward else k, f"{place}/#{k}/{column}"
            self._add("Gather", [column, self._constant(f"{place}/{row}", np.int64(row))], [name], name, axis=axis)
            yield name

    def _stack(self, values: Sequence[str], wanted: str, place: str, axis: int) -> None:
        """Stack one scan output's values along ``axis`` under the name ``wanted``; nothing for an unused output."""
        if not wanted:
            return
        rows = [f"{place}/{wanted}/#{k}" for k in range(len(values))]
        for value, row in zip(values, rows, strict=True):
            if self._opsets.get("", 1) >= 13:
                self._add("Unsqueeze", [value, self._constant(f"{place}/axis{axis}", np.array([axis]))], [row], row)
            else:
                self._add("Unsqueeze", [value], [row], row, axes=[axis])
        self._add("Concat", rows, [wanted], f"{place}/{wanted}", axis=axis)

    def _constant(self, name: str, value: np.ndarray | np.generic) -> str:
        self.weights[name] = numpy_helper.from_array(np.asarray(value), name)
        return name

    def _add(self, op: str, inputs: Sequence[str], outputs: Sequence[str], name: str, **attributes: object) -> None:
        self.nodes.append(helper.make_node(op, inputs, outputs, name=name, **attributes))


def renamed(proto: onnx.NodeProto, names: Mapping[str, str]) -> onnx.NodeProto:
    """A copy with its values called as outside; bodies that stay are renamed where they read outer values."""
    node = onnx.NodeProto()
    node.CopyFrom(proto)
    for field in (node.input, node.output):
        field[:] = [names.get(n, n) if n else n for n in field]
    for graph in bodies(node):
        inner_names = {v.name for v in graph.input} | {t.name for t in graph.initializer}
        inner_names |= {o for n in graph.node for o in n.output}
        outer = {k: v for k, v in names.items() if k not in inner_names}
        refill(graph.node, (renamed(n, outer) for n in graph.node))
    return node


def _all_nodes(nodes: Sequence[onnx.NodeProto]) -> list[onnx.NodeProto]:
    """The nodes and those in their bodies."""
    return [m for n in nodes for m in (n, *(c for g in bodies(n) for c in _all_nodes(g.node)))]


_PASS = re.compile(r"/#\d+/")


def name_in_file(name: str) -> str:
    """The name that ``BodyConstants`` has for a constant of a flattened graph: of all passes of a loop, its body's."""
    return _PASS.sub("/body/", name)


def decisions_by_node(decisions: Iterable[Mapping[str, Decision]]) -> dict[str, set[Decision]]:
    """Path of a control flow node, without the numbers of passes → all that it decided in runs."""
    taken: dict[str, set[Decision]] = {}
    for run in decisions:
        for path, decision in run.items():
            taken.setdefault(_PASS.sub("/", path), set()).add(decision)
    return taken


def idle_bodies(graph: Graph, taken: Mapping[str, set[Decision]], fixed: Iterable[str] = ()) -> list[IdleBody]:
    """The bodies of ``graph`` that did not run, as ``taken`` (by ``decisions_by_node``) says, outermost ones alone.

    ``fixed``: values that no input reaches; what does not run because of them never runs.
    """
    functions = {(f.domain, f.name): f for f in graph.proto.functions}
    constant = set(fixed)

    def walk(nodes: Sequence[Node], path: str) -> Iterator[IdleBody]:
        for node in nodes:
            place = path + node.name
            function = functions.get((node.proto.domain, node.proto.op_type))
            if function is not None:
                yield from walk(Body.of_function(function, node).nodes, f"{place}/")
            if node.op not in BODIES or not (ran := taken.get(place)):
                continue
            for attribute in node.proto.attribute:
                if attribute.name not in ("then_branch", "else_branch", "body"):
                    continue
                if ran == {0} or (node.op == "If" and attribute.name not in ran):
                    reads = node.proto.input
                    deciding = reads[-1:] if node.op == "Scan" else reads[: 2 if node.op == "Loop" else 1]
                    if path or not constant.issuperset(filter(None, deciding)):
                        yield IdleBody(place, node.op, attribute.name)
                    continue
                inner = Body.of_graph(attribute.g, graph.opsets).nodes
                yield from walk(inner, f"{place}/{attribute.name}/" if node.op == "If" else f"{place}/")

    return list(walk(graph.nodes, ""))
