"""Executes an ONNX graph, or a segment of it, with torch in any arithmetic: the emulated backends and the oracle."""

from __future__ import annotations

import itertools
from collections import ChainMap, Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor

from cp_debug.backends.arithmetic import FP32, Arithmetic
from cp_debug.backends.base import Sink
from cp_debug.backends.kernels import KERNELS, Call, OperatorKernel
from cp_debug.backends.node_failures import described, reason
from cp_debug.backends.onnx_definitions import Reference, function_body, is_defined
from cp_debug.errors import InputError
from cp_debug.graph.bodies import Body, LoopClock, run_loop, run_scan
from cp_debug.graph.check_inputs import no_numbers
from cp_debug.graph.constants import constant
from cp_debug.graph.graph import Graph, Node
from cp_debug.graph.onnx_runtime import Endless
from cp_debug.graph.onnx_tensors import FLOATS
from cp_debug.graph.randomness import draws

MOVES = {
    "BitCast", "CenterCropPad", "Compress", "ConcatFromSequence", "Identity", "MaxUnpool", "Optional",
    "OptionalGetElement", "SequenceAt", "SequenceConstruct", "SequenceErase", "SequenceInsert",
    "SplitToSequence", "TensorScatter", "Unique",
}  # fmt: skip
"""Operators without a kernel that choose among their inputs' values: there is nothing to emulate."""


_OPTIONAL: dict[str, Callable[..., Any]] = {
    "Optional": lambda value=None: value,
    "OptionalGetElement": lambda value: value,
    "OptionalHasElement": lambda value=None: torch.tensor(value is not None),
}
"""An optional is held as what is in it, or None. One that holds a sequence goes to ONNX's reference implementation."""


class NodeFailed(InputError):
    """An operator raised; the message names the file, the node, the operator and what it was given."""


@dataclass(frozen=True)
class _ExecutionStep:
    call: Call
    kernel: OperatorKernel | None
    """None: a body, or else ONNX's reference implementation."""
    bodies: Mapping[str, Body]
    """Bodies by attribute name; a function's body under the empty name."""
    opsets: Mapping[str, int]
    definitions: dict[tuple[Any, ...], Body | None] = field(default_factory=dict)
    """Types and ranks of inputs → the function body that ONNX gives for them."""


