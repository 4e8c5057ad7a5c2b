"""Watch a model's layers while it runs, and choose their scales."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import chain, islice
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from cp_debug.doing import doing
from cp_debug.errors import CpdebugError, InputError, ModuleFailed, in_one_line
from cp_debug.graph.scales import QMAX, LayerScales, Scales
from cp_debug.probes.arrays import is_dense
from cp_debug.probes.trace import as_written, flatten_outputs, unwatched
from cp_debug.programs.align import module_digest
from cp_debug.programs.torch_layers import full_path, is_quantized, layers_of, matches, own_path, select, weight_axis
from cp_debug.quantization.histogram import PERCENTILE, Histogram, check_method, weight_amax
from cp_debug.quantization.record import also_named
from cp_debug.quantization.residual_adds import attach, find_adds


def is_plain(batch: Any) -> bool:
    """Whether a batch is what a forward takes: a tensor, several, or several by name."""
    items = batch.values() if isinstance(batch, Mapping) else [batch] if isinstance(batch, Tensor) else batch
    return isinstance(items, Iterable) and all(isinstance(item, Tensor) for item in items)


class NestedBatches:
    """Lets a model be called with tensors alone, as calibration does, while ``call`` gets whole batches.

    ``call(model, batch)`` runs the model on one batch. While this lasts, the model's class has a forward that puts the
    tensors back where they were, in copies of the model as well; a forward within ``call`` is the model's own.
    """

    def __init__(self, model: nn.Module, call: Callable[[nn.Module, Any], Any]) -> None:
        self._class = type(model)
        self._leaves: list[Any] = []
        self._spec: Any = None
        inside: set[int] = set()

        def forward(module: nn.Module, *given: Any, **named: Any) -> Any:
            if id(module) in inside:
                return self._class.forward(module, *given, **named)
            remaining = iter(given)
            leaves = [next(remaining) if isinstance(leaf, Tensor) else leaf for leaf in self._leaves]
            inside.add(id(module))
            try:
                return call(module, pytree.tree_unflatten(leaves, self._spec))
            finally:
                inside.discard(id(module))

        model.__class__ = type(self._class.__name__, (self._class,), {"forward": forward})

    def tensors(self, batches: Iterable[Any]) -> Iterator[tuple[Tensor, ...]]:
        """The tensors of each batch, of any shape and dtype; it is the current one until the next is asked for."""
        for batch in batches:
            self._leaves, self._spec = pytree.tree_flatten(batch)
            yield tuple(leaf for leaf in self._leaves if isinstance(leaf, Tensor))

    def restore(self, model: nn.Module) -> None:
        """Give a model its own class back."""
        model.__class__ = self._class


@contextmanager
def plain_batches(
    model: nn.Module, batches: Iterable[Any], count: int | None, call: Callable[[nn.Module, Any], Any] | None
) -> Iterator[tuple[Iterator[Any], Callable[[nn.Module], None]]]:
    """Batches that ``model`` takes meanwhile, at most ``count``, and a function that gives a copy its own class back.

    Nested ones go through ``call(model, batch)``, without one through the model's ``test_step`` where it has one.
    """
    stream: Iterator[Any] = islice(batches, count)
    begun = list(islice(stream, 1))
    stream = chain(begun, stream)
    call = call or (None if all(map(is_plain, begun)) else getattr(type(model), "test_step", None))
    if call is None:
        yield stream, lambda copy: None
        return
    nested = NestedBatches(model, tensors_only(call))
    try:
        yield nested.tensors(stream), nested.restore
    finally:
        nested.restore(model)


def tensors_only(call: Callable[[nn.Module, Any], Any]) -> Callable[[nn.Module, Any], Any]:
    """``call``, with the tensors of its result alone: nobody looks at what else a model predicts."""

    def called(model: nn.Module, batch: Any) -> Any:
        found = tuple(leaf for leaf in pytree.tree_leaves(call(model, batch)) if isinstance(leaf, Tensor))
        return found or torch.zeros(())

    return called


Batch: TypeAlias = Tensor | Sequence[Tensor] | Mapping[str, Tensor]
"""Arguments of a forward: one tensor, several, or several by name."""


class CalibrationManager:
    """Collects what the layers of ``module`` read, and gives the scales.

    ``max`` clips nothing; ``percentile`` keeps that share of the magnitudes, ``entropy`` their distribution; ``mse``
    has the least squared error at the module's outputs (``OutputErrors``), where torch cannot differentiate them that
    of the tensor itself.

    ``module`` is FP32, in eval mode, BatchNorm folded (``fuse_model_bn``); it is left as it was after every batch.
    ``skip_layers`` are globs over module paths, which ``prefix`` completes to those in the whole model; a path of a
    container stands for all in it. Raises InputError for an unknown method, a glob that matches nothing, and a module
    that is quantized already.
    """

    @also_named(model="module")
    def __init__(
        self,
        module: nn.Module,
        *,
        method: str = "mse",
        skip_layers: Sequence[str] = (),
        prefix: str = "",
        percentile: float = PERCENTILE,
    ) -> None:
        check_method(method)
        if is_quantized(module):
            raise InputError(f"{type(module).__name__} is quantized already; calibrate the FP32 model")
        self.module, self.method, self.prefix, self.percentile = module, method, prefix, percentile
        self.batches = 0
        chosen = select([self._full(path) for path in layers_of(module)], skip_layers)
        self.skipped = {own_path(prefix, path): glob for path, glob in chosen.items()}
        """Layers that stay in FP32 → the glob that said so."""
        self._skip_layers = skip_layers
        self._adds: list[str] | None = None
        self._seen: dict[str, Histogram] = {}
        """Layer or addition → what it read."""
        self._errors = OutputErrors() if method == "mse" else None

    @also_named(dataloader="batches")
    def calibrate(
        self,
        batches: Iterable[Any],
        num_batches: int | None = None,
        method: str | None = None,
        forward_fn: Callable[[nn.Module, Any], Any] | None = None,
    ) -> Scales:
        """The scales from these batches, of which ``num_batches`` are read (None: all), and all before.

        ``batches``, AWML's ``dataloader``, may be a data loader: a batch of nested containers is handed to
        ``forward_fn(model, batch)``, without one to the module's ``test_step`` where it has one. ``method`` takes the
        place of the manager's. Raises InputError without a batch, for fewer than one, for another method once batches
        were watched, and as ``run`` does.
        """
        if num_batches is not None and num_batches < 1:
            raise InputError(f"num_batches is {num_batches}; expected at least 1")
        if method is not None and method != self.method:
            check_method(method)
            if self.batches:
                raise InputError(f"method is {method!r}; the earlier batches were observed for {self.method!r}")
            self.method, self._errors = method, OutputErrors() if method == "mse" else None
        with plain_batches(self.module, batches, num_batches, forward_fn) as (stream, _):
            for batch in stream:
                self.run(batch)
        return self.scales()

    def run(self, batch: Batch) -> dict[str, Tensor]:
        """Forward one batch, watched; gives the outputs as ``flatten_outputs`` names them.

        Shapes and dtypes are the module's.
        Raises InputError for NaN or Inf in the batch or in what a layer reads, ModuleFailed when the module raises.
        """
        args = self.arguments(batch)
        self._check(args)
        if self._adds is None:
            sums = find_adds(self.module, args)
            skipped = {name for name in sums if any(matches(self._full(name), glob) for glob in self._skip_layers)}
            self._adds = [name for name in sums if name not in skipped]
        errors = self._errors if self.batches < BATCHES else None
        with ExitStack() as stack:
            stack.enter_context(torch.set_grad_enabled(errors is not None))
            stack.enter_context(_frozen(self.module))
            stack.enter_context(as_written())
            for path, layer in layers_of(self.module).items():
                if path not in self.skipped:
                    handle = nn.Module.register_forward_pre_hook(layer, self._in_front(path, errors), with_kwargs=True)
                    stack.callback(handle.remove)
            stack.callback(attach(self.module, {name: _Watcher(self, name, errors) for name in self._adds}))
            try:
                with doing(f"{type(self.module).__name__} ran", in_their_folder=True):
                    outputs = flatten_outputs(self.module(*args))
            except CpdebugError:
                raise
            except Exception as error:
                raise ModuleFailed(f"{type(self.module).__name__} raised in forward: {in_one_line(error)}") from error
            if errors is not None and not errors.differentiate([t for t in outputs.values() if is_dense(t)]):
                self._errors = None
        self.batches += 1
        return {name: tensor.detach() for name, tensor in outputs.items()}

    def scales(self) -> Scales:
        """The scales from all batches so far. Raises InputError when there was none."""
        if not self.batches:
            raise InputError("there is no calibration data: expected at least one batch")
        layers = layers_of(self.module)
        scales_by_layer, residual_adds = {}, {}
        for name in self._seen:
            if name in layers:
                weight = weight_amax(layers[name].weight, weight_axis(layers[name]), self.method)
                scales_by_layer[self._full(name)] = LayerScales(self._amax(name), weight.cpu().numpy())
            else:
                residual_adds[self._full(name)] = self._amax(name)
        return Scales(module_digest(self.module), self.method, scales_by_layer, residual_adds)

    def arguments(self, batch: Batch) -> tuple[Tensor, ...]:
        """A batch as positional arguments. Raises InputError when it does not fit the module's forward.

        A batch is a tensor, a sequence of tensors, or a mapping by argument name, of any shape that the module takes.
        """
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

    def _amax(self, name: str) -> float:
        histogram = self._seen[name]
        least = self._errors.amax(name, histogram.largest) if self._errors is not None else None
        return histogram.amax(self.method, self.percentile) if least is None else least

    def _in_front(self, path: str, errors: OutputErrors | None) -> Callable[..., tuple[Any, Any]]:
        def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
            if args:
                return (self.see(path, args[0], errors), *args[1:]), kwargs
            return args, kwargs | {"input": self.see(path, kwargs["input"], errors)}

        return hook

    def see(self, name: str, tensor: Tensor, errors: OutputErrors | None) -> Tensor:
        """Count a tensor that a layer or an addition reads; return the tensor to hand to it instead.

        Any shape, float dtype; the tensor returned has the same values.
        Raises InputError for NaN or Inf in it.
        """
        with unwatched():
            try:
                self._seen.setdefault(name, Histogram()).add(tensor)
            except ValueError as error:
                raise InputError(
                    f"calibration batch {self.batches}: what {self._full(name)} reads holds {error}, its inputs do not"
                ) from None
            return tensor if errors is None else errors.watch(name, tensor)

    def _full(self, path: str) -> str:
        return full_path(self.prefix, path)


class _Watcher(nn.Module):
    """Stands in front of an addition while it is calibrated."""

    def __init__(self, manager: CalibrationManager, name: str, errors: OutputErrors | None) -> None:
        super().__init__()
        self._see = partial(manager.see, name, errors=errors)

    def forward(self, tensor: Tensor) -> Tensor:
        """The tensor itself."""
        return self._see(tensor)


@contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    """No gradients for parameters."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_()


