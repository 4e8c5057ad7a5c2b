"""Sliding windows: what Conv, ConvTranspose and the pools share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cp_debug.backends.kernels.registry import Call


@dataclass(frozen=True)
class Window:
    """Kernel, stride, dilation and padding of each spatial axis."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    begin: tuple[int, ...]
    end: tuple[int, ...]

    @classmethod
    def of(cls, call: Call, kernel: Sequence[int], size: Sequence[int]) -> Window:
        """Read the attributes for an input of spatial ``size``; resolves auto_pad."""
        rank = len(kernel)
        stride = tuple(call["strides"] or (1,) * rank)
        dilation = tuple(call["dilations"] or (1,) * rank)
        pads = tuple(call["pads"] or (0,) * 2 * rank)
        if call["auto_pad"] in ("SAME_UPPER", "SAME_LOWER"):
            spans = [(k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True)]
            totals = [max((-(-n // s) - 1) * s + span - n, 0) for n, s, span in zip(size, stride, spans, strict=True)]
            pads = split_padding(totals, extra_at_end=call["auto_pad"] == "SAME_UPPER")
        return cls(tuple(kernel), stride, dilation, pads[:rank], pads[rank:])

    @property
    def symmetric(self) -> bool:
        """Whether the padding is the same at both ends of every axis."""
        return self.begin == self.end

    def torch_pads(self, extra_end: Sequence[int] | None = None) -> list[int]:
        """The padding in the order of ``torch.nn.functional.pad``: last axis first."""
        ends = self.end if extra_end is None else [e + x for e, x in zip(self.end, extra_end, strict=True)]
        return [p for pair in zip(reversed(self.begin), reversed(ends), strict=True) for p in pair]

    def output_size(self, size: Sequence[int], *, ceil: bool = False) -> tuple[int, ...]:
        """Spatial size of the result. With ``ceil`` a last window may start inside the padded input and end outside."""
        out = []
        for n, k, s, d, b, e in zip(size, self.kernel, self.stride, self.dilation, self.begin, self.end, strict=True):
            free = n + b + e - (k - 1) * d - 1
            count = free // s + 1
            if ceil and free % s and count * s < n + b:  # a window that would start in the end padding is left out
                count += 1
            out.append(count)
        return tuple(out)


def split_padding(totals: Sequence[int], *, extra_at_end: bool) -> tuple[int, ...]:
    """Share each axis' total padding between its ends, the odd one at the end or at the beginning."""
    small, large = [t // 2 for t in totals], [t - t // 2 for t in totals]
    return (*small, *large) if extra_at_end else (*large, *small)
