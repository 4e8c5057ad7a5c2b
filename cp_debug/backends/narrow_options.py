"""Options of the narrow precisions, as a backend spec spells them: ``emu-fp8:block:acc=fp22``. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
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
        given = read_words(text, words, {**_KNOWN[family], **_SUM_WORDS, **_OUT}, family, _number)
        if given.get("sum") in (None, "fp32"):
            if idle := [w for w in words if w.startswith(("round=", "promote="))]:
                raise InputError(f"{text!r}: {idle[0]!r} needs a sum narrower than FP32; add acc=fp22")
        elif given["sum"] == "fp16" and "nearest" in given:
            raise InputError(f"{text!r}: sums in FP16 are rounded to nearest; remove round=")
        options = cls(family, **_fields(given))  # type: ignore[arg-type]
        if options.asymmetric and options.symmetric:
            raise InputError(f"{text!r}: groups have a zero point, or none; expected one of asym and sym")
        block = 16 if options.half_sum else 32
        if (number := options.promote) and number % block:
            raise InputError(f"{text!r}: promote={number}; an instruction adds {block}, expected a multiple of it")
        return options


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
        known = {**_GRANULARITY, "fast": ("fast", True), "dynamic": ("dynamic", True), **_OUT}
        given = read_words(text, words, known, "torch-fp8")
        fast, dynamic = (bool(given.pop(name, False)) for name in ("fast", "dynamic"))
        if dynamic and given.get("granularity", "tensor") != "tensor":
            raise InputError(f"{text!r}: scales of rows and blocks are always computed at run time; remove dynamic")
        return cls(NarrowOptions(family, **given), fast, dynamic)  # type: ignore[arg-type]


Words = Mapping[str, "tuple[str, object] | None"]
"""Word of a spec → field and value that it stands for; None for one that shows how a number is given."""


def read_words(
    text: str,
    words: Iterable[str],
    known: Words,
    owner: str,
    number: Callable[[str, Words, str], tuple[str, object] | None] = lambda word, known, text: None,
) -> dict[str, object]:
    """Options of ``owner`` by field, from the ``words`` of a spec's ``text``; ``number`` reads those with a number.

    Raises InputError for an unknown word, and for two of one field.
    """
    given: dict[str, object] = {}
    for word in words:
        if (found := known.get(word) or number(word, known, text)) is None:
            hint = did_you_mean(word, known)
            raise InputError(f"{text!r}: {owner} has no option {word!r}; it has {', '.join(known)}{hint}")
        if found[0] in given:
            raise InputError(f"{text!r}: {word!r} repeats another option")
        given[found[0]] = found[1]
    return given


def _number(word: str, known: Words, text: str) -> tuple[str, object] | None:
    if (found := re.fullmatch(r"acc=(\d{1,2})-bit", word)) and 4 <= int(found[1]) <= 23:
        return "sum", f"{found[1]}-bit"
    if found := re.fullmatch(r"promote=([1-9]\d{0,5})", word):
        return "promote", int(found[1])
    if re.fullmatch(r"g\d+", word) and f"g{GROUPS[0]}" in known:
        raise InputError(f"{text!r}: a group of {word[1:]}; expected one of {', '.join(f'g{g}' for g in GROUPS)}")
    return None


_GRANULARITY: Words = {word: ("granularity", word) for word in GRANULARITIES}
_ELEMENT: Words = {word: ("element", word) for word in ("e4m3", "e5m2")}
_UP: Words = {"up": ("scale_up", True)}
_KNOWN: dict[str, Words] = {
    "fp8": {**_ELEMENT, **_GRANULARITY},
    "mxfp8": {**_ELEMENT, **_UP},
    "mxfp4": _UP,
    "nvfp4": {},
    "int4": {**{f"g{g}": ("group", g) for g in GROUPS}, "asym": ("asymmetric", True), "sym": ("symmetric", True)},
}
_SUM_WORDS: Words = {
    **{f"acc={word}": ("sum", word) for word in (*SUMS, "14-bit")},
    "round=truncate": ("nearest", False),
    "round=nearest": ("nearest", True),
    "promote=N": None,
}
_OUT: Words = {f"out={word}": ("out", word) for word in ("fp32", "bf16", "fp16")}


def _fields(given: dict[str, object]) -> dict[str, object]:
    """Options by field: the sum's word as the fields that hold it."""
    fields = {k: v for k, v in given.items() if k != "sum"}
    word = str(given.get("sum", "fp32"))
    if word == "fp16":
        fields |= {"significant": 11, "half_sum": True, "nearest": True}
    elif word != "fp32":
        fields["significant"] = 14 if word == "fp22" else int(word.removesuffix("-bit"))
    return fields