class Executor:
    """Runs the nodes of ``graph`` in ``arithmetic`` on ``device``.

    Bodies of If, Loop and the file's own functions are executed in the same arithmetic. Operators without a torch
    kernel run in ONNX's reference implementation on the CPU, in the held dtype; their results are rounded too.

    The bits of a result depend on torch's settings too (TF32 on CUDA, deterministic algorithms), which the caller owns.
    """

    def __init__(
        self,
        graph: Graph,
        arithmetic: Arithmetic = FP32,
        device: str | torch.device = "cpu",
        *,
        overrides: Mapping[str, Arithmetic] = MappingProxyType({}),
        weight_cache: int = 1 << 28,
        literal: bool = False,
        drawn: Callable[[Node, Sequence[Any]], Tensor | None] | None = None,
    ) -> None:
        """``overrides``: other arithmetics for some nodes of the main graph, by node name. Then every node rounds what
        it reads, inputs and constants included, which are held as they are given.
        ``weight_cache``: bytes of converted weights that are kept, the last ones that were used. A replay reads each
        once a walk, and a decoder of 400 million parameters took no longer than with all of them kept.
        ``literal``: where runtimes agree with each other and not with ONNX's reference implementation, compute as the
        latter does.
        ``drawn``: asked for the result of each node that draws random numbers, with the node's inputs; None draws anew.
        """
        self.graph = graph
        self.arithmetic = arithmetic
        self.device = torch.device(device)
        self._overrides = overrides
        self._literal = literal
        self._drawn = drawn
        self._weights = Weights(graph, arithmetic, self.device, weight_cache)
        self._other_weights = {a: Weights(graph, a, self.device, weight_cache) for a in overrides.values()}
        self._reference = Reference(graph)
        scaled = any(a.scaling for a in (arithmetic, *overrides.values()))
        self._constants = frozenset(constants_of(graph)) if scaled else frozenset()
        self._functions = {(f.domain, f.name): f for f in graph.proto.functions}
        self._steps: dict[Node, _ExecutionStep] = {}
        self._beside: dict[Arithmetic, Executor] = {}
        self._place = ""
        self._clock = LoopClock()
        self.decisions: dict[str, str | int] = {}
        """Decisions of the last run: path of a control flow node, as ``flatten`` writes it → branch that an If took, or
        how often a body ran."""
        self.in_reference: dict[str, str] = {}
        """Node → operator of those that ONNX's reference implementation computed."""
        self.not_emulated: dict[str, str] = {}
        """Node → operator of those that ran and whose inner rounding nobody knows here: they were computed in the held
        dtype and rounded once. Nothing is missing in arithmetics that round nothing else."""

    def beside(self, arithmetic: Arithmetic) -> Executor:
        """The executor of the same graph on the same device in another arithmetic, made once."""
        if arithmetic == self.arithmetic:
            return self
        if arithmetic not in self._beside:
            self._beside[arithmetic] = Executor(self.graph, arithmetic, self.device)
        return self._beside[arithmetic]

    def free_memory(self) -> None:
        """Free the converted weights; they are read again when they are used."""
        for weights in (self._weights, *self._other_weights.values()):
            weights.free_memory()

    def emulates(self, node: Node) -> bool:
        """Whether ``node`` is computed with this arithmetic's own rounding, as far as that is known before a run."""
        if node.name in self.not_emulated:
            return False
        known = node.op in KERNELS or node.op in MOVES or node.op == "Constant"
        if known or self._step(node, self.graph.opsets).bodies:
            return True
        if not (self.arithmetic.value or self.arithmetic.operand) or is_defined(node, self.graph.opsets):
            return True
        kinds = [self.graph.types[o].tensor_type.elem_type for o in node.outputs if o in self.graph.types]
        return len(kinds) == len(node.outputs) and not any(kind in FLOATS for kind in kinds)

    def run(
        self, inputs: Mapping[str, Any], sink: Sink | None = None, probes: Collection[str] | None = None
    ) -> dict[str, Tensor]:
        """Run the whole graph; a value is freed after its last reader.

        ``sink`` is given every value that a node computes (or only ``probes``), in execution order. Returns the graph's
        outputs by name. Inputs are in the dtypes that the graph declares; outputs in those in which the arithmetic
        holds values.
        Raises InputError for a missing input, NodeFailed when an operator raises.
        """
        missing = next((v for v in self.graph.inputs if v.name not in inputs), None)
        if missing is not None:
            text = no_numbers(missing) or f"input {missing.name!r} is missing; given are {sorted(inputs)}"
            raise InputError(f"{self.graph}: {text}")
        with torch.no_grad():
            return self._execute(self.graph.nodes, inputs, [v.name for v in self.graph.outputs], sink, probes)

    def run_nodes(
        self,
        nodes: Sequence[Node],
        values: Mapping[str, Any],
        wanted: Collection[str],
        sink: Sink | None = None,
        *,
        differentiable: bool = False,
    ) -> dict[str, Tensor]:
        """Replay ``nodes`` (a ``Graph.segment``) from captured ``values`` and return the ``wanted`` results.

        ``sink`` is given every value that a node computes, in execution order.

        A value that is both given and computed is read as given and returned as computed: each layer is replayed on the
        captured inputs of exactly that layer. ``values`` may load lazily; only what the nodes read is asked for, once.
        Given values are rounded like graph inputs; one named like a weight takes its place. Results are tensors on the
        executor's device, in the dtype in which its arithmetic holds them; shapes are those of the run.
        ``differentiable``: torch's autograd follows the results back to given tensors that require a gradient. Levels
        of quantizers are floats then, with the slope of what they round (straight-through), 0 where it is cut off.
        Raises InputError when a value is neither given nor computed, NodeFailed when an operator raises.
        """
        with torch.set_grad_enabled(differentiable):
            return self._execute(nodes, values, wanted, sink)

    def _execute(
        self,
        nodes: Sequence[Node],
        given: Mapping[str, Any],
        wanted: Collection[str],
        sink: Sink | None = None,
        probes: Collection[str] | None = None,
    ) -> dict[str, Any]:
        readers = Counter(name for node in nodes for name in node.inputs)
        live: dict[str, Any] = {}
        results: dict[str, Any] = {}
        value: Any = None
        for node in nodes:
            for name in node.inputs:
                if name not in live and (name in given or not self._weights.holds(name)):
                    live[name] = self._given(name, given)
            outputs = self._run_node(node, live)
            for name in node.inputs:
                readers[name] -= 1
                if not readers[name]:
                    live.pop(name, None)
            for name, value in zip(node.proto.output, outputs, strict=False):
                if not name:
                    continue
                if sink is not None and _has_numbers(value) and (probes is None or name in probes):
                    sink(name, value)
                if name in wanted:
                    results[name] = value
                constant_of_graph = (  # may be wanted unrounded
                    node.op == "Constant" and self._weights.holds(name) and self.graph.producer.get(name) is node
                )
                if readers[name] and name not in given and not constant_of_graph:
                    live[name] = value
            outputs, value = [], None
        for name in wanted:
            if name not in results:
                results[name] = self._weights[name] if self._weights.holds(name) else self._given(name, given)
        return {name: results[name] for name in wanted}

    def _given(self, name: str, given: Mapping[str, Any]) -> Any:
        if name not in given:
            raise InputError(f"{self.graph}: value {name!r} is needed, but neither given nor computed")
        return self._as_declared(name, self._hold(given[name]))

    def _as_declared(self, name: str, value: Any) -> Any:
        """A value of the main graph as this graph holds its floats: another program may have made it in FP32 where this
        one declares FP64, or the other way round."""
        declared = None if self._place else self.graph.types.get(name)
        kind = 0 if declared is None else declared.tensor_type.elem_type
        if kind not in FLOATS or not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        return value.to(torch.float64 if kind == onnx.TensorProto.DOUBLE else self.arithmetic.dtype)

    def _hold(self, value: Any) -> Any:
        held = self.arithmetic.hold(value, self.device)
        return held if self._overrides else self.arithmetic.round(held)

    def _run_node(self, node: Node, live: Mapping[str, Any]) -> list[Any]:
        """Results of a node. Whatever its attributes, constants or kernel raise becomes NodeFailed."""
        inputs: list[Any] = []
        try:
            return self._computed(node, live, inputs)
        except NodeFailed:
            raise
        except Endless as error:
            place = f"{self.graph}: node {node.name!r} ({node.op}): "
            raise Endless(f"{place}{str(error).removeprefix(f'{self.graph}: ')}") from error
        except Exception as error:
            if KERNELS.get(node.op) is None and not self._reference.knows(node):
                place = f"{self.graph}: node {node.name!r} ({node.op})"
                raise NodeFailed(f"{place} failed: cpdebug does not implement it") from error
            given = f" on ({', '.join(map(described, inputs))})" if inputs else ""
            step = self._steps.get(node)
            why = reason(node, self.graph.opsets if step is None else step.opsets, inputs, error)
            raise NodeFailed(f"{self.graph}: node {node.name!r} ({node.op}) failed{given}: {why}") from error

    def _computed(self, node: Node, live: Mapping[str, Any], inputs: list[Any]) -> list[Any]:
        """``inputs`` is filled with what the node is given."""
        step = self._step(node, self.graph.opsets)
        arithmetic = step.call.arithmetic
        if node.op == "Constant":
            return [self._hold(constant(node))]
        rounded = step.kernel is None or not step.kernel.exact
        weights = self._other_weights.get(arithmetic, self._weights)
        values = {n: live[n] if n in live else weights.get(n, rounded=rounded) for n in node.inputs}
        if self._overrides:
            values = {
                n: arithmetic.round(arithmetic.hold(v, self.device)) if n in live else v for n, v in values.items()
            }
        inputs += [values[name] if name else None for name in node.proto.input]
        results = self._compute(step, inputs, values)
        return [arithmetic.round(r) for r in results] if step.kernel is None or step.kernel.rounds else results

    def _compute(self, step: _ExecutionStep, inputs: list[Any], values: Mapping[str, Any]) -> list[Any]:
        node, place = step.call.node, self._place
        runs = itertools.count()

        def execute(body: Body, arguments: Sequence[Any]) -> list[Any]:
            self._place = f"{place}{node.name}/{_within(node, step.bodies, body, next(runs))}"
            try:
                return run_body(body, arguments)
            finally:
                self._place = place

        def run_body(body: Body, arguments: Sequence[Any]) -> list[Any]:
            local_values = body.constants | dict(zip(body.inputs, arguments, strict=False))
            for child in body.nodes:
                self._step(child, body.opsets)
            produced = {o for child in body.nodes for o in child.outputs}
            # A function knows nothing of its caller's values; the bodies of If, Loop and Scan do.
            outer = {} if body is step.bodies.get("") else {n: v for n, v in values.items() if n not in produced}
            visible = ChainMap(local_values, outer)
            produced |= visible.keys()
            # What ONNX defines by a function may leave out outputs that nobody asked for.
            results = self._execute(body.nodes, visible, [o for o in body.outputs if o in produced])
            return [results.get(o) for o in body.outputs]

        if self._drawn is not None and draws(node, self.graph) and (known := self._drawn(node, inputs)) is not None:
            return [known, torch.ones_like(known, dtype=torch.bool)][: step.call.outputs]
        if "" in step.bodies:
            return execute(step.bodies[""], inputs)
        if node.op == "If":
            self.decisions[place + node.name] = branch = "then_branch" if bool(inputs[0]) else "else_branch"
            return execute(step.bodies[branch], [])
        if node.op in _OPTIONAL and not any(isinstance(i, list) for i in inputs):
            return [self.arithmetic.hold(_OPTIONAL[node.op](*inputs), self.device)]
        if node.op in ("Loop", "Scan"):
            if node.op == "Loop":
                if not place:
                    self._clock = LoopClock()
                produced = run_loop(self._clock, step.bodies, execute, step.call, *inputs)
            else:
                produced = run_scan(step.bodies, execute, step.call, *inputs)
            self.decisions[place + node.name] = next(runs)
            return [self.arithmetic.hold(r, self.device) for r in produced]
        if step.kernel is not None and all(i is None or isinstance(i, Tensor) for i in inputs):
            results = step.kernel.function(step.call, *inputs)
            if results is not NotImplemented:
                return [results] if isinstance(results, Tensor) else list(results)
        if step.kernel is None and (body := self._by_definition(step, inputs)) is not None:
            return execute(body, inputs)
        self.in_reference[node.name] = node.op
        outputs = [self.arithmetic.hold(r, self.device) for r in self._reference.run(node, values)]
        arithmetic = step.call.arithmetic
        computes = any(isinstance(o, Tensor) and o.is_floating_point() for o in outputs) and node.op not in MOVES
        chooses = step.kernel is not None and not step.kernel.rounds
        if computes and not chooses and (arithmetic.value or arithmetic.operand):
            self.not_emulated[node.name] = node.op
        return outputs

    def _by_definition(self, step: _ExecutionStep, inputs: Sequence[Any]) -> Body | None:
        """The function body that ONNX gives for the operator and these inputs, if it can be executed here."""
        node = step.call.node
        if any(isinstance(i, list) for i in inputs):
            return None
        key = tuple((getattr(i, "dtype", None), len(getattr(i, "shape", ()))) for i in inputs)
        if key not in step.definitions:
            step.definitions[key] = function_body(node, step.opsets, inputs, self.arithmetic.dtype)
        return step.definitions[key]

    def _step(self, node: Node, opsets: Mapping[str, int]) -> _ExecutionStep:
        if (step := self._steps.get(node)) is None:
            try:
                step = self._steps[node] = self._prepared(node, opsets)
            except NodeFailed:
                raise
            except Exception as error:
                why = reason(node, opsets, (), error)
                raise NodeFailed(f"{self.graph}: node {node.name!r} ({node.op}) cannot be read: {why}") from error
        return step

    def _prepared(self, node: Node, opsets: Mapping[str, int]) -> _ExecutionStep:
        domain = "" if node.proto.domain == "ai.onnx" else node.proto.domain
        function = self._functions.get((node.proto.domain, node.proto.op_type))
        if function is not None:
            bodies = {"": Body.of_function(function, node)}
        else:
            graphs = [a for a in node.proto.attribute if a.HasField("g")]
            bodies = {a.name: Body.of_graph(a.g, opsets) for a in graphs}
        arithmetic = self._overrides.get(node.name, self.arithmetic)
        weights = frozenset(i for i, name in enumerate(node.proto.input) if name in self._constants)
        call = Call(node, opsets.get(domain, 1), arithmetic, self.device, self._literal, weights)
        return _ExecutionStep(call, KERNELS.get(node.op), bodies, opsets)


