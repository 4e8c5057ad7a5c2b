"""Operators of ``com.microsoft`` that ONNX Runtime's optimizer writes and exporters use, all but attention.

Formulas: ONNX Runtime's ``docs/ContribOperators.md`` (1.2x), checked against its CPU kernels. Where it fuses several
operators, values that an unfused implementation would store are rounded.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from cp_debug.backends.kernels.elementwise import activation
from cp_debug.backends.kernels.products import conv, gemm, matmul
from cp_debug.backends.kernels.registry import Call, kernel

MS = "com.microsoft."
EPSILON = 1e-12
"""Default of the normalizations that ONNX Runtime fuses with a residual."""


@kernel(MS + "Gelu")
def gelu(call: Call, x: Tensor) -> Tensor:
    return functional.gelu(x)


@kernel(MS + "BiasGelu")
def bias_gelu(call: Call, x: Tensor, bias: Tensor) -> Tensor:
    return functional.gelu(call.arithmetic.round(x + bias))


@kernel(MS + "FastGelu")
def fast_gelu(call: Call, x: Tensor, bias: Tensor | None = None) -> Tensor:
    return functional.gelu(x if bias is None else call.arithmetic.round(x + bias), approximate="tanh")


@kernel(MS + "QuickGelu")
def quick_gelu(call: Call, x: Tensor) -> Tensor:
    return x * torch.sigmoid(x * (1.702 if call["alpha"] is None else call["alpha"]))


@kernel(MS + "BiasSplitGelu")
def bias_split_gelu(call: Call, x: Tensor, bias: Tensor) -> Tensor:
    left, right = call.arithmetic.round(x + bias).chunk(2, -1)
    return left * call.arithmetic.round(functional.gelu(right))


@kernel(MS + "BiasAdd")
def bias_add(call: Call, x: Tensor, bias: Tensor, skip: Tensor) -> Tensor:
    return call.arithmetic.round(x + bias) + skip


@kernel(MS + "BiasSoftmax")
def bias_softmax(call: Call, x: Tensor, bias: Tensor) -> Tensor:
    axis = (1 if call["axis"] is None else call["axis"]) % x.dim()
    if call["is_inner_broadcast"]:
        bias = bias.reshape(*bias.shape[:axis], *(1,) * (x.dim() - bias.dim()), *bias.shape[axis:])
    return torch.softmax(call.arithmetic.round(x + bias).flatten(axis), -1).reshape(x.shape)


@kernel(MS + "FusedMatMul", multiplies=True)
def fused_matmul(call: Call, a: Tensor, b: Tensor) -> Tensor:
    a, b = _turned(call, a, "transA", "transBatchA"), _turned(call, b, "transB", "transBatchB")
    product = matmul(call, a, b)
    return product if call["alpha"] in (None, 1) else product * call["alpha"]


def _turned(call: Call, x: Tensor, last: str, batch: str) -> Tensor:
    if call[batch]:  # the batch axes stand behind the rows: [M, B…, K] or [K, B…, M]
        x = x.movedim(0, -2)
    return x.mT if call[last] and x.dim() > 1 else x


@kernel(MS + "FusedGemm", multiplies=True)
def fused_gemm(call: Call, a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
    names = ("activation_alpha", "activation_beta", "activation_gamma")
    return _activated(call, gemm(call, a, b, c), [call[n] for n in names if call[n] is not None])


@kernel(MS + "FusedConv", multiplies=True)
def fused_conv(
    call: Call, x: Tensor, weight: Tensor, bias: Tensor | None = None, added: Tensor | None = None
) -> Tensor:
    result = conv(call, x, weight, bias)
    return _activated(call, result if added is None else result + added, call["activation_params"] or [])


def _activated(call: Call, x: Tensor, parameters: list[float]) -> Tensor:
    """The activation that a product was fused with; its parameters in the order alpha, beta or low, high."""
    name = call["activation"]
    if not name:
        return x
    try:
        return activation(name, *map(iter, zip(parameters)))(call.arithmetic.round(x))
    except KeyError:
        return NotImplemented


@kernel("SimplifiedLayerNormalization")
def simplified_layer_normalization(call: Call, x: Tensor, scale: Tensor) -> Tensor | list[Tensor]:
    """RMSNorm under the name that ONNX Runtime gave it before ONNX had one, in ONNX's own domain."""
    axis = -1 if call["axis"] is None else call["axis"]
    dims = list(range(axis % x.dim(), x.dim()))
    inverse = torch.rsqrt(x.square().mean(dims, keepdim=True) + (1e-5 if call["epsilon"] is None else call["epsilon"]))
    return [x * inverse * scale, inverse] if call.outputs > 1 else x * inverse * scale


