"""Operators of ``com.microsoft`` that ONNX Runtime's optimizer writes and exporters use.

Formulas: ONNX Runtime's ``docs/ContribOperators.md`` (1.2x), checked against its CPU kernels. Where it fuses several
operators, values that an unfused implementation would store are rounded.

Attention is computed by decomposition: projections, scores, softmax, weighted sum. What an unfused implementation would
store (projections, scores, probabilities) is rounded; fused kernels keep some of it in FP32. ``B`` batch, ``S``
queries, ``T`` keys (past and present), ``N`` heads, ``H`` head size.
"""

from __future__ import annotations

import math

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


MASKED = -10000.0
"""Number that ONNX Runtime adds to a masked score, unless ``mask_filter_value`` says otherwise."""


@kernel(MS + "Attention", multiplies=True)
def attention(
    call: Call,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    past: Tensor | None = None,
    added: Tensor | None = None,
    past_length: Tensor | None = None,
) -> list[Tensor]:
    """Self-attention with its projections: x [B, S, I], weight [I, Q + K + V] → [B, S, V], present [2, B, N, T, H]."""
    if call["do_rotary"] or call["past_present_share_buffer"]:
        return NotImplemented
    heads = call["num_heads"]
    sizes = call["qkv_hidden_sizes"] or [weight.shape[1] // 3] * 3
    projected = _product(call, x, weight)
    if bias is not None:
        projected = call.arithmetic.round(projected + bias)
    q, k, v = (_split_heads(part, heads) for part in projected.split(list(sizes), -1))
    if past is not None:
        k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
    result = _attend(call, q, k, v, _masks(call, mask, q, k), added, causal=bool(call["unidirectional"]))
    return [result, torch.stack([k, v])][: call.outputs] if call.outputs > 1 else [result]


@kernel(MS + "MultiHeadAttention", multiplies=True)
def multi_head_attention(
    call: Call,
    query: Tensor,
    key: Tensor | None = None,
    value: Tensor | None = None,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    added: Tensor | None = None,
    past_key: Tensor | None = None,
    past_value: Tensor | None = None,
    past_length: Tensor | None = None,
    cache: Tensor | None = None,
) -> list[Tensor]:
    """Query [B, S, N·H] (or packed [B, S, N, 3, H]), key and value [B, T, N·H] or [B, N, T, H] → [B, S, N·H]."""
    if past_length is not None or cache is not None:
        return NotImplemented
    heads = call["num_heads"]
    if query.dim() == 5:
        query, key, value = (query.select(3, i).flatten(2) for i in range(3))
    elif key is not None and key.dim() == 5:
        key, value = (key.select(3, i).flatten(2) for i in range(2))
    if key is None or value is None:
        return NotImplemented
    if bias is not None:
        width = query.shape[-1]
        parts = [bias[:width], bias[width : 2 * width], bias[2 * width :]]
        query = call.arithmetic.round(query + parts[0])
        if key.dim() == 3:
            key, value = call.arithmetic.round(key + parts[1]), call.arithmetic.round(value + parts[2])
    q = _split_heads(query, heads)
    k, v = (t if t.dim() == 4 else _split_heads(t, heads) for t in (key, value))
    if past_key is not None and past_value is not None:
        k, v = torch.cat([past_key, k], 2), torch.cat([past_value, v], 2)
    result = _attend(call, q, k, v, _masks(call, mask, q, k), added, causal=bool(call["unidirectional"]))
    return [result, k, v][: max(call.outputs, 1)]


@kernel(MS + "GroupQueryAttention", multiplies=True)
def group_query_attention(
    call: Call,
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    past_key: Tensor | None,
    past_value: Tensor | None,
    last: Tensor,
    total: Tensor,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    *others: Tensor | None,
) -> list[Tensor]:
    """Causal attention whose keys and values have fewer heads; ``last`` [B]: the last valid position of each entry.

    Key and value caches hold [B, N, T, H]; a batch whose entries have different lengths is padded at the right.
    """
    if any(o is not None for o in others) or call["smooth_softmax"]:
        return NotImplemented
    heads, groups = call["num_heads"], call["kv_num_heads"]
    if key is None or value is None:
        size = query.shape[-1] // (heads + 2 * groups)
        query, key, value = query.split([heads * size, groups * size, groups * size], -1)
    q, k, v = _split_heads(query, heads), _split_heads(key, groups), _split_heads(value, groups)
    batch, _, length, _ = q.shape
    ends = last.reshape(-1).long() + 1  # how many keys each entry has, the new ones included
    starts = (ends - length).clamp(min=0)
    if call["do_rotary"]:
        if cos is None or sin is None:
            return NotImplemented
        places = starts[:, None] + torch.arange(length, device=q.device)
        interleaved = bool(call["rotary_interleaved"])
        q, k = (call.arithmetic.round(_rotated(t, cos, sin, places, interleaved)) for t in (q, k))
    past_length = 0 if past_key is None else past_key.shape[2]
    size_of_all = max(past_length, int(total.reshape(-1)[0]), length)
    keys, values = (t.new_zeros(batch, groups, size_of_all, t.shape[-1]) for t in (k, v))
    for entry, start in enumerate(starts.tolist()):
        if past_key is not None and past_value is not None:
            keys[entry, :, :past_length], values[entry, :, :past_length] = past_key[entry], past_value[entry]
        room = min(length, size_of_all - start)
        keys[entry, :, start : start + room] = k[entry, :, :room]
        values[entry, :, start : start + room] = v[entry, :, :room]
    places = torch.arange(size_of_all, device=q.device)
    rows = (starts[:, None] + torch.arange(length, device=q.device))[:, None, :, None]
    visible = places <= rows
    if (window := call["local_window_size"]) not in (None, -1):
        visible = visible & (places > rows - window)
    window_mask = torch.zeros(visible.shape, dtype=q.dtype, device=q.device).masked_fill(~visible, -math.inf)
    repeats = heads // groups
    wide_keys, wide_values = (t.repeat_interleave(repeats, 1) for t in (keys, values))
    result = _attend(call, q, wide_keys, wide_values, window_mask, None, causal=False, cap=call["softcap"] or 0.0)
    return [result, keys, values][: max(call.outputs, 1)]


@kernel(MS + "RotaryEmbedding")
def rotary_embedding(call: Call, x: Tensor, positions: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, S, N·H] or [B, N, S, H]; positions [B, S] or one offset; caches [P, rotated ÷ 2]."""
    if call["is_packed_batching"]:
        return NotImplemented
    width = call["rotary_embedding_dim"] or 0
    size = x.shape[-1] // call["num_heads"] if x.dim() == 3 and call["num_heads"] else 0
    size = size or width or 2 * cos.shape[1]
    heads = _split_heads(x, x.shape[-1] // size) if x.dim() == 3 else x
    length = heads.shape[2]
    places = positions.long()
    if places.numel() == 1:
        places = places.reshape(1, 1) + torch.arange(length, device=x.device)
    places = places.expand(heads.shape[0], length)
    result = _rotated(heads, cos, sin, places, bool(call["interleaved"]))
    return result.transpose(1, 2).flatten(2) if x.dim() == 3 else result


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, places: Tensor, interleaved: bool) -> Tensor:
    """x [B, N, S, H] with its first 2 · cos.shape[1] channels turned by the angles of ``places`` [B, S]."""
    width = 2 * cos.shape[1]
    c, s = cos[places][:, None], sin[places][:, None]
    turned, rest = x[..., :width], x[..., width:]
    a, b = (turned[..., 0::2], turned[..., 1::2]) if interleaved else turned.chunk(2, -1)
    real, imaginary = a * c - b * s, b * c + a * s
    parts = [real, imaginary]
    return torch.cat([torch.stack(parts, -1).flatten(-2) if interleaved else torch.cat(parts, -1), rest], -1)


def _attend(
    call: Call,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    added: Tensor | None,
    *,
    causal: bool,
    cap: float = 0.0,
) -> Tensor:
    """softmax(q kᵀ · scale + masks) v, for [B, N, S, H] and [B, N, T, H] → [B, S, N·H]."""
    scale = call["scale"] or 1 / math.sqrt(q.shape[-1])
    scores = call.arithmetic.round(_product(call, q, k.mT) * scale)
    if cap:
        scores = call.arithmetic.round(cap * torch.tanh(scores / cap))
    if causal:
        rows = torch.arange(q.shape[2], device=q.device)[:, None] + (k.shape[2] - q.shape[2])
        hidden = torch.arange(k.shape[2], device=q.device) > rows
        scores = scores.masked_fill(hidden, torch.finfo(torch.float32).min)
    for bias in (mask, added):
        if bias is not None:
            scores = call.arithmetic.round(scores + bias)
    return _product(call, call.arithmetic.round(torch.softmax(scores, -1)), v).transpose(1, 2).flatten(2)


def _masks(call: Call, mask: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """Summand of the scores [B, N, S, T] for a mask: 0 or the filter value."""
    if mask is None:
        return None
    filled = MASKED if call["mask_filter_value"] is None else call["mask_filter_value"]
    batch, keys = q.shape[0], k.shape[2]
    if mask.dim() == 1:  # how many keys are valid; or where they end and, behind that, where they start
        places = torch.arange(keys, device=q.device)
        ends = mask[:batch, None]
        starts = mask[batch : 2 * batch, None] if mask.numel() == 2 * batch else torch.zeros_like(ends)
        visible = ((places < ends) & (places >= starts))[:, None, None]
    elif mask.dim() == 2:
        visible = (mask > 0)[:, None, None]
    elif mask.dim() == 3:
        visible = (mask > 0)[:, None]
    else:
        visible = mask[:, :, -q.shape[2] - (keys - q.shape[2]) :, :keys][:, :, keys - q.shape[2] : keys] > 0
    return torch.zeros(visible.shape, dtype=q.dtype, device=q.device).masked_fill(~visible, filled)


def _product(call: Call, a: Tensor, b: Tensor) -> Tensor:
    return call.arithmetic.round(matmul(call, a, b))


def _split_heads(x: Tensor, heads: int) -> Tensor:
    return x.reshape(x.shape[0], x.shape[1], heads, -1).transpose(1, 2)
