"""Differences between the two graphs at a layer, where both programs are at hand, proved by computing them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor

from cp_debug.backends.executor import Executor
from cp_debug.backends.kernels.paired_sums import INTEGER_PRODUCTS
from cp_debug.bisect.candidate_run import CandidateRun, loader
from cp_debug.bisect.causes import affine, batchnorm
from cp_debug.bisect.causes.base import CAUSES, Candidate, Cause
from cp_debug.bisect.causes.file_scales import wrong_scale
from cp_debug.bisect.causes.other_program import OtherPiece, OtherProgram, reordered
from cp_debug.bisect.causes.search import Explanation, accepted, explain
from cp_debug.bisect.causes.segment import Segment
from cp_debug.errors import InputError
from cp_debug.graph.constants import Constants
from cp_debug.graph.flatten import name_in_file
from cp_debug.graph.graph import Node
from cp_debug.graph.operators import QUANTIZERS, VIEWS
from cp_debug.graph.spelled_out import computes_with_levels, spelled_out
from cp_debug.probes.held import CapturedRun
from cp_debug.programs.node_differences import ACTIVATIONS, NodeDifference
from cp_debug.safe_text import amount, some

FOLDED = {"channels-scaled", "other-weights", "weights-scaled", "bias-scaled"}
"""Causes that a weight comparison finds when another BatchNorm was folded into the weights."""
_OF_NORMS = ("batchnorm", "normalization")
"""Beginnings of the names of causes about a BatchNormalization."""
_NORMS = [family for family in CAUSES if family.emulate.__module__ in (affine.__name__, batchnorm.__name__)]
"""Families of these, and of what a BatchNormalization adds to channels."""
_OF_WEIGHTS = ("int8-axis", "int8-per-tensor", "int8-weights")
"""Causes about the scales of weights that tell more than that one of them clips."""
FEW = 3
"""Elements of a constant that are no dense tensor."""
_STORED = {onnx.TensorProto.FLOAT16: "fp16", onnx.TensorProto.BFLOAT16: "bf16"}
_EFFECTS = {"Gather": "permuted", "Transpose": "transposed", **dict.fromkeys(("Clip", "Max", "Min"), "saturated")}
"""Operator → name of what one of it does."""
HARMLESS = 1e-3
"""Part of what the test has changed up to which a difference by itself changes nothing."""
SHOWN = 3
"""Differences in one line."""
_OF_FILES = {"constant", "instead_of"}
"""Evidence of causes that say what a file has otherwise: a constant, an attribute."""
READ_OFF = "the difference of the two graphs"


Failed = Callable[[Exception], None]
"""Receives the error of a cause that could not be tried."""
ByValues = Callable[[], tuple[Explanation, Cause | None]]
"""Explains a layer by its values, which takes seconds: once, and only if asked for."""


def difference(piece: OtherPiece) -> tuple[Candidate | None, list[NodeDifference]]:
    """The differences of the two graphs at a layer, and a candidate: the test's own nodes computed on the oracle.

    No candidate where the graphs are equal, where the test's nodes cannot be computed, or where the test only adds
    nodes, which have better names as causes.
    """
    rewritten, node_differences = piece.matched.is_rewritten, piece.matched.differences()
    if not node_differences:
        return None, []
    if rewritten and (candidate := _of_constants(piece)) is not None:
        return candidate, node_differences
    wrong, harmless = _tried_alone(piece, node_differences)
    node_differences = [*wrong, *harmless]
    telling = [d for d in wrong if not d.added and not (d.structural and rewritten)]
    if not (telling or rewritten) or (value := piece.result) is None:
        return None, wrong
    # One difference, or one that a node was told, says more than where elements come from.
    unclear = len(node_differences) > 1 and all(d.structural or d.evidence.get("change") == "shape" for d in telling)
    moved = _moved(piece) if unclear else None
    if not (telling or moved):
        return None, wrong
    first = moved or telling[0]
    says = first.says if moved else _says(telling if rewritten else node_differences)
    evidence = _read(first)
    if len(node_differences) > 1 and not moved:
        evidence["differences"] = [d.says for d in node_differences[:8]]
    fix = _fix([first] if moved else [d for d in wrong if d in telling or not rewritten])
    if "training_mode" in first.evidence:
        side = "test" if first.evidence["training_mode"] else "reference"
        fix = f"call eval() before the export of the {side}, for {{layers}}"
    return Candidate(first.cause, says, value, 0, evidence, fix), node_differences


def _moved(piece: OtherPiece) -> NodeDifference | None:
    """From where the test's nodes take the elements of the one value that they read, if both sides only move them.

    Both sides are run on the places of the elements instead of on the elements, so that it does not matter by which and
    how many operators each of them moves: merged Slices, Transposes, Reshapes. None for all else.
    """
    segment = piece.segment
    if len(segment.given) != 1 or len(piece.starts) != 1:
        return None
    (name,) = segment.given
    read = segment.input(name)
    places = torch.arange(1, read.numel() + 1, dtype=torch.float64).reshape(read.shape)
    try:
        ours = segment.run(segment.context.oracle.arithmetic, values={name: places})
        theirs = piece.run({piece.starts[0]: places})
    except InputError:
        return None
    elements = torch.cat([torch.zeros(1, dtype=torch.float64), read.flatten()])
    for found, result in ((ours, segment.exact), (theirs, segment.test)):
        # What computes something gives other numbers than the elements at these places; 0 is what was padded.
        valid = found.shape == result.shape and bool(((found >= 0) & (found <= read.numel())).all())
        if not valid or not bool((found == found.round()).all()):
            return None
    if not torch.equal(elements[ours.long()], segment.exact) or torch.equal(ours, theirs):
        return None
    was, now = (torch.stack(torch.unravel_index(found.long().flatten() - 1, read.shape)) for found in (ours, theirs))
    ops = ", ".join(dict.fromkeys(node.op for node in segment.nodes if node.op != "Constant"))
    shift = now - was
    if bool(ours.all()) and bool(theirs.all()) and bool((shift == shift[:, :1]).all()):
        axes = [axis for axis, by in enumerate(shift[:, 0].tolist()) if by]
        before, after = (tuple(found[axes, 0].tolist()) for found in (was, now))
        which = f"axis {axes[0]}" if len(axes) == 1 else f"axes {', '.join(map(str, axes))}"
        begins = [str(place[0] if len(axes) == 1 else place) for place in (after, before)]
        says = f"{ops} of {name} begins at {begins[0]} instead of {begins[1]} on {which}"
        evidence = {"starts": list(after), "instead_of": list(before), "axes": axes}
        return NodeDifference("index-shifted", says, segment.nodes[-1].name, evidence)
    if (slices := _other_slices(was, now, ours, theirs)) is not None:
        return NodeDifference("permuted", slices[0], segment.nodes[-1].name, slices[1])
    wrong = (ours != theirs).flatten()
    first = int(wrong.nonzero()[0])
    at = [int(i) for i in torch.unravel_index(torch.tensor(first), ours.shape)]
    from_, wanted = (
        f"{name}{found[:, first].tolist()}" if any_.flatten()[first] else "a padded 0"
        for found, any_ in ((now, theirs), (was, ours))
    )
    share = float(wrong.double().mean())
    says = f"{share:.0%} of the elements of {ops} are from other places: {at} is {from_} instead of {wanted}"
    return NodeDifference("permuted", says, segment.nodes[-1].name, {"moved": share})


def _other_slices(was: Tensor, now: Tensor, ours: Tensor, theirs: Tensor) -> tuple[str, dict[str, Any]] | None:
    """Which slices along one axis a result holds, in words and figures, where it holds others of what is read along one
    axis. ``was`` and ``now`` are the places [axes, elements] in what is read, of which ``ours`` and ``theirs`` hold the
    numbers; None for anything else."""
    axes = [axis for axis in range(len(was)) if not torch.equal(was[axis], now[axis])]
    for axis in range(ours.dim()) if len(axes) == 1 and bool(ours.all()) and bool(theirs.all()) else ():
        rows = [found[axes[0]].reshape(ours.shape).movedim(axis, 0).flatten(1) for found in (now, was)]
        if all(bool((each == each[:, :1]).all()) for each in rows):
            holds, wanted = (each[:, 0].tolist() for each in rows)
            whole = holds != sorted(holds) and wanted == sorted(wanted) == sorted(holds)
            how = " (repeated as a whole, not each by itself)" if whole and len({*holds}) < len(holds) else ""
            along = f" along its axis {axes[0]}" if axes[0] != axis else ""
            says = f"axis {axis} holds slices {some(holds)} of what is read{along} instead of {some(wanted)}{how}"
            return says, {"axis": axis, "order": holds[:64], "instead_of": wanted[:64]}
    return None


def _tried_alone(
    piece: OtherPiece, differences: Sequence[NodeDifference]
) -> tuple[list[NodeDifference], list[NodeDifference]]:
    """The differences that may be wrong, each tried alone, and those that change nothing here, which are told so. One
    that makes what the test has is all that is wrong."""
    segment, constants = piece.segment, piece.other.constants
    nodes = {node.name: node for node in segment.nodes}
    moved = HARMLESS * float(torch.nan_to_num(segment.test - segment.exact, 0.0, 0.0, 0.0).norm())
    telling, harmless, alone = list[NodeDifference](), list[NodeDifference](), list[NodeDifference]()
    for each in differences:
        value = None
        if len(differences) > 1 and each.node in nodes and (each.attributes or each.inputs):
            inputs = {place: torch.from_numpy(constants[name]) for place, name in each.inputs.items()}
            value = segment.edited(nodes[each.node], inputs=inputs, **each.attributes)
        near = [value is not None and _is_near(value, side, moved) for side in (segment.exact, segment.test)]
        if near[0]:
            harmless.append(replace(each, says=f"{each.says} (which changes nothing here)"))
        else:
            (alone if near[1] else telling).append(each)
    return (alone or telling, harmless) if alone or telling else (list(differences), [])


def _is_near(value: Tensor, side: Tensor, distance: float) -> bool:
    """Whether a result has a side's NaN and Inf, and is no farther from it than an L2 ``distance``."""
    if value.shape != side.shape or not torch.equal(torch.isfinite(value), torch.isfinite(side)):
        return False
    return float(torch.nan_to_num(value - side, 0.0, 0.0, 0.0).norm()) <= distance