@kernel(MS + "SkipLayerNormalization", MS + "SkipSimplifiedLayerNormalization")
def skip_layer_normalization(
    call: Call, x: Tensor, skip: Tensor, gamma: Tensor, *shifts: Tensor | None
) -> list[Tensor]:
    """x + skip (+ bias), normalized over the last axis; outputs: result, mean, 1 ÷ deviation, the sum itself."""
    simplified = call.node.op.endswith("SkipSimplifiedLayerNormalization")
    beta, bias = [*([None] if simplified else []), *shifts, None, None][:2]
    total = x + skip
    total = call.arithmetic.round(total if bias is None else total + bias)
    epsilon = EPSILON if call["epsilon"] is None else call["epsilon"]
    mean = torch.zeros_like(total[..., :1]) if simplified else total.mean(-1, keepdim=True)
    inverse = torch.rsqrt((total - mean).square().mean(-1, keepdim=True) + epsilon)
    result = (total - mean) * inverse * gamma
    return [result if beta is None else result + beta, mean, inverse, total][: call.outputs]


@kernel(MS + "EmbedLayerNormalization")
def embed_layer_normalization(
    call: Call,
    ids: Tensor,
    segments: Tensor | None,
    words: Tensor,
    positions: Tensor,
    segment_embedding: Tensor | None,
    gamma: Tensor,
    beta: Tensor,
    mask: Tensor | None = None,
    position_ids: Tensor | None = None,
) -> list[Tensor]:
    """Word + position (+ segment) embedding, normalized; the number of unmasked words; the sum itself."""
    places = torch.arange(ids.shape[1], device=ids.device)[None] if position_ids is None else position_ids
    total = call.arithmetic.round(words[ids.long()] + positions[places.long()])
    if segments is not None and segment_embedding is not None:
        total = call.arithmetic.round(total + segment_embedding[segments.long()])
    epsilon = EPSILON if call["epsilon"] is None else call["epsilon"]
    result = functional.layer_norm(total, total.shape[-1:], gamma, beta, epsilon)
    count = ids.new_zeros(ids.shape[0]) if mask is None else mask.sum(1).to(ids.dtype)
    return [result, count.to(torch.int32), total][: max(call.outputs, 1)]


@kernel(MS + "GroupNorm", MS + "SkipGroupNorm")
def group_norm(
    call: Call, x: Tensor, gamma: Tensor, beta: Tensor, skip: Tensor | None = None, bias: Tensor | None = None
) -> list[Tensor]:
    """GroupNormalization in either layout, of x or x + skip (+ bias), with SiLU where ``activation`` is 1."""
    last = call["channels_last"] is None or bool(call["channels_last"])
    skips = skip is not None
    if skip is not None:
        x = x + (skip if skip.dim() == x.dim() else skip[:, None, None] if last else skip[..., None, None])
    if bias is not None:
        x = x + (bias if last else bias[:, None, None])
    x = call.arithmetic.round(x)
    planes = x.movedim(-1, 1) if last else x
    epsilon = 1e-5 if call["epsilon"] is None else call["epsilon"]
    result = functional.group_norm(planes, call["groups"], gamma, beta, epsilon)
    result = functional.silu(call.arithmetic.round(result)) if call["activation"] else result
    result = result.movedim(1, -1) if last else result
    return [result, x][: call.outputs] if skips else [result]
