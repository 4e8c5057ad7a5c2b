"""Layers of files in FP8 and 4 bits: which of their scales is wrong, by the codes and numbers themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cp_debug.backends.codecs import E2M1, E4M3, E5M2, Codec
from cp_debug.backends.executor import Executor
from cp_debug.bisect.causes.segment import as_double
from cp_debug.bisect.causes.wrong_scales import WrongScale, worst_scale
from cp_debug.bisect.file_weights import OFF, Repair, StoredCodes, is_narrow_kind, product_of, stored_codes
from cp_debug.graph.constants import Constants
from cp_debug.graph.graph import Graph, Node

_CODECS: dict[int, Codec] = {17: E4M3, 18: E4M3, 19: E5M2, 20: E5M2, 23: E2M1}
_FAMILIES = {17: "fp8", 18: "fp8", 19: "fp8", 20: "fp8", 21: "int4", 22: "int4", 23: "fp4"}


def wrong_scale(
    graph: Graph,
    executor: Executor,
    nodes: Sequence[Node],
    starts: Mapping[str, Any],
    target: str,
    product: Node,
    weight: Tensor | None,
    exact: Tensor,
) -> WrongScale | None:
    """The scale without which ``target`` would be much nearer to ``exact``; None where there is none.

    ``nodes`` of the file compute ``target`` from ``starts``; ``product`` and its float ``weight`` (float64) are the
    parent's. Looked at are codes of weights, and constant scales of data.
    """
    twin = product_of(nodes, product.op)
    if twin is None:
        return None

    repairs: list[tuple[str, Tensor, WrongScale]] = []
    stored = stored_codes(graph, twin)
    narrow = stored is not None and (is_narrow_kind(stored.kind) or stored.bits is not None)
    if stored is not None and narrow and weight is not None and (repair := stored.repair(weight)) is not None:
        value = repair.value.to(executor.arithmetic.held(torch.float32))
        repairs.append((stored.dequantizer.outputs[0], value, _of_weight(stored, repair)))
    data = _data(graph, twin)
    if data is not None:
        quantizer, dequantizer, kind, scale = data
        x = executor.run_nodes(nodes, dict(starts), [quantizer.proto.input[0]])[quantizer.proto.input[0]]
        codec = _CODECS[kind]
        largest = float(torch.as_tensor(x).abs().max())
        needed = largest / codec.largest or 1.0
        better = (codec(as_double(x) / needed) * needed).to(torch.as_tensor(x).dtype)
        repairs.append((dequantizer.outputs[0], better, _of_data(as_double(x), codec, kind, scale, needed)))
    return worst_scale(executor, nodes, starts, target, exact, repairs)


def _data(graph: Graph, product: Node) -> tuple[Node, Node, int, float] | None:
    """(Quantizer, dequantizer, element type, scale) of a product's data, where one constant scale is all it has."""
    dequantizer = graph.producer.get(product.proto.input[0])
    quantizer = graph.producer.get(dequantizer.proto.input[0]) if dequantizer is not None else None
    if dequantizer is None or quantizer is None or quantizer.op != "QuantizeLinear":
        return None
    constants, scale = Constants(graph), quantizer.proto.input[1]
    zero = quantizer.proto.input[2] if len(quantizer.proto.input) > 2 else ""
    if scale not in constants or zero not in constants or np.size(constants[scale]) != 1:
        return None
    kind = next((t.data_type for t in graph.proto.graph.initializer if t.name == zero), 0)
    return (quantizer, dequantizer, kind, float(np.ravel(constants[scale])[0])) if kind in _CODECS else None


def _of_weight(stored: StoredCodes, repair: Repair) -> WrongScale:
    family = f"int{stored.bits}" if stored.bits is not None else _FAMILIES[stored.kind]
    name = "int4-weights" if family.startswith("int") else f"{family}-weights"
    if repair.kind == "scales":
        says, evidence = _scales(stored, repair.evidence["fitted"], family)
        fix = "store the scales with which the weights of {layers} were rounded, in their order, or quantize them again"
        return WrongScale(name, says, fix, evidence)
    evidence = {"wrong": repair.kind, **repair.evidence}
    if repair.kind == "zero-points":
        says, fix = _zero_points(repair.evidence), "store the zero points of {layers} as their format has them: GPTQ's "
        return WrongScale(name, says, fix + "first format stores them minus 1, gptq_v2 and AWQ as they are", evidence)
    if repair.kind == "groups":
        moved, of = repair.evidence["moved"], repair.evidence["of"]
        says = f"{moved} of {of} inputs are not in the groups of their {family.upper()} codes"
        fix = "keep g_idx of {layers}, which says the group of each input (desc_act), or quantize without it"
        return WrongScale(name, says, fix, evidence)
    what, order, along = repair.evidence["what"], repair.evidence["order"], repair.evidence["axis"]
    says = f"its {family.upper()} {what} are in another order within words of eight along axis {along}: {order}"
    fix = "unpack the words of {layers} in the order of their format: AWQ's is 0, 2, 4, 6, 1, 3, 5, 7, GPTQ's is plain"
    return WrongScale(name, says, fix, evidence)


def _zero_points(evidence: Mapping[str, Any]) -> str:
    by, share = evidence["by"], evidence["share"]
    if by and share > 1 - OFF:
        return f"its zero points are {abs(by):g} too {'small' if by > 0 else 'large'}"
    return f"{1 - share if not by else 1.0:.0%} of its zero points are not those that its codes were computed with"


def _scales(stored: StoredCodes, fitted: Tensor, family: str) -> tuple[str, dict[str, Any]]:
    ratios = (stored.scale / fitted).abs()
    told = stored.codes != 0
    wrong = ((ratios - 1).abs() > OFF) & told
    if not bool(wrong.any()):  # all of them are off by little
        wrong = told
    share = float(wrong.double().mean())
    low, high = (
        float(q) for q in torch.quantile(ratios[wrong].flatten()[: 1 << 20], torch.tensor([0.05, 0.95]).double())
    )
    times = f"{low:.3g} times" if high < low * (1 + OFF) else f"{low:.3g} to {high:.3g} times"
    says = (
        f"the {family.upper()} scales of {share:.0%} of its weights are {times} those that their codes were computed "
        "with"
    )
    return says, {"share": share, "low": low, "high": high}


def _of_data(x: Tensor, codec: Codec, kind: int, scale: float, needed: float) -> WrongScale:
    family, reach = _FAMILIES[kind], needed * codec.largest
    clipped = float((x.abs() > scale * codec.largest).double().mean())
    small = float(((x != 0) & (x.abs() < scale * codec.tiniest)).double().mean())
    plain = scale == 1.0
    if scale < needed:
        name = "fp8-saturated" if plain and family == "fp8" else "scale-stale"
        what = f"{clipped:.2%} are clipped at {scale * codec.largest:.4g}"
    else:
        name = "fp8-underflow" if plain and family == "fp8" else "scale-stale"
        what = f"{small:.0%} lie below its normal numbers"
    meant = scale * codec.largest
    says = f"its data reaches {reach:.4g}, the file's {family.upper()} scale {scale:.3g} is for {meant:.4g}"
    fix = "calibrate {layers} on data like this: a scale of " + f"{needed:.3g}"
    evidence = {"scale": scale, "needed_scale": needed, "clipped": clipped, "below_normal": small}
    return WrongScale(name, f"{says}: {what}", fix, evidence)