def _of_constants(piece: OtherPiece) -> Candidate | None:
    """The constants of one node that the test holds changed, put into the reference's own nodes: which other operators
    the test has for them does not matter."""
    segment, theirs, pieces = piece.segment, piece.other.constants, piece.matched
    changed = {d.name: d for d in piece.other.weights.differing}
    differences: list[tuple[Node, NodeDifference]] = []
    tensors: dict[int, Tensor] = {}
    for node in segment.nodes:
        for place, name in enumerate(node.proto.input):
            weight = segment.weight(node, place) if name in changed else None
            array = theirs[changed[name].test_name] if weight is not None else None
            if weight is None or array is None or array.dtype.kind != "f" or array.shape != tuple(weight.shape):
                continue
            differences.append((node, pieces.of_constant(node, place, changed[name].change)))
            tensors[place] = torch.from_numpy(array.astype(np.float64))
    if not differences or any(node is not differences[0][0] for node, _ in differences):
        return None
    node, first = differences[0]
    if (value := segment.edited(node, inputs=tensors)) is None:
        return None
    evidence = _read(first) | {"read_off": "the weights of the two graphs"}
    found = [d for _, d in differences]
    return Candidate(first.cause, _says(found), value, 0, evidence, _fix(found))


def added(piece: OtherPiece, additions: Sequence[NodeDifference], by_values: ByValues) -> Candidate | None:
    """The candidate of nodes that only the test has, where they are all that differs: what they do has the name that
    the layer's values alone give it. None without a name, where they read a dense constant: that may be anything."""
    if not additions or not all(d.added for d in additions):
        return None
    segment, nodes, theirs = piece.segment, piece.matched.added, piece.other.constants
    ops = [node.op for node in nodes]
    if {"Constant", *INTEGER_PRODUCTS} & {*ops} or {*ops} <= VIEWS or (value := piece.result) is None:
        return None
    if segment.strange and not torch.equal(torch.isfinite(value), torch.isfinite(segment.test)):
        return None
    name, says = "extra-operator", f"{_counted(ops)} {'is' if len(ops) == 1 else 'are'} added: {nodes[0].name}"
    if set(ops) <= QUANTIZERS:
        if not segment.strange:  # what a sound scale makes of it is expected: the pair is no cause
            return None
        name = "int8"
    elif len(nodes) == 1 and ops[0] in ACTIVATIONS and ops[0] != "Clip":
        doubled = any(node.op == ops[0] for node in piece.matched.common)
        name = "doubled-activation" if doubled else "extra-activation"
    else:
        does = by_values()[0].cause if ops[0] == "Cast" or any(n in theirs for m in nodes for n in m.inputs) else None
        if does is not None and not does.observed and not {"constant", "constants"} & does.evidence.keys():
            # What changes an operand is no change of what the layer makes of it.
            name, says = name if "operand" in does.evidence else does.cause, f"{says}: {does.says}"
        elif not (name := _name_of(nodes, theirs, value.numel()) if nodes[-1] is piece.nodes[-1] else name):
            return None
    return Candidate(name, says, value, 0, _read(additions[0]), f"undo the difference at {{layers}}: {says}")


