"""Random numbers that a torch forward draws, kept in order, so that a graph can be given the same ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cp_debug.graph.graph import Node

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
