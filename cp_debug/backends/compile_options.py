"""Options of ``torch-compile``: the compiler behind dynamo, its mode, and how it treats shapes and casts."""

from __future__ import annotations

from dataclasses import dataclass

from cp_debug.backends.narrow_options import Words, read_words
from cp_debug.errors import InputError

COMPILERS = ("inductor", "aot_eager", "eager")
MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
"""Modes of inductor, as ``torch.compile`` names them."""
_KNOWN: Words = {
    **{word: ("compiler", word) for word in COMPILERS},
    **{word: ("mode", word) for word in MODES},
    **{word: (word, True) for word in ("dynamic", "casts")},
}

INDUCTOR = ("cpp_", "triton_", "extern_kernels.")
"""Beginnings of the names of inductor's kernels."""


@dataclass(frozen=True)
class CompileOptions:
    """What stands behind the colons of ``torch-compile:aot_eager:dynamic``."""

    compiler: str = "inductor"
    """``inductor``, ``aot_eager`` (its graph and decompositions without its kernels) or ``eager`` (dynamo alone)."""
    mode: str = "default"
    dynamic: bool = False
    """Whether shapes are compiled as free from the first run on."""
    casts: bool = False
    """Whether inductor rounds between the operators of one kernel, as eager does: ``emulate_precision_casts``."""

    def __str__(self) -> str:
        """The canonical spelling, empty or from the first colon on."""
        words = [w for w, default in ((self.compiler, "inductor"), (self.mode, "default")) if w != default]
        return "".join(f":{word}" for word in [*words, *["dynamic"] * self.dynamic, *["casts"] * self.casts])

    @classmethod
    def parse(cls, text: str) -> CompileOptions:
        """Read ``:aot_eager:dynamic``. Raises InputError for options that it does not have, or not together."""
        options = cls(**read_words(text, filter(None, text.split(":")), _KNOWN, "torch-compile"))  # type: ignore[arg-type]
        if options.compiler != "inductor" and (options.mode != "default" or options.casts):
            raise InputError(f"{text!r}: modes and casts are options of inductor; remove {options.compiler}")
        return options
