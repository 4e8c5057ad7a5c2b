"""Options of the narrow precisions, as a backend spec spells them: ``emu-fp8:block:acc=fp22``. Imports no torch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from cp_debug.errors import InputError
from cp_debug.safe_text import did_you_mean

FAMILIES = ("fp8", "mxfp8", "mxfp4", "nvfp4", "int4")
"""The narrow precisions."""
SUMS = ("fp32", "fp22", "fp16")
"""Running sums: FP32; 1 sign, 8 exponent and 13 fraction bits; FP16. ``N-bit`` is a sum of N significant bits."""
Granularity = Literal["tensor", "channel", "block"]
GRANULARITIES: tuple[Granularity, ...] = ("tensor", "channel", "block")
GROUPS = (16, 32, 64, 128, 256)
"""Lengths of INT4 groups that MatMulNBits takes."""


def is_narrow(precision: str) -> bool:
    """Whether a precision, with or without options, is one of ``FAMILIES``."""
    return precision.partition(":")[0] in FAMILIES


@dataclass(frozen=True)
class NarrowOptions:
    """One of ``FAMILIES`` with its options."""

    family: str
    element: Literal["e4m3", "e5m2"] = "e4m3"
    """Elements of FP8 and MXFP8."""
    granularity: Granularity = "tensor"
    """Values that share a scale in FP8: a tensor, a row or output channel, or a block (1×128 data, 128×128 weights)."""
    significant: int | None = None
    """Significant bits of the running sum; None: FP32."""
    half_sum: bool = False
    """Whether the running sum is FP16, with its range."""
    nearest: bool = False
    """Whether a narrow sum is rounded to nearest, not cut off."""
    promote: int | None = None
    """Products after which a narrow sum is added to one in FP32."""
    out: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Type of all values between the products."""
    scale_up: bool = False
    """Whether E8M0 scales are rounded up, so that nothing is cut off, as NVIDIA's libraries do it for MXFP8; else down,
    as the MX specification has it."""
    group: int = 128
    """Values that share a scale in INT4."""
    asymmetric: bool = False
    """Whether INT4 groups have a zero point of their own."""
    symmetric: bool = False
    """Whether the scale of an INT4 group is its largest magnitude divided by 7, as ModelOpt has it and TensorRT wants
    it; else the value of largest magnitude has level -8, whatever its sign."""

    def __str__(self) -> str:
        """The canonical spelling: what ``parse`` makes the same options of."""
        sum_ = "fp16" if self.half_sum else None if self.significant is None else f"{self.significant}-bit"
        parts = [
            self.element if self.element != "e4m3" else "",
            self.granularity if self.granularity != "tensor" else "",
            f"g{self.group}" if self.family == "int4" and self.group != 128 else "",
            "asym" if self.asymmetric else "sym" if self.symmetric else "",
            "up" if self.scale_up else "",
            f"acc={'fp22' if sum_ == '14-bit' else sum_}" if sum_ else "",
            "round=nearest" if self.nearest and not self.half_sum else "",
            f"promote={self.promote}" if self.promote else "",
            f"out={self.out}" if self.out != "fp32" else "",
        ]
        return ":".join([self.family, *filter(None, parts)])

    @classmethod
    def parse(cls, text: str) -> NarrowOptions:
        """Read ``fp8:e5m2:channel:acc=fp22:promote=128``.

        Raises InputError for what the family does not have, and for options that would change nothing.
        """
        family, *words = text.split(":")
        if family not in FAMILIES:
            raise InputError(f"{text!r}: expected one of {', '.join(FAMILIES)}")
        given: dict[str, object] = {}
        for word in words:
            field, value = _option(family, word, text)
            if field in given:
                raise InputError(f"{text!r}: {word!r} repeats another option")
            given[field] = value
        if given.get("sum") in (None, "fp32"):
            if idle := [w for w in words if w.startswith(("round=", "promote="))]:
                raise InputError(f"{text!r}: {idle[0]!r} needs a sum narrower than FP32; add acc=fp22")
        elif given["sum"] == "fp16" and "nearest" in given:
            raise InputError(f"{text!r}: sums in FP16 are rounded to nearest; remove round=")
        return _checked(cls(family, **_fields(given)), text)  # type: ignore[arg-type]