BATCHES = 16
"""Number of batches whose gradients are taken."""
_VECTORS = 4
"""Number of backward passes a batch."""
_HALF = 8192
"""Bins on each side of 0; the range is 2 to 4 times what the first batch holds."""
_CANDIDATES = 200
_LEAST = 0.01
"""The smallest scale that is tried, as a share of the largest magnitude."""


class OutputErrors:
    """The gradients of a network's outputs, by the tensors that its layers read."""

    def __init__(self) -> None:
        self._generator = torch.Generator().manual_seed(0)
        self._limits: dict[str, float] = {}
        self._rows: dict[str, list[Tensor]] = {}
        self._leaves: list[Tensor] = []

    def watch(self, name: str, tensor: Tensor) -> Tensor:
        """The tensor to hand to the layer: ``tensor`` itself, with only that layer's share of the gradient.

        Any shape, float dtype; both stay.
        """
        values = tensor.detach().flatten().float()
        largest = float(values.abs().amax()) if len(values) else 0.0
        if not largest:
            return tensor
        limit = self._limits.setdefault(name, 2.0 ** (math.ceil(math.log2(largest)) + 1))
        bins = (values * (_HALF / limit)).floor_().clamp_(-_HALF, _HALF - 1).int() + _HALF
        handed = tensor.view_as(tensor) if tensor.requires_grad else tensor.detach().requires_grad_()
        if handed.is_leaf:
            self._leaves.append(handed)

        def keep(gradient: Tensor) -> None:
            weights = gradient.flatten().double()
            self._rows[name][-1] += torch.bincount(bins, weights, minlength=2 * _HALF).cpu()

        self._rows.setdefault(name, [])
        handed.register_hook(keep)
        return handed

    def differentiate(self, outputs: Sequence[Tensor]) -> bool:
        """Go back from the outputs of a watched forward, each counting alike; False where torch cannot.

        Outputs have any shape and a float dtype.
        """
        ends = [output for output in outputs if output.requires_grad]
        leaves, self._leaves = self._leaves, []
        for _ in range(_VECTORS if ends else 0):
            for rows in self._rows.values():
                rows.append(torch.zeros(2 * _HALF, dtype=torch.float64))
            signs = [torch.randint(0, 2, end.shape, generator=self._generator) * 2.0 - 1 for end in ends]
            norms = [float(torch.linalg.vector_norm(end.detach())) or 1.0 for end in ends]
            starts = [(s / norm).to(end) for s, norm, end in zip(signs, norms, ends, strict=True)]
            try:
                torch.autograd.backward(ends, starts, retain_graph=True, inputs=leaves)
            except RuntimeError:  # an operation without derivative, or one in place on what it needs
                return False
        return bool(ends)

    def amax(self, name: str, largest: float) -> float | None:
        """The clip limit with the least error at the outputs, up to ``largest``; None where no gradient came.

        Hutchinson's estimate of ‖J·δ‖² decides; see the module's text.
        """
        rows = torch.stack(self._rows[name]) if self._rows.get(name) else torch.zeros(1, 2 * _HALF)
        occupied = rows.any(dim=0)
        occupied[_HALF] = False  # zeros are exact
        if not occupied.any():
            return None
        values = ((torch.arange(-_HALF, _HALF) + 0.5) * (self._limits[name] / _HALF)).double()[occupied]
        candidates = torch.logspace(math.log10(_LEAST), 0, _CANDIDATES, dtype=torch.float64) * largest
        steps = (candidates / QMAX)[:, None]
        changes = (values / steps).round_().clamp_(-QMAX - 1, QMAX).mul_(steps).sub_(values)
        errors = (rows[:, occupied] @ changes.T).square_().mean(dim=0)
        return float(candidates[errors.argmin()])
