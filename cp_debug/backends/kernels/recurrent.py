"""RNN, GRU and LSTM, unrolled: each product and each stored state is rounded as the arithmetic says.

Formulas, gate orders and defaults: ONNX's operator specification (``docs/Operators.md``). Where it is silent, ONNX
Runtime's CPU kernels were measured: an activation takes the next ``activation_alpha`` only if it has such a parameter,
those of Affine, ScaledTanh and ThresholdedRelu are 0 by default, and ``clip`` bounds the gates but not the cell.
In FP16 and BF16 what the matrix products write and the states h and c are rounded at each step, the gates between them
are not, as in the fused cells of PyTorch and cuDNN.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cp_debug.backends.kernels.elementwise import Activation, activation
from cp_debug.backends.kernels.integer import dynamic_quantize_linear
from cp_debug.backends.kernels.paired_sums import lost_in_product
from cp_debug.backends.kernels.products import matmul
from cp_debug.backends.kernels.registry import Call, kernel


@dataclass(frozen=True)
class _LevelWeights:
    """Weights as levels [(D,) gates × H, I], with scales and zero points [(D,) gates × H or 1, 1]."""

    levels: Tensor
    scale: Tensor
    zero: Tensor

    @classmethod
    def of(cls, levels: Tensor, scale: Tensor, zero: Tensor) -> _LevelWeights:
        """Weights of levels [D, I, gates × H], as ONNX Runtime has them."""
        directions = levels.shape[0]
        return cls(levels.mT, scale.reshape(directions, -1, 1), zero.reshape(directions, -1, 1))

    @property
    def shape(self) -> torch.Size:
        return self.levels.shape

    def __getitem__(self, place: int | slice) -> _LevelWeights:
        """One direction; of one direction all its gates."""
        if isinstance(place, slice):
            assert place == slice(None), "gates are not taken apart"
            return self
        return _LevelWeights(self.levels[place], self.scale[place], self.zero[place])


Weight = Tensor | _LevelWeights
Multiply = Callable[[Call, Tensor, Any], Tensor]
"""x [.., I] times the transpose of a weight [gates × H, I]."""


def _in_integers(call: Call, x: Tensor, weight: _LevelWeights) -> Tensor:
    """The product with x on levels of its own range, as DynamicQuantizeLinear has them; their sums are exact."""
    levels, scale, zero = dynamic_quantize_linear(call, x)
    shifted = weight.levels.double() - weight.zero.double()
    sums = torch.matmul(levels.double() - zero.double(), shifted.mT) + lost_in_product(call, levels, weight.levels.mT)
    return (sums * scale.double() * weight.scale.double().mT).to(call.arithmetic.dtype)


@dataclass(frozen=True)
class _Direction:
    """One direction of a recurrent layer: weights [gates × H, I or H], biases [gates × H], in ONNX's gate order."""

    call: Call
    activations: Sequence[Activation]
    weight: Weight
    recurrence: Weight
    bias: Tensor
    recurrent_bias: Tensor
    peepholes: Sequence[Tensor]
    """Three [H], or none."""
    multiply: Multiply

    def given(self, x: Tensor) -> Tensor:
        """Share of the gates that comes from the inputs x [T, B, I]: [T, B, gates × H]."""
        return self._product(x, self.weight, self.bias)

    def recurrent(self, h: Tensor, rows: slice = slice(None)) -> Tensor:
        """Share of the gates (``rows`` of them) that comes from the state h [B, H]."""
        return self._product(h, self.recurrence[rows], self.recurrent_bias[rows])

    def activate(self, which: int, gate: Tensor) -> Tensor:
        """Activation number ``which`` of a gate, within the node's ``clip``."""
        bound = self.call["clip"]
        return self.activations[which](gate.clamp(-bound, bound) if bound else gate)

    def _product(self, x: Tensor, weight: Weight, bias: Tensor) -> Tensor:
        result = self.multiply(self.call, x, weight)
        return self.call.arithmetic.round(result + bias)


State = tuple[Tensor, ...]
"""State of a layer: h, and c of an LSTM, each [B, H]."""
Step = Callable[[_Direction, Tensor, State], State]
"""One time step: (cell, share of the gates from the input [B, gates × H], state) → the next state."""


def _gru(cell: _Direction, from_input: Tensor, state: State) -> State:
    (h,) = state
    size = h.shape[-1]
    gates, hidden = slice(0, 2 * size), slice(2 * size, None)
    z, r = (cell.activate(0, gate) for gate in (from_input[:, gates] + cell.recurrent(h, gates)).split(size, -1))
    if cell.call["linear_before_reset"]:
        from_state = r * cell.recurrent(h, hidden)
    else:
        from_state = cell.recurrent(cell.call.arithmetic.round(r * h), hidden)
    candidate = cell.activate(1, from_input[:, hidden] + from_state)
    return ((1 - z) * candidate + z * h,)


def _lstm(cell: _Direction, from_input: Tensor, state: State) -> State:
    h, c = state
    i, o, f, g = (from_input + cell.recurrent(h)).split(h.shape[-1], -1)
    if cell.peepholes:
        i, f = i + cell.peepholes[0] * c, f + cell.peepholes[2] * c
    i = cell.activate(0, i)
    f = 1 - i if cell.call["input_forget"] else cell.activate(0, f)
    c = cell.call.arithmetic.round(f * c + i * cell.activate(1, g))
    if cell.peepholes:
        o = o + cell.peepholes[1] * c
    return cell.activate(0, o) * cell.activations[2](c), c


