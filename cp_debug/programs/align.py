"""Torch modules that produced the values of the deployed graph: found by numbers, kept beside the ONNX file."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import onnx
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from cp_debug.backends.determinism import deterministic
from cp_debug.backends.executor import Executor
from cp_debug.errors import InputError
from cp_debug.graph.exporter_notes import scope_hints
from cp_debug.graph.graph import Graph, Node, data_values, from_inputs
from cp_debug.probes.alignment import Alignment, Departure, Link
from cp_debug.probes.arrays import is_dense
from cp_debug.probes.fingerprint import Fingerprint, fingerprint
from cp_debug.probes.module_state import stored_tensors
from cp_debug.probes.trace import TorchValue, Trace, trace
from cp_debug.programs.export import DECISIONS
from cp_debug.programs.export_faults import Behind, explained
from cp_debug.programs.matching import Matching, nearest
from cp_debug.programs.torch_span import TorchSpan

TOLERANCE = 1e-4
"""Relative L2 distance up to which two FP32 computations of one value are the same."""
_NARROW = {"fp16": 1e-2, "bf16": 8e-2}
"""``TOLERANCE`` for graphs that hold values in FP16 or BF16, which torch rounds where the executor does not: about ten
times a rounding, for what adds up over layers."""

_MOST_KEPT = 4 << 30
"""Bytes of torch's tensors that are held to go on behind a fault."""


def align(graph: Graph, module: nn.Module, args: Sequence[Tensor], *, prefix: str = "") -> Alignment:
    """Run graph and module once each on ``args`` (FP32, CPU, in the graph's input order) and match their values.

    Memory holds fingerprints, never both runs, unless an output is not what the module returned: then both run again,
    and where the graph computes something else, torch's own tensors stand in its place. The graph is executed in FP32,
    with the random numbers that the module drew. Raises ModuleFailed when the module raises, InputError when the graph
    takes another number of inputs.
    """
    names = [info.name for info in graph.inputs]
    if len(names) != len(args):
        raise InputError(f"{graph}: the graph takes {len(names)} inputs {names}; {len(args)} were given")
    inputs = dict(zip(names, args, strict=True))
    data = set(data_values(graph))
    torch_prints: dict[TorchValue, Fingerprint] = {}
    onnx_prints: dict[str, Fingerprint] = {}

    def keep_torch(value: TorchValue, tensor: Tensor) -> None:
        if value not in torch_prints:
            torch_prints[value] = fingerprint(tensor)

    def keep_onnx(name: str, tensor: Any) -> None:
        if name in data:
            with contextlib.suppress(TypeError):  # a dtype without numbers in it, or that torch lacks
                onnx_prints[name] = fingerprint(tensor)

    with deterministic():
        with (draws := Draws()):
            record = trace(module, inputs, keep_torch, prefix=prefix)
        Executor(graph, drawn=draws.of).run(inputs, keep_onnx)

    called = [call[len(prefix) :].removeprefix(".") for call in record.calls]
    hints = {name: ".".join(p for p in (prefix, path) if p) for name, path in scope_hints(graph, called).items()}
    tolerance = _NARROW.get(graph.precision, TOLERANCE)
    matching = Matching(graph, data, onnx_prints, record, torch_prints, hints, tolerance)
    outputs = zip(graph.outputs, record.tensors, strict=False)
    returned = {info.name: fingerprint(tensor) for info, tensor in outputs if is_dense(tensor)}
    wrong = [n for n, own in onnx_prints.items() if n in returned and own.distance(returned[n]) > tolerance]
    departures = _departures(graph, module, inputs, prefix, data, record, matching) if wrong else []
    props = {entry.key: entry.value for entry in graph.proto.metadata_props}
    return Alignment(
        graph_sha256=graph.digest,
        module_sha256=module_digest(module),
        prefix=prefix,
        exporter=props.get("cpdebug.exporter"),
        folded={"true": True, "false": False}.get(props.get("cpdebug.folded", "")),
        opset=graph.opsets.get(""),
        versions={"torch": torch.__version__, "onnx": onnx.__version__},
        departures=departures,
        decisions=props.get(DECISIONS, "").splitlines(),
        **_links(graph, data, matching, record, hints),
        **_modules(matching, record),
    )


def _departures(
    graph: Graph,
    module: nn.Module,
    inputs: Mapping[str, Tensor],
    prefix: str,
    data: Collection[str],
    record: Trace,
    matching: Matching,
) -> list[Departure]:
    """Where the graph computes something else than the module; torch's tensors stand there from now on."""
    tensors: dict[int, Tensor] = {}
    left = _MOST_KEPT

    def keep(value: TorchValue, tensor: Tensor) -> None:
        nonlocal left
        if value.index not in tensors and tensor.nbytes <= left:
            tensors[value.index] = tensor.clone()
            left -= tensor.nbytes

    with deterministic(), (draws := Draws()):
        again = trace(module, inputs, keep, prefix=prefix, operations=True)
    if [v.name for v in again.values] != [v.name for v in record.values]:
        return []  # a module that goes another way each time
    for value, same in zip(record.values, again.values, strict=True):
        value.operation = same.operation and same.operation.among(record.values)
    kept = {value: tensors[value.index] for value in record.values if value.index in tensors}
    record.tensors = again.tensors
    with deterministic():
        behind = Behind(graph, Executor(graph, drawn=draws.of), matching, data, record, kept, inputs)
        faults = behind.faults()
    return [explained(fault, TorchSpan(fault.value, fault.between, kept), graph, prefix) for fault in faults]


