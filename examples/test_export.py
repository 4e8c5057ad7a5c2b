"""Tests of an export, with the fixture that cpdebug's pytest plug-in brings.

pytest test_export.py --cpdebug-report=reports
"""

from collections.abc import Callable

import pytest
import torch
from torch import nn


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()


def test_the_exported_network_is_the_same(network: nn.Module, assert_agree: Callable) -> None:
    """No layer introduces more than FP32 explains, and the outputs are within the tolerance."""
    assert_agree(network, "torch,ort,ort-all", inputs=torch.randn(1, 3, 16, 16))


def test_half_precision_loses_no_layer(network: nn.Module, assert_agree: Callable) -> None:
    """FP16, emulated; the tolerance is what this network's users accept."""
    import cp_debug

    options = cp_debug.Options(rtol=1e-2)
    assert_agree(network, "torch,emu-fp16", inputs=torch.randn(1, 3, 16, 16), options=options)