_STEPS: dict[str, tuple[Step, int, tuple[str, ...]]] = {
    "RNN": (lambda cell, x, state: (cell.activate(0, x + cell.recurrent(state[0])),), 1, ("Tanh",)),
    "GRU": (_gru, 3, ("Sigmoid", "Tanh")),
    "LSTM": (_lstm, 4, ("Sigmoid", "Tanh", "Tanh")),
}
"""Operator → its step, number of gates, default activations."""


@kernel("RNN", "GRU", "LSTM", multiplies=True)
def recurrent(
    call: Call,
    x: Tensor,
    weight: Weight,
    recurrence: Weight,
    bias: Tensor | None = None,
    lengths: Tensor | None = None,
    h: Tensor | None = None,
    c: Tensor | None = None,
    peepholes: Tensor | None = None,
    *,
    multiply: Multiply = lambda call, x, weight: matmul(call, x, weight.mT),
) -> list[Tensor]:
    """RNN, GRU or LSTM: outputs Y [T, D, B, H], the last h and, of an LSTM, c [D, B, H].

    x [T, B, I], W [D, gates × H, I], R [D, gates × H, H], B [D, 2 gates × H], lengths [B], h and c [D, B, H], P [D, 3
    H]; with ``layout`` 1 the batch comes first.
    """
    step, gates, default = _STEPS[call.node.proto.op_type.removeprefix("DynamicQuantize")]
    if call["layout"]:
        x, h, c = x.transpose(0, 1), *(s if s is None else s.transpose(0, 1) for s in (h, c))
    directions, size = weight.shape[0], weight.shape[1] // gates
    names = call["activations"] or default * directions
    parameters = [iter(call[f"activation_{name}"] or ()) for name in ("alpha", "beta")]
    functions = [activation(name, *parameters) for name in names]
    if bias is None:
        bias = x.new_zeros(directions, 2 * gates * size)
    backwards = [call["direction"] == "reverse"] if directions == 1 else [False, True]
    results = []
    for d, backward in enumerate(backwards):
        direction_functions = functions[d * len(default) : (d + 1) * len(default)]
        for_input, for_state = bias[d].split(gates * size)
        diagonal = () if peepholes is None else peepholes[d].split(size)
        cell = _Direction(call, direction_functions, weight[d], recurrence[d], for_input, for_state, diagonal, multiply)
        start = tuple(x.new_zeros(x.shape[1], size) if s is None else s[d] for s in (h, c)[: 1 + (gates == 4)])
        results.append(_unroll(step, cell, x, start, lengths, backward))
    y, *last = (torch.stack(parts, axis) for parts, axis in zip(zip(*results, strict=True), (1, 0, 0), strict=False))
    if call["layout"]:
        return [y.permute(2, 0, 1, 3), *(s.transpose(0, 1) for s in last)]
    return [y, *last]


@kernel("com.microsoft.DynamicQuantizeLSTM", exact=True)
def dynamic_quantize_lstm(
    call: Call,
    x: Tensor,
    weight: Tensor,
    recurrence: Tensor,
    bias: Tensor | None = None,
    lengths: Tensor | None = None,
    h: Tensor | None = None,
    c: Tensor | None = None,
    peepholes: Tensor | None = None,
    *grids: Tensor,
) -> list[Tensor]:
    """LSTM whose weights are levels, W [D, I, 4 H] and R [D, H, 4 H]; x, and h at each step, are put on levels, too.

    ``grids``: scale and zero point of W, then of R, each [D] or [D, 4 H].
    """
    w, r = (_LevelWeights.of(levels, *grid) for levels, grid in ((weight, grids[:2]), (recurrence, grids[2:])))
    return list(recurrent(call, x, w, r, bias, lengths, h, c, peepholes, multiply=_in_integers))


def _unroll(
    step: Step, cell: _Direction, x: Tensor, state: State, lengths: Tensor | None, backward: bool
) -> tuple[Tensor, ...]:
    """All h [T, B, H] of one direction, zero behind the end of a sequence, and the last state.

    What lies behind the end of the longest sequence is not even read: levels are made for the rest.
    """
    behind = 0 if lengths is None else len(x) - int(lengths.clamp(0, len(x)).max())
    x = x[: len(x) - behind]
    time, batch = x.shape[:2]
    steps = torch.arange(time, device=x.device)[:, None].expand(time, batch)
    ends = steps.new_full((batch,), time) if lengths is None else lengths.to(torch.int64)
    inside = steps < ends
    # Backwards, each sequence starts at its own end.
    places = torch.where(inside, ends - 1 - steps, steps) if backward else steps
    columns = torch.arange(batch, device=x.device)
    from_input = cell.given(x[places, columns] if backward else x)
    rows = [x.new_empty(0, *state[0].shape)]
    for t in range(time):
        after = tuple(cell.call.arithmetic.round(s) for s in step(cell, from_input[t], state))
        if lengths is not None:
            after = tuple(torch.where(inside[t][:, None], n, old) for n, old in zip(after, state, strict=True))
        state = after
        rows.append((state[0] * inside[t][:, None])[None])
    y = torch.cat(rows)
    y = y[places, columns] if backward else y
    return (torch.cat([y, y.new_zeros(behind, *y.shape[1:])]), *state)