def _links(
    graph: Graph, data: Collection[str], matching: Matching, record: Trace, hints: Mapping[str, str]
) -> dict[str, Any]:
    fed = set(from_inputs(graph))
    leaf_outputs = {value for values in record.leaves.values() for value in values}
    # Where several ONNX values equal one torch value, its name goes to the one that finishes it.
    finished = {
        value: name
        for name, (value, _) in matching.pairs.items()
        if name in graph.producer and graph.producer[name].op not in ("Identity", "Cast")
    }
    links: list[Link] = []
    unmatched = []
    for name in graph.values:
        if name not in data:
            links.append(Link(name, "shape" if name in fed else "constant", name))
        elif name in matching.pairs:
            value, error = matching.pairs[name]
            kind = "input" if value.op == "input" else "module" if value in leaf_outputs else "function"
            layer = value.name if finished.get(value, name) == name else f"{value.name}/{graph.producer[name].op}"
            links.append(Link(name, kind, layer, value.name, value.path, error))
        elif results := [n for n in matching.next_matched(name) if matching.consistent(n)]:
            # Where several modules lie between, the exporter's record tells which of them this step is from.
            hinted = [n for n in results if matching.pairs[n][0].path == hints.get(name)]
            value, error = matching.pairs[(hinted or results)[0]]
            op = graph.producer[name].op
            links.append(Link(name, "step", f"{value.name}/{op}", None, hints.get(name, value.path), error))
        else:
            unmatched.append(name)
    return {"links": links, "unmatched_values": unmatched}


def _modules(matching: Matching, record: Trace) -> dict[str, Any]:
    readers = record.readers()
    onnx_of = {value: name for name, (value, _) in reversed(matching.pairs.items())}
    outputs = {value for value in record.outputs if value is not None}
    absorbed, unused, unmatched = {}, [], []
    for call, values in record.leaves.items():
        matched = [v for v in values if v in onnx_of]
        if any(v.call == call for v in matched):
            continue
        if matched:  # an identity
            absorbed[call] = matched[0].name
            continue
        readers_matched, passed = set[TorchValue](), set[TorchValue]()
        for value in values:
            after, between = nearest(value, lambda v: readers.get(v, []), onnx_of.__contains__)
            readers_matched.update(after)
            passed.update([value, *between])
        layers = sorted((v for v in readers_matched if matching.consistent(onnx_of[v])), key=lambda v: v.index)
        if layers:
            absorbed[call] = layers[0].name
        elif readers_matched or passed & outputs:
            unmatched.append(call)
        else:
            unused.append(call)
    return {"modules": list(record.leaves), "absorbed": absorbed, "unused": unused, "unmatched_modules": unmatched}


def module_digest(module: nn.Module) -> str:
    """SHA-256 of the names and values of all weights and buffers.

    Raises InputError where one has no values: its maker exchanged it while the module was exported.
    """
    sha = hashlib.sha256()
    for name, tensor in stored_tensors(module).items():
        sha.update(name.encode())
        try:
            sha.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        except (RuntimeError, NotImplementedError) as error:
            lost = f"{name!r} has no values any more ({type(tensor.data).__name__})"
            raise InputError(f"MODEL: weight {lost}: a forward pass replaced it") from error
    return sha.hexdigest()


_UNIFORM, _NORMAL, _COIN, _CHOICE = "uniform", "normal", "coin", "choice"
_TORCH = {
    **dict.fromkeys(("rand", "rand_like", "uniform", "uniform_"), _UNIFORM),
    **dict.fromkeys(("randn", "randn_like", "normal", "normal_", "normal_functional"), _NORMAL),
    **dict.fromkeys(("bernoulli", "bernoulli_", "native_dropout"), _COIN),
    "multinomial": _CHOICE,
}
_ONNX = {
    **dict.fromkeys(("RandomUniform", "RandomUniformLike"), _UNIFORM),
    **dict.fromkeys(("RandomNormal", "RandomNormalLike"), _NORMAL),
    **dict.fromkeys(("Bernoulli", "Dropout"), _COIN),
    "Multinomial": _CHOICE,
}


class Draws(TorchDispatchMode):
    """Context that keeps what ATen's random operators return while a module runs; later it answers for ONNX nodes."""

    def __init__(self) -> None:
        super().__init__()
        self._kept: dict[str, list[Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        results = func(*args, **(kwargs or {}))
        name = func._overloadpacket.__name__
        if (kind := _TORCH.get(name)) is not None:
            drawn = results[1] if name == "native_dropout" else results
            self._kept.setdefault(kind, []).append(drawn.detach().clone())
        return results

    def of(self, node: Node, inputs: Sequence[Any]) -> Tensor | None:
        """The next tensor that torch drew as ``node`` does, in FP32; None where none of its shape is left.

        ``inputs`` are those of the node. For a Dropout it is the result: the input where the coin says so, scaled.
        """
        drawn_tensors = self._kept.get(_ONNX.get(node.op, ""), [])
        like = inputs[0].shape if node.op.endswith("Like") or node.op in ("Bernoulli", "Dropout") else None
        place = next((i for i, tensor in enumerate(drawn_tensors) if like is None or tensor.shape == like), None)
        if place is None:
            return None
        drawn = drawn_tensors.pop(place)
        if node.op != "Dropout":
            return drawn if node.op == "Multinomial" else drawn.float()
        ratio = float(inputs[1]) if len(inputs) > 1 and inputs[1] is not None else 0.5
        return torch.where(drawn > 0, inputs[0] / (1 - ratio), torch.zeros_like(inputs[0]))
