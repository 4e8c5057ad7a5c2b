"""Weights and buffers of a torch module, read without asking the module, whose own ``state_dict`` may be anything."""

from __future__ import annotations

from torch import Tensor, nn


def stored_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Tensors of any shape and dtype by the names, and in the order, of torch's own ``state_dict``."""
    return {
        f"{path}.{name}" if path else name: tensor
        for path, part in nn.Module.named_modules(module, remove_duplicate=False)
        for name, tensor in (*part._parameters.items(), *part._buffers.items())
        if tensor is not None and name not in part._non_persistent_buffers_set
    }