def _name_of(nodes: Sequence[Node], constants: Constants, count: int) -> str:
    """The name of what added nodes do to ``count`` elements, where values do not tell, as of few; empty for a dense
    constant."""
    held = [np.asarray(constants[n]) for node in nodes for n in node.inputs if n in constants]
    node, alone = nodes[0], len({node.op for node in nodes}) == 1
    if node.op == "Cast" and alone:
        to = [each.attribute("to", 0) for each in nodes]
        return next((name for kind, name in _STORED.items() if kind in to), "extra-operator")
    if node.op in _EFFECTS and len(nodes) == 1 and all(np.unique(own).size == own.size for own in held):
        return _EFFECTS[node.op]
    kind = {"Mul": "scaled", "Div": "scaled", "Add": "shifted", "Sub": "shifted"}.get(node.op)
    if kind is not None and len(nodes) == len(held) == 1:
        (own,) = held
        if own.size == 1 or count > own.size == max(own.shape):
            return kind if own.size == 1 else f"channels-{kind}"
        return "isolated" if (own != (kind == "scaled")).sum() <= FEW else ""
    return "" if any(each.size > FEW for each in held if each.dtype.kind == "f") else "extra-operator"


def _written_out(piece: OtherPiece) -> Candidate | None:
    """The candidate of operators that the test has others for, where these, without any rounding, give another result.
    None where they read constants that the reference's do not: what those hold may be what is wrong."""
    segment, theirs = piece.segment, piece.other.constants
    nodes, others = piece.matched.replaced
    told = nodes or not {m.op for m in others} <= QUANTIZERS  # that there are pairs tells nothing
    if not others or not told or segment.test.shape != segment.exact.shape:
        return None
    ours = Constants(segment.graph)
    digests = {ours.digest(name) for node in nodes for name in node.inputs if name in ours}
    read = {n for m in others for n in m.inputs if n in theirs}
    if any(theirs.size(n) > FEW and theirs[n].dtype.kind == "f" and theirs.digest(n) not in digests for n in read):
        return None
    try:
        value = piece.run()
    except InputError:  # an operator that nobody here can compute
        return None
    if value.shape != segment.test.shape:
        return None
    ops, test_ops = [n.op for n in nodes], [n.op for n in others]
    differences = piece.matched.differences()
    says = f"{_counted(ops)} {'is' if len(ops) == 1 else 'are'} computed by {_counted(test_ops)}"
    exchanged = all("test_op" in d.evidence for d in differences if d.structural)
    says = _says(differences) if exchanged or not nodes else f"{says} in the test, with another result"
    first = (*nodes, *others)[0]
    evidence = {"node": first.name, "op": first.op, "test_ops": test_ops, "read_off": READ_OFF}
    fix = f"restore {_counted(ops)} at {{layers}}" if nodes else _fix(differences)
    return Candidate("other-operator", says, value, 0, evidence, fix)


