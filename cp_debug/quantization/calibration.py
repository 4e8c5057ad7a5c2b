"""Watch a model's layers while it runs, and choose their scales."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from cp_debug.errors import InputError
from cp_debug.probes.alignment import module_digest
from cp_debug.probes.trace import unwatched
from cp_debug.quantization.adds import attach, find_adds
from cp_debug.quantization.histogram import PERCENTILE, Histogram, check_method, weight_amax
from cp_debug.quantization.layers import full_path, layers_of, matches, own_path, select, weight_axis
from cp_debug.quantization.library import is_quantized
from cp_debug.quantization.scales import LayerScales, Scales

Batch: TypeAlias = Tensor | Sequence[Tensor] | Mapping[str, Tensor]
"""Arguments of forward: one, several, or by name."""


class CalibrationManager:
    """Collects what the layers of ``module`` read, and gives the scales by any method.

    ``module`` is FP32, in eval mode, BatchNorm folded (``fuse_model_bn``); it is left as it was after every batch.
    ``skip_layers`` are globs over module paths, which ``prefix`` completes to those in the whole model; a path of a
    container stands for all in it. Raises InputError for an unknown method, a glob that matches nothing, and a module
    that is quantised already.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        method: str = "max",
        skip_layers: Sequence[str] = (),
        prefix: str = "",
        percentile: float = PERCENTILE,
    ) -> None:
        check_method(method)
        if is_quantized(module):
            raise InputError(f"{type(module).__name__} is quantised already; calibrate the FP32 model")
        self.module, self.method, self.prefix, self.percentile = module, method, prefix, percentile
        self.batches = 0
        chosen = select([self._full(path) for path in layers_of(module)], skip_layers)
        self.skipped = {own_path(prefix, path): glob for path, glob in chosen.items()}
        """Layers that stay in FP32 → the glob that said so."""
        self._skip_layers = skip_layers
        self._inputs: dict[str, Histogram] = {}
        self._adds: dict[str, Histogram] | None = None

    def calibrate(self, batches: Iterable[Batch]) -> Scales:
        """The scales from these batches and all before. Raises InputError without a batch, and as ``run`` does."""
        for batch in batches:
            self.run(batch)
        return self.scales()

    def run(self, batch: Batch) -> Any:
        """Forward one batch, watched; gives what the module returns.

        Raises InputError for NaN or Inf in the batch or in what a layer reads, ModuleFailed when the module raises.
        """
        args = self.arguments(batch)
        self._check(args)
        if self._adds is None:
            found = find_adds(self.module, args)
            skipped = {a for a in found if any(matches(self._full(a), glob) for glob in self._skip_layers)}
            self._adds = {name: Histogram() for name in found if name not in skipped}
        with ExitStack() as stack, torch.no_grad():
            for path, layer in layers_of(self.module).items():
                if path in self.skipped:
                    continue
                handle = layer.register_forward_pre_hook(lambda _, args, path=path: self._watch(path, args[0]))
                stack.callback(handle.remove)
            watchers = {name: _Watcher(self, name, histogram) for name, histogram in self._adds.items()}
            stack.callback(attach(self.module, watchers))
            result = self.module(*args)
        self.batches += 1
        return result

    def scales(self, method: str | None = None) -> Scales:
        """From what was seen so far, by ``method`` or the manager's own. Raises InputError when nothing was seen."""
        if not self.batches:
            raise InputError("there is no calibration data: expected at least one batch")
        method = method or self.method
        layers, found = layers_of(self.module), {}
        for path, histogram in self._inputs.items():
            layer = layers[path]
            weight = weight_amax(layer.weight, weight_axis(layer), method)
            found[self._full(path)] = LayerScales(histogram.amax(method, self.percentile), weight.cpu().numpy())
        adds = {self._full(name): h.amax(method, self.percentile) for name, h in (self._adds or {}).items()}
        return Scales(module_digest(self.module), method, found, adds)

    def save_cache(self, path: Path) -> None:
        """Write the scales as a calibration cache. Raises InputError when nothing was seen."""
        self.scales().save(path)

    def load_cache(self, path: Path) -> Scales:
        """Scales that were saved for this very model. Raises InputError for a cache of another one."""
        scales = Scales.load(path)
        check_model(self.module, scales, str(path))
        return scales

    def arguments(self, batch: Batch) -> tuple[Tensor, ...]:
        """A batch as positional arguments. Raises InputError when it does not fit the module's forward."""
        if isinstance(batch, Tensor):
            return (batch,)
        if not isinstance(batch, Mapping):
            return tuple(batch)
        try:
            return inspect.signature(self.module.forward).bind(**batch).args
        except TypeError as error:
            raise InputError(f"calibration batch {self.batches}: {error}") from None

    def _check(self, args: Sequence[Tensor]) -> None:
        names = [*inspect.signature(self.module.forward).parameters]
        for index, tensor in enumerate(args):
            if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                name = names[index] if index < len(names) else str(index)
                kind = "NaN" if bool(tensor.isnan().any()) else "Inf"
                raise InputError(f"calibration batch {self.batches}: the input {name!r} holds {kind}")

    def _watch(self, path: str, tensor: Tensor) -> None:
        self._count(path, self._inputs.setdefault(path, Histogram()), tensor)

    def _count(self, name: str, histogram: Histogram, tensor: Tensor) -> None:
        try:
            with unwatched():
                histogram.add(tensor)
        except ValueError as error:
            raise InputError(
                f"calibration batch {self.batches}: what {self._full(name)} reads holds {error}, its inputs do not"
            ) from None

    def _full(self, path: str) -> str:
        return full_path(self.prefix, path)


class _Watcher(nn.Module):
    """Stands in front of an addition while it is calibrated."""

    def __init__(self, manager: CalibrationManager, name: str, histogram: Histogram) -> None:
        super().__init__()
        self._see = lambda tensor: manager._count(name, histogram, tensor)

    def forward(self, tensor: Tensor) -> Tensor:
        """The tensor itself."""
        self._see(tensor)
        return tensor


def check_model(module: nn.Module, scales: Scales, source: str) -> None:
    """Raise InputError unless ``scales`` were made for the weights of ``module``, BatchNorm folded."""
    if scales.model != module_digest(module):
        raise InputError(
            f"{source}: these scales were calibrated on other weights than those of this {type(module).__name__}; "
            "expected the cache of this very model, BatchNorm folded"
        )
