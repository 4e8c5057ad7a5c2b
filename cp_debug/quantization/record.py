"""Record of how a module was quantized, which it carries, and its quantizers: switched off and on, and listed."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, ParamSpec, TypeVar

from torch import nn

from cp_debug.display import terminal
from cp_debug.errors import InputError
from cp_debug.programs.batchnorm_folding import Folding
from cp_debug.programs.torch_layers import is_quantized, quantizers, select
from cp_debug.quantization.residual_adds import add_quantizers

P = ParamSpec("P")
R = TypeVar("R")


def also_named(**names: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A decorator: the function takes ``their_name=`` for the argument that it calls ``our_name``.

    ``names``: their name → ours. A call that gives one argument by both names raises InputError; what is wrong with
    one is said of the name that it was given by.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def called(*args: P.args, **kwargs: P.kwargs) -> R:
            given = {ours: theirs for theirs, ours in names.items() if theirs in kwargs}
            for ours, theirs in given.items():
                if ours in kwargs:
                    raise InputError(f"{ours} and {theirs} mean the same; expected one of them")
                kwargs[ours] = kwargs.pop(theirs)
            try:
                return function(*args, **kwargs)
            except InputError as error:
                name, colon, why = str(error).partition(": ")
                if name in given:
                    raise InputError(f"{given[name]}{colon}{why}") from error
                raise

        return called

    return decorate


NOT_RUN = "it did not run during calibration"


@dataclass
class Quantization:
    """Record of how a module was quantized; ``quantization`` on the module."""

    model: str
    """SHA-256 of the FP32 weights, BatchNorm folded."""
    method: str
    layers: Sequence[str]
    """Paths of layers with quantizers, in this module."""
    residual_adds: Sequence[str] = ()
    skipped: dict[str, str] = field(default_factory=dict)
    """Layers that stay in FP32, and why."""
    folding: Folding = field(default_factory=lambda: Folding(()))


def quantization_of(module: nn.Module) -> Quantization:
    """The record of how a module was quantized.

    Raises InputError for a module that was not quantized, or not by ``quantize_ptq``.
    """
    record = getattr(module, "quantization", None)
    if not isinstance(record, Quantization):
        raise InputError(f"{type(module).__name__} is not quantized; expected what quantize_ptq returned")
    return record


_WHOLE = 10_000
"""Columns in which every name and number has room."""


class _Toggle(AbstractContextManager["_Toggle"]):
    """Switches quantizers at once; leaving it as a context manager puts back what was before."""

    def __init__(self, module: nn.Module, globs: tuple[str, ...], on: bool) -> None:
        self._on = on
        self._before = [(quantizer, bool(quantizer.is_enabled)) for quantizer in _chosen(module, globs)]
        self.apply()

    def apply(self, switched: bool = True) -> _Toggle:
        """Switch them, which making this object has done already; False puts back what was before."""
        for quantizer, before in self._before:
            (quantizer.enable if (self._on if switched else before) else quantizer.disable)()
        return self

    def __exit__(self, *error: object) -> None:
        self.apply(False)


def _chosen(module: nn.Module, globs: tuple[str, ...]) -> list[Any]:
    """The quantizers that the globs mean; of a layer, or another part of a quantized module, all that have scales."""
    if not hasattr(module, "quantization") and not globs and is_quantized(module):
        return [quantizer for _, quantizer in quantizers(module) if quantizer.amax is not None]
    record, residual_adds = quantization_of(module), add_quantizers(module)
    chosen: list[Any] = []
    for path in select([*record.layers, *record.residual_adds], globs or ("*",)):
        layer: Any = None if path in residual_adds else module.get_submodule(path)
        chosen += [residual_adds[path]] if layer is None else [layer.input_quantizer, layer.weight_quantizer]
    return chosen


@also_named(model="module")
def disable_quantization(module: nn.Module, *globs: str) -> _Toggle:
    """Let the layers and additions that a glob means compute in FP32, all of them without a glob.

    ``module`` is what ``quantize_ptq`` gave or, without globs, any layer or other part of it. The effect lasts, or ends
    with the block where this is used as a context manager (``with disable_quantization(module, "head.*"):``);
    ``.apply()`` may follow, as in AWML, and changes nothing more. Raises InputError, with the nearest names, for a glob
    that means none, and for a module that is not quantized.
    """
    return _Toggle(module, globs, on=False)


@also_named(model="module")
def enable_quantization(module: nn.Module, *globs: str) -> _Toggle:
    """The opposite of ``disable_quantization``. Quantizers that have no scale stay off: outputs, BatchNorm, skips."""
    return _Toggle(module, globs, on=True)


@dataclass(frozen=True)
class QuantizerRow:
    """One quantizer, or a layer that has none."""

    name: str
    bits: int
    axis: int | None
    """Axis with one scale for each slice; None: one scale for the whole tensor."""
    amax: float | tuple[float, float] | None
    """Largest magnitude that is not clipped, or the least and greatest of the channels'; None without a scale."""
    enabled: bool
    why: str = ""
    """Reason why it is not enabled."""


def quantizer_table(module: nn.Module) -> list[QuantizerRow]:
    """Every quantizer of a module, in the order of its layers. Raises InputError for one that is not quantized."""
    record = quantization_of(module)
    return [_row(module, path, quantizer, record.skipped) for path, quantizer in quantizers(module)]


@also_named(model="module")
def print_quantizer_status(module: nn.Module) -> None:
    """Print the table of a module's quantizers: whole, however narrow the terminal is."""
    from rich.console import Console

    wide = Console(width=_WHOLE)
    for part in terminal(quantizer_table(module), QuantizerRow):
        wide.print(part, soft_wrap=True)


def _row(module: nn.Module, path: str, quantizer: Any, skipped: dict[str, str]) -> QuantizerRow:
    layer, _, kind = path.rpartition(".")
    amax, enabled = quantizer.amax, bool(quantizer.is_enabled)
    amax_range = None if amax is None else float(amax) if amax.numel() == 1 else (float(amax.min()), float(amax.max()))
    if enabled:
        why = ""
    elif kind == "output_quantizer":
        why = "its readers quantize this output"
    elif amax is not None:
        why = "switched off"
    else:
        why = skipped.get(layer, f"{type(module.get_submodule(layer)).__name__.removeprefix('Quant')} stays in FP32")
    return QuantizerRow(path, quantizer.num_bits, quantizer.axis, amax_range, enabled, why)