def _folded(piece: OtherPiece, differences: Sequence[NodeDifference]) -> bool:
    """Whether a layer's weights may hold a BatchNormalization, its own or another's, or its node may be another's."""
    segment = piece.segment
    norms = {n.name for n in (*segment.nodes, *piece.nodes) if n.op == "BatchNormalization"}
    if any(n.op == "BatchNormalization" for n in piece.nodes):
        # It is there, with nothing folded: what differs is its constants, or it is not about norms.
        return len(segment.context.batch_norms) > 1 and any(d.node in norms for d in differences)
    return segment.batch_norm is not None or bool(segment.context.batch_norms)


def _fix(differences: Sequence[NodeDifference]) -> str:
    """What undoes all of the differences."""
    changed = [
        (name_in_file(d.evidence["constant"]), d.evidence["change"] in ("fp16", "bf16"))
        for d in differences
        if _kept(d)
    ]
    wide, same = (", ".join(name for name, narrow in changed if narrow is kind) for kind in (True, False))
    rest = _says([d for d in differences if not _kept(d)])
    told = [f"store {wide} in FP32 on both sides", f"use the same {same} on both sides"]
    told += [f"undo the difference at {{layers}}: {rest}"]
    return " · ".join(text for text, of in zip(told, (wide, same, rest), strict=True) if of)


