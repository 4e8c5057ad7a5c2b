"""FP8 products on the hardware: ``torch._scaled_mm`` in the place of an emulated running sum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from cp_debug.backends.running_sums import RunningSum

MULTIPLE = 16
"""``torch._scaled_mm`` wants multiples of this; other lengths are filled up with zeros, which change no sum."""
FIRST_CAPABILITY = (8, 9)
"""Compute capability of the first NVIDIA cards with FP8: Ada; Hopper has 9.0."""


@dataclass(frozen=True)
class TensorCores(RunningSum):
    """Sums as the device keeps them. Operands are codes in E4M3, held in float32."""

    fast: bool = False
    """Whether sums stay in the tensor core's registers (``use_fast_accum``) instead of being promoted into FP32."""

    def matmul(self, a: Tensor, b: Tensor) -> Tensor:
        """a [M, K] times b [K, N], float32 [M, N]: scales of 1, so that scales of any granularity come behind it."""
        (rows, length), columns = a.shape, b.shape[1]
        if not rows or not length or not columns:
            return a.new_zeros(rows, columns, dtype=torch.float32)
        long, wide = -length % MULTIPLE, -columns % MULTIPLE
        left = functional.pad(a, (0, long)).to(torch.float8_e4m3fn).contiguous()
        right = functional.pad(b.t(), (0, long, 0, wide)).to(torch.float8_e4m3fn).contiguous().t()
        one = torch.ones((), device=a.device)
        product = torch._scaled_mm(
            left, right, scale_a=one, scale_b=one, out_dtype=torch.float32, use_fast_accum=self.fast
        )
        return product[:, :columns]

    @property
    def settings(self) -> dict[str, Any]:
        """The product in words, JSON-safe."""
        return {"product": "torch._scaled_mm", "use_fast_accum": self.fast, "filled_up_to_multiples_of": MULTIPLE}


def unavailable(device: str) -> str:
    """Reason why FP8 products cannot be computed on ``cpu`` or ``cuda:N``; empty where they can."""
    if not hasattr(torch, "_scaled_mm") or not hasattr(torch, "float8_e4m3fn"):
        return f"torch {torch.__version__} has no torch._scaled_mm"
    if device != "cpu" and (found := torch.cuda.get_device_capability(device)) < FIRST_CAPABILITY:
        name = torch.cuda.get_device_name(device)
        return f"{name} has no FP8: its compute capability is {found[0]}.{found[1]}, FP8 begins with 8.9"
    try:
        TensorCores("fp32", None, 23, 32).matmul(torch.ones(16, 16, device=device), torch.ones(16, 16, device=device))
    except (RuntimeError, NotImplementedError, ValueError) as error:
        return f"torch._scaled_mm does not run on {device}: {str(error).splitlines()[0]}"
    return ""
