"""Options of ``torch-compile``: the compiler behind dynamo, its mode, and how it treats shapes and casts."""

from __future__ import annotations

from dataclasses import dataclass

from cp_debug.errors import InputError
from cp_debug.safe_text import did_you_mean

COMPILERS = ("inductor", "aot_eager", "eager")
MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
"""Modes of inductor, as ``torch.compile`` names them."""

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
        given: dict[str, object] = {}
        for word in filter(None, text.split(":")):
            field = "compiler" if word in COMPILERS else "mode" if word in MODES else word
            if field not in ("compiler", "mode", "dynamic", "casts"):
                known = (*COMPILERS, *MODES, "dynamic", "casts")
                hint = did_you_mean(word, known)
                raise InputError(f"{text!r}: torch-compile has no option {word!r}; it has {', '.join(known)}{hint}")
            if field in given:
                raise InputError(f"{text!r}: {word!r} repeats another option")
            given[field] = word if field in ("compiler", "mode") else True
        options = cls(**given)  # type: ignore[arg-type]
        if options.compiler != "inductor" and (options.mode != "default" or options.casts):
            raise InputError(f"{text!r}: modes and casts are options of inductor; remove {options.compiler}")
        return options