def _kept(difference: NodeDifference) -> bool:
    """Whether a difference is that of a constant."""
    return "change" in difference.evidence


def _read(difference: NodeDifference) -> dict[str, Any]:
    return {"node": difference.node, **difference.evidence, "read_off": READ_OFF}


def _says(differences: Sequence[NodeDifference]) -> str:
    left_out = [d.evidence["op"] for d in differences if d.says == f"{d.evidence.get('op')} is left out"]
    together = f"{_counted(left_out)} are left out"
    says = [together if len(left_out) > 1 and d.evidence.get("op") in left_out else d.says for d in differences]
    says = list(dict.fromkeys(says))
    more = f"; and {amount(len(says) - SHOWN, 'more difference')}" if len(says) > SHOWN else ""
    return "; ".join(says[:SHOWN]) + more


def _counted(ops: Iterable[str]) -> str:
    """Operators in words, each once: ``Mul, 3 × Gather``."""
    return some([f"{count} × {op}" if count > 1 else op for op, count in Counter(ops).items()])


def _readings(
    piece: OtherPiece,
    read: Candidate | None,
    differences: Sequence[NodeDifference],
    by_values: ByValues,
) -> Iterator[tuple[Candidate, tuple[str, ...]]]:
    """What the two graphs tell of a layer, ``read`` first, and beginnings of the names of causes that tell more of it,
    if the layer's values alone have one."""
    of_pairs = piece.segment.context.quantized is not None  # whose scales have causes of their own
    if read is not None:
        several = len(differences) > 1 and read.cause.startswith(_OF_NORMS)
        folded = (several or read.cause in FOLDED) and _folded(piece, differences)
        yield read, (*_OF_NORMS, "channels-shifted") if folded else ()
    scale = wrong_scale(piece)
    one = piece.segment.product is not None  # a region of several has no scale that is its own
    if scale is not None and (not one or scale.evidence.get("of") == "weights" or "channels" in scale.evidence):
        yield scale, _OF_WEIGHTS if of_pairs and one else ()
        scale = None
    candidate = scale or added(piece, differences, by_values)
    if candidate is not None:
        yield candidate, ("int8",) if of_pairs and candidate.cause.startswith("int8") else ()