def unsupported(graph: Graph) -> list[Node]:
    """The nodes that neither a kernel, nor ONNX's reference implementation, nor a function of the file can execute."""
    reference = Reference(graph)
    return [n for n in graph.nodes if n.op not in KERNELS and n.op != "Constant" and not reference.knows(n)]


def constants_of(graph: Graph) -> set[str]:
    """Values of the main graph that no input reaches: initializers, and what nodes make of nothing else."""
    names = set(graph.initializers)
    for node in graph.nodes:
        if all(name in names for name in node.inputs) and not draws(node, graph):
            names.update(node.outputs)
    return names


def _has_numbers(value: Any) -> bool:
    """Whether a value is a tensor of numbers: no sequence, empty optional or strings."""
    return isinstance(value, Tensor) or (hasattr(value, "dtype") and value.dtype.kind not in "OSU")


def _within(node: Node, bodies: Mapping[str, Body], body: Body, run: int) -> str:
    """Part of a path for the place in a node where ``body`` runs."""
    if node.op == "If":
        return f"{next(name for name, candidate in bodies.items() if candidate is body)}/"
    return f"#{run}/" if node.op in ("Loop", "Scan") else ""


class Weights:
    """Initializers and the results of Constant nodes, by name.

    Both are read rounded as ``arithmetic`` stores constants, or exact by operators that take them as parameters, such
    as scales.
    """

    def __init__(self, graph: Graph, arithmetic: Arithmetic, device: torch.device, limit: int) -> None:
        self._graph, self._arithmetic, self._device = graph, arithmetic, device
        self._constants = {n.outputs[0]: n for n in graph.nodes if n.op == "Constant"}
        self._kept: dict[tuple[str, bool], Any] = {}
        """The last that were asked for, the latest at the end."""
        self._limit, self._held = limit, 0

    def free_memory(self) -> None:
        """Free what is kept; it is read again when it is asked for."""
        self._kept.clear()
        self._held = 0

    def holds(self, name: str) -> bool:
        """Whether ``name`` is a constant of the graph."""
        return name in self._graph.initializers or name in self._constants

    def __getitem__(self, name: str) -> Any:
        return self.get(name, rounded=True)

    def get(self, name: str, *, rounded: bool) -> Any:
        """The constant as a kernel wants it. Raises KeyError for a name that is none."""
        key = (name, rounded and self._arithmetic.value is not None)
        if key in self._kept:
            self._kept[key] = kept = self._kept.pop(key)
            return kept
        value = self._arithmetic.hold(self._read(name), self._device)
        if rounded:
            value = self._arithmetic.round_constant(value)
        if value.nbytes <= self._limit:
            self._kept[key] = value
            self._held += value.nbytes
            while self._held > self._limit:
                self._held -= self._kept.pop(next(iter(self._kept))).nbytes
        return value

    def numbers(self, name: str) -> torch.Tensor | None:
        """The constant in its shape, those of types that torch lacks (some FP8, 2 and 4 bits) in float64; None where
        there are no real numbers, and for a name that is no constant."""
        value = self[name] if self.holds(name) else None
        if isinstance(value, np.ndarray) and value.dtype.kind not in "OSUc":
            return torch.from_numpy(value.astype(np.float64))
        return value if isinstance(value, torch.Tensor) and not value.is_complex() else None

    def shape(self, name: str) -> tuple[int, ...] | None:
        """The shape of a constant of numbers, an initializer's without reading it; None as for ``numbers``."""
        if name in self._graph.initializers:
            return tuple(self._graph.weight(name).dims)
        value = self.numbers(name)
        return None if value is None else tuple(value.shape)

    def _read(self, name: str) -> Any:
        node = self._constants.get(name)
        return self._graph.initializer(name) if node is None else constant(node)
