"""Products whose file lets a runtime compute them with activations in INT8: MatMulNBits with ``accuracy_level`` 4, the
default of ONNX Runtime GenAI on CPUs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from cp_debug.backends.base import Tensor as AnyTensor
from cp_debug.bisect.whole_numbers import as_tensor
from cp_debug.graph.graph import Node

INT8 = 4
"""``accuracy_level`` that stands for INT8."""


def int8_activations(nodes: Sequence[Node], given: Mapping[str, AnyTensor]) -> dict[str, Tensor]:
    """The activations of such products among ``nodes`` that are in ``given``, rounded as by ONNX Runtime's MLAS.

    Each block of ``block_size`` numbers along the last axis has a scale of its own, its largest magnitude ÷ 127. Shapes
    and dtypes stay.
    """
    rounded = {}
    for node in (n for n in nodes if n.op.rpartition(".")[2] == "MatMulNBits"):
        name = node.proto.input[0]
        if node.attribute("accuracy_level") == INT8 and name in given:
            rounded[name] = _by_block(as_tensor(given[name]), node.attribute("block_size"))
    return rounded


def _by_block(x: Tensor, block: int) -> Tensor:
    columns = x.shape[-1]
    blocks = functional.pad(x.double(), (0, -columns % block)).unflatten(-1, (-1, block))
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    levels = torch.where(scale > 0, blocks / scale, 0.0).round()
    return (levels * scale).flatten(-2)[..., :columns].to(x.dtype)
