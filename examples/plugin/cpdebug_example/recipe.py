"""The recipe ``example``: a small image network with seeded weights, in two sizes."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from cp_debug.errors import InputError
from cp_debug.recipes.checkpoint import load_checkpoint
from cp_debug.recipes.torch_callable import TorchModel

WIDTHS = {"small": 8, "wide": 32}
"""Variant → channels."""


def load(text: str, *, checkpoint: Path | None, seed: int) -> TorchModel:
    """The model that ``example`` or ``example:VARIANT`` names.

    ``checkpoint`` replaces the weights, which are else drawn from ``seed``. Raises InputError for an unknown variant.
    """
    variant = text.partition(":")[2] or "small"
    if variant not in WIDTHS:
        raise InputError(f"MODEL: {text}: there is no {variant!r}; expected one of {', '.join(WIDTHS)}")
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        network = _network(WIDTHS[variant])
        image = torch.randn(1, 3, 16, 16)
    if checkpoint is not None:
        load_checkpoint(network, checkpoint)
    return TorchModel(text, network, (image,))


def _network(width: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(width, 10),
    )
