"""NaN and Inf that arise in a layer: their cause, and the operands that they come from."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from cp_debug.backends.arithmetic import ARITHMETICS, FP64
from cp_debug.bisect.causes.base import Candidate, cause
from cp_debug.bisect.causes.segment import Segment
from cp_debug.safe_text import amount, in_digits


@cause(approximate=True)
def lost(segment: Segment) -> Iterator[Candidate]:
    """Candidates: NaN or Inf that arise of a number that is 0, 1 or −1 in the declared precision, as in log(ε) and
    1 ÷ (1 − p): in a constant, in what the layer reads, or in what the nodes in front of its last one make."""
    name, oracle, constants = segment.context.claim.name, segment.context.oracle, segment.context.constants
    stored = ARITHMETICS[name].value if name in ARITHMETICS else None
    if not segment.strange or stored is None:
        return
    read = dict.fromkeys(each for node in segment.nodes for each in node.inputs)
    values = {each: constants[each] if constants.holds(each) else segment.given.get(each) for each in read}
    oracle.run_nodes(segment.nodes, segment.given, [segment.target], lambda each, value: values.update({each: value}))
    for each in read:
        if not hasattr(values[each], "dtype") or (exact := FP64.hold(values[each], "cpu")).dtype != torch.float64:
            continue  # a sequence, whole numbers
        held, maker = stored(exact.float()).double(), segment.graph.producer.get(each)
        of = maker.name if maker is not None and maker.op != "Constant" else each
        if not (what := rounded_off(exact, held, name, f" of {of}")):
            continue
        value = segment.run(oracle.arithmetic, values={each: torch.where(ends(held), held, exact)})
        if not bool(value[segment.new_nonfinite].isfinite().all()):
            says, fix = f"{_born(segment)}: {what}", "scale it, or keep {layers} in FP32"
            yield Candidate("nonfinite", says, segment.claimed, 0, operands(segment), fix, heard=True, declared=True)


def rounded_off(exact: Tensor, held: Tensor, kind: str, of: str = "") -> str:
    """``1e-12 is 0 in FP16``, of a number that is not 0, 1 or −1, but is so as it is held in a type, and loses most.

    Both tensors are float64 of one shape. Empty where there is none. ``of``: words about whose number it is.
    """
    gone = ends(held) & (exact != held)
    if not bool(gone.any()):
        return ""
    exact, held = exact[gone], held[gone]
    most = int(((exact - held) / exact).abs().argmax())
    return f"{in_digits(float(exact[most]))}{of} is {in_digits(float(held[most]))} in {kind.upper()}"


def ends(values: Tensor) -> Tensor:
    """Mask, bool, of the elements of a float tensor that are 0, 1 or −1."""
    return (values.abs() == values.square()) & values.isfinite()


@cause()
def made_of_numbers(segment: Segment) -> Iterator[Candidate]:
    """Candidates: a factor that overflowed, so that 0·Inf is NaN and all else Inf; NaN where the exact value is 0
    (0 ÷ 0), or throughout; and what algebra says of numbers, said of NaN and Inf: x·0 is 0, x − x is 0, x ÷ x is 1."""
    if not segment.strange:
        return
    exact, node = segment.exact, segment.nodes[-1] if segment.nodes else None
    guard = "guard the division in {layers} with an epsilon"
    for cause_name, says, value, fix in (
        # Of what the precision makes: a value that it rounds to 0, or past it, gives NaN or the other Inf.
        *(
            ("times-infinity", "the result is multiplied by Inf: its zeros become NaN", segment.claimed * infinity,
             "find the scale that is Inf: {layers}")
            for infinity in (torch.inf, -torch.inf)
        ),
        ("nan-at-zero", "NaN exactly where the result should be 0: a division of zeros",
         torch.where(exact == 0, torch.nan, exact), guard),
        ("nan-everywhere", "the whole tensor is NaN", torch.full_like(exact, torch.nan), guard),
    ):  # fmt: skip
        yield Candidate(cause_name, says, value, evidence=operands(segment), fix=fix)
    weights = (segment.weight(node, place) for place in (0, 1) if node is not None)
    zero, same = any(w is not None and not w.any() for w in weights), node is not None and len(set(node.inputs)) == 1
    for op, holds, text, number in (("Mul", zero, "x·0", 0), ("Sub", same, "x − x", 0), ("Div", same, "x ÷ x", 1)):
        if segment.op == op and holds:
            says, value = f"{text} is taken for {number} where x is NaN or Inf", torch.full_like(exact, number)
            fix = "report it, or replace NaN and Inf in front of {layers}"
            yield Candidate("folded", says, value, evidence=operands(segment), fix=fix)


@cause(costly=True)
def born_here(segment: Segment) -> Iterator[Candidate]:
    """Candidate of last resort: the place of the first NaN or Inf, and its operands."""
    if segment.strange:
        count, fix = int(segment.new_nonfinite.sum()), "look at the operands in {layers}"
        yield Candidate("nonfinite", _born(segment), segment.test, count, operands(segment), fix, observed=True)


def _born(segment: Segment) -> str:
    places = segment.new_nonfinite
    what, right = (_kinds(tensor[places]) for tensor in (segment.test, segment.exact))
    return f"{what} appears here in {amount(int(places.sum()), 'value')} where {right} is right"


def _kinds(values: Tensor) -> str:
    kinds = {"a number": torch.isfinite, "NaN": torch.isnan, "Inf": torch.isinf}
    return " or ".join(word for word, holds in kinds.items() if bool(holds(values).any()))


def operands(segment: Segment) -> dict[str, Any]:
    """JSON entry of the first NaN or Inf: exact value, operands at its place where shapes agree, else their range."""
    first = tuple(int(i) for i in segment.new_nonfinite.nonzero()[0])
    entry: dict[str, Any] = {
        "born": int(segment.new_nonfinite.sum()),
        "first": list(first),
        "value": float(segment.test[first]),
        "oracle": float(segment.exact[first]),
    }
    for name in segment.given:
        tensor = segment.input(name)
        if tensor.shape == segment.test.shape:
            entry[f"operand {name}"] = float(tensor[first])
        elif tensor.numel():
            entry[f"range of {name}"] = [float(tensor.min()), float(tensor.max())]
    return entry
