"""A torch module against TensorRT in FP16: which layer lost what, and is it more than FP16 explains?

    CPDEBUG_TRT_PYTHON=/opt/trt/bin/python python torch_against_tensorrt.py

``CPDEBUG_TRT_PYTHON`` is a Python that has TensorRT, where this one lacks it. Without either the script says so, asks
FP16 by emulation what it would do, and ends with exit code 3, as ``cpdebug`` does.
"""

import sys

import torch
from torch import nn

import cp_debug


class Network(nn.Module):
    """Activations that grow: what a missing normalization does before FP16 overflows."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.scale = nn.Parameter(torch.tensor(200.0))
        self.head = nn.Conv2d(16, 4, 1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        features = torch.relu(self.stem(image)) * self.scale
        return self.head(features * features)


def main() -> int:
    torch.manual_seed(0)
    network, inputs = Network().eval(), {"image": torch.randn(1, 3, 32, 32)}
    try:
        result = cp_debug.diagnose(network, "torch,trt-fp16", inputs=inputs)
    except cp_debug.BackendUnavailable as missing:
        print(f"skipped: {missing}")
        print(cp_debug.diagnose(network, "torch,emu-fp16", inputs=inputs))
        return missing.exit_code
    print(result)
    for finding in result.tests[0].findings:
        print(f"{finding.cause}: {finding.fix}")
    return 0 if result.agrees else 1


if __name__ == "__main__":
    sys.exit(main())
