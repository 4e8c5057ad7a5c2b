"""Is the right precision named on a real GPU? torch on CUDA runs the built-in model in TF32, FP16 and BF16 and claims
FP32; `bisect` must say what it really did. Prints cause, layers and the share of the introduced error explained.

    python benchmarks/explain_gpu.py

Target: TF32 is named, with at least 95 % explained.
"""

from __future__ import annotations

import time

import torch

from cp_debug.backends.base import Program, Session
from cp_debug.backends.registry import create
from cp_debug.backends.spec import BackendSpec
from cp_debug.backends.torch_backend import TorchBackend
from cp_debug.bisect.engine import bisect


class Claims(TorchBackend):
    """Claims FP32, whatever the spec asks for."""

    def open(self, program: Program) -> Session:
        """As the spec says."""
        return TorchBackend(self.spec).open(program)


def main() -> None:
    """One bisect for each precision."""
    print(torch.cuda.get_device_name(), torch.__version__)
    for name in ("tf32", "fp16", "bf16"):
        lying = Claims(BackendSpec.parse(f"torch-{name}@cuda:0"))
        lying.precision = "fp32"
        start = time.perf_counter()
        test = bisect("centerpoint:tiny", [create(BackendSpec.parse("torch@cuda:0")), lying]).tests[0]
        print(f"{name}: {time.perf_counter() - start:.0f} s, {len(test.guilty)} guilty, {test.detections}")
        for finding in test.findings:
            print(f"  {finding.cause} in {len(finding.layers)} layers, explained {finding.explained}")
            print(f"    {finding.says}; next {finding.runner_up} {finding.runner_up_explained}; {finding.evidence}")
            print(f"    {', '.join(finding.layers)}")


if __name__ == "__main__":
    main()
