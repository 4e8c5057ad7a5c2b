"""Batches that are nested containers, as data loaders give them: a module called with the tensors in them alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree


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