@dataclass(frozen=True)
class TorchFp8Options:
    """Options of ``torch-fp8``, whose products run on the device."""

    narrow: NarrowOptions
    """Granularity of the scales, and the type between the products."""
    fast: bool = False
    """Whether ``torch._scaled_mm`` is called with ``use_fast_accum``."""
    dynamic: bool = False
    """Whether the scale of a tensor of data is found in it at every run, not calibrated on the first."""

    @property
    def calibrates(self) -> bool:
        """Whether data has scales that are chosen before a run: scales of rows and blocks never are."""
        return self.narrow.granularity == "tensor" and not self.dynamic

    def __str__(self) -> str:
        """The canonical spelling."""
        return ":".join([str(self.narrow), *["fast"] * self.fast, *["dynamic"] * self.dynamic])

    @classmethod
    def parse(cls, text: str) -> TorchFp8Options:
        """Read ``fp8:channel:fast``. Raises InputError for options that the backend does not have."""
        family, *words = text.split(":")
        own = [word for word in words if word in ("fast", "dynamic")]
        if len(set(own)) < len(own):
            raise InputError(f"{text!r}: {own[0]!r} repeats another option")
        known = (*GRANULARITIES, "fast", "dynamic", "out=fp32", "out=bf16", "out=fp16")
        for word in words:
            if word not in known:
                hint = did_you_mean(word, known)
                raise InputError(f"{text!r}: torch-fp8 has no option {word!r}; it has {', '.join(known)}{hint}")
        narrow = NarrowOptions.parse(":".join([family, *(w for w in words if w not in own)]))
        if narrow.granularity != "tensor" and "dynamic" in own:
            raise InputError(f"{text!r}: scales of rows and blocks are always computed at run time; remove dynamic")
        return cls(narrow, "fast" in own, "dynamic" in own)


def _option(family: str, word: str, text: str) -> tuple[str, object]:
    """Field and value of one option."""
    name, _, value = word.partition("=")
    if word in ("e4m3", "e5m2") and family in ("fp8", "mxfp8"):
        return "element", word
    if word in GRANULARITIES and family == "fp8":
        return "granularity", word
    if word == "up" and family in ("mxfp8", "mxfp4"):
        return "scale_up", True
    if word in ("asym", "sym") and family == "int4":
        return f"{word}metric", True
    if re.fullmatch(r"g\d+", word) and family == "int4":
        if int(word[1:]) not in GROUPS:
            raise InputError(f"{text!r}: a group of {word[1:]}; expected one of {', '.join(f'g{g}' for g in GROUPS)}")
        return "group", int(word[1:])
    if name == "acc" and (value in SUMS or (re.fullmatch(r"\d{1,2}-bit", value) and 4 <= int(value[:-4]) <= 23)):
        return "sum", value
    if name == "round" and value in ("truncate", "nearest"):
        return "nearest", value == "nearest"
    if name == "promote" and re.fullmatch(r"[1-9]\d{0,5}", value):
        return "promote", int(value)
    if name == "out" and value in ("fp32", "bf16", "fp16"):
        return "out", value
    known = [*_KNOWN[family], "acc=fp32", "acc=fp22", "acc=fp16", "acc=14-bit", "round=truncate", "round=nearest"]
    known += ["promote=N", "out=fp32", "out=bf16", "out=fp16"]
    raise InputError(f"{text!r}: {family} has no option {word!r}; it has {', '.join(known)}{did_you_mean(word, known)}")


_KNOWN = {
    "fp8": ("e4m3", "e5m2", *GRANULARITIES),
    "mxfp8": ("e4m3", "e5m2", "up"),
    "mxfp4": ("up",),
    "nvfp4": (),
    "int4": (*(f"g{g}" for g in GROUPS), "asym", "sym"),
}


def _fields(given: dict[str, object]) -> dict[str, object]:
    """Options by field: the sum's word as the fields that hold it."""
    fields = {k: v for k, v in given.items() if k != "sum"}
    word = str(given.get("sum", "fp32"))
    if word == "fp16":
        fields |= {"significant": 11, "half_sum": True, "nearest": True}
    elif word != "fp32":
        fields["significant"] = 14 if word == "fp22" else int(word.removesuffix("-bit"))
    return fields


def _checked(options: NarrowOptions, text: str) -> NarrowOptions:
    if options.asymmetric and options.symmetric:
        raise InputError(f"{text!r}: groups have a zero point, or none; expected one of asym and sym")
    block = 16 if options.half_sum else 32
    if options.promote and options.promote % block:
        raise InputError(f"{text!r}: promote={options.promote}; an instruction adds {block}, expected a multiple of it")
    return options