def _beside(explanation: Explanation, differences: Sequence[NodeDifference]) -> Explanation:
    """An explanation by values, with the differences of the two graphs."""
    says = [d.says for d in differences]
    if explanation.cause is None:  # what an added node does has no name here: it is told, not called a cause
        explanation.graphs_differ = tuple(says[:SHOWN])
    elif says:
        explanation.cause.evidence.setdefault("graphs_differ", says[:4])
    return explanation


class GraphReader:
    """Explains the layers of a test that runs another graph than the reference, by what that has different there."""

    def __init__(self, run: CandidateRun, test: CapturedRun) -> None:
        self._run, self._test = run, test
        self._others: dict[str, OtherProgram | None] = {}

    def explain(
        self, component: str, segment: Segment, families: Sequence[Cause], failed: Failed, asked: Sequence[Cause]
    ) -> tuple[Explanation, Cause | None]:
        """The explanation of a layer by a difference of the two graphs, else by the causes ``asked`` (``search``)."""
        by_values = cache(lambda: explain(segment, families, failed, asked))
        try:
            return self._explain(component, segment, failed, by_values)
        except Exception as error:  # explaining never ends a run: another explanation may do
            failed(error)
            return by_values()

    def of_shape(self, component: str, segment: Segment) -> Candidate | None:
        """The difference of the two graphs at a layer whose shape is another one on each side.

        None without one, and where the test's own nodes do not make the shape that the test has.
        """
        piece = self._piece(component, segment)
        if piece is None:
            return None
        differences = piece.matched.differences()
        telling = [d for d in differences if not d.added]
        if not telling or (value := piece.result) is None:
            return None
        first = telling[0]
        return Candidate(first.cause, _says(differences), value, 0, _read(first), _fix(differences))

    def _explain(
        self, component: str, segment: Segment, failed: Failed, by_values: ByValues
    ) -> tuple[Explanation, Cause | None]:
        if (piece := self._piece(component, segment)) is None:
            return by_values()
        read, differences = difference(piece)
        moved = reordered(piece, differences)
        if moved is not None and (read_off := accepted(segment, moved)) is not None:
            return read_off, None
        for candidate, better in _readings(piece, read, differences, by_values):
            # All families take seconds, and name no norm where no family of norms explains the layer.
            of_norms = _OF_NORMS[0] in better
            asked = better and (not of_norms or explain(segment, (), failed, _NORMS)[0].cause is not None)
            explanation, family = by_values() if asked else (Explanation(None, 0.0, None, 0.0), None)
            if explanation.cause is not None and explanation.cause.cause.startswith(better):
                return _beside(explanation, differences), family
            if (read_off := accepted(segment, candidate)) is not None:
                return read_off, None
        explanation, family = by_values()
        # Both files are at hand: what an attribute or a constant seems to be is no cause where they hold it alike.
        seems = explanation.cause is not None and not _OF_FILES.isdisjoint(explanation.cause.evidence)
        written_out = _written_out(piece) if explanation.cause is None or seems else None
        if written_out is not None and (read_off := accepted(segment, written_out)) is not None:
            return read_off, None
        return _beside(explanation, differences), family

    def _piece(self, component: str, segment: Segment) -> OtherPiece | None:
        """The test's nodes at a layer; None where both sides run the same."""
        other = self._other(component) if segment.nodes else None
        known = {*self._run.replayer(component, self._test).known, *(v.name for v in segment.graph.inputs)}
        return None if other is None else other.piece(segment, known)

    def _other(self, component: str) -> OtherProgram | None:
        """The test's graph, where it differs from the reference's for other reasons than quantization by cpdebug."""
        if component not in self._others:
            ours = self._run.programs[component].graph
            program = self._run.pipeline.program(component)
            other = None
            if program.graph is not ours and program.plain is not ours:
                # Where both sides compute with levels, their operators are compared as they are.
                graph = program.graph if computes_with_levels(ours) else spelled_out(program.graph)
                oracle = self._run.replayer(component, self._test).oracle
                names = self._run.names(component)
                executor = Executor(graph, oracle.arithmetic, oracle.device)
                other = OtherProgram(graph, ours, names, loader(self._test, component), executor)
            self._others[component] = other
        return self._others[component]
