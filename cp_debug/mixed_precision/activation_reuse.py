"""Forward passes that differ in some layers: layers beside or above those are not computed again."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from cp_debug.doing import doing
from cp_debug.probes.trace import as_written

Call = Callable[..., Any]
Around = Callable[[nn.Module, Call, tuple[Any, ...], dict[str, Any]], Any]


class _RecordedCall(NamedTuple):
    """One call of a module. ``versions`` tell whether an in-place operation has changed its result since."""

    inputs: list[Any]
    output: Any
    versions: list[int]


class Reuse:
    """Runs ``module``, and runs it again with some of its ``layers`` (paths) changed.

    A call whose module holds nothing that changed, and whose inputs are the very tensors of the recorded call, gives
    the recorded result. So a change in one head costs that head, however the modules are wired. A layer is computed
    whole, or not at all.
    """

    def __init__(self, module: nn.Module, layers: Collection[str]) -> None:
        self.module = module
        self._runs = f"{type(module).__name__} ran"
        inside = tuple(f"{layer}." for layer in layers)
        self._paths = {child: path for path, child in module.named_modules() if not path.startswith(inside)}
        self._calls: dict[nn.Module, list[_RecordedCall]] = {}

    def record(self, *inputs: Tensor) -> Any:
        """Run the module and return its outputs; every call in it is kept."""
        self._calls = {}

        def keep(module: nn.Module, forward: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            call_inputs = pytree.tree_leaves((args, kwargs))
            output = forward(module, *args, **kwargs)
            self._calls.setdefault(module, []).append(_RecordedCall(call_inputs, output, _versions(output)))
            return output

        with (
            torch.no_grad(),
            as_written(),
            self._around_calls(keep),
            doing(self._runs, in_their_folder=True),
        ):
            return self.module(*inputs)

    def rerun(self, changed: Collection[str], *inputs: Tensor) -> tuple[Any, dict[str, list[Any]]]:
        """Outputs now that some layers have changed, and the results of each call of these layers."""
        results: dict[str, list[Any]] = {path: [] for path in changed}
        names = [path.split(".") for path in changed]
        stale = {".".join(parts[:end]) for parts in names for end in range(len(parts) + 1)}  # they and what holds them

        def look_up(module: nn.Module, forward: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            path = self._paths[module]
            if path not in stale:
                recorded_call = self._find(module, pytree.tree_leaves((args, kwargs)))
                if recorded_call is not None:
                    return recorded_call.output
            output = forward(module, *args, **kwargs)
            if path in results:
                results[path].append(output)
            return output

        with (
            torch.no_grad(),
            as_written(),
            self._around_calls(look_up),
            doing(self._runs, in_their_folder=True),
        ):
            return self.module(*inputs), results

    def outputs(self, layer: str) -> list[Any]:
        """Results of each recorded call of ``layer``; valid until an in-place operation changes them."""
        return [call.output for call in self._calls.get(self.module.get_submodule(layer), ())]

    def _find(self, module: nn.Module, inputs: list[Any]) -> _RecordedCall | None:
        for call in self._calls.get(module, ()):
            same = len(call.inputs) == len(inputs) and all(map(_same, call.inputs, inputs))
            if same and call.versions == _versions(call.output):
                return call
        return None

    @contextmanager
    def _around_calls(self, around: Around) -> Iterator[None]:
        """``around`` stands for every call of the module's own children; torch.fx traces in the same way."""
        original = nn.Module.__call__

        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if module in self._paths:
                return around(module, original, args, kwargs)
            return original(module, *args, **kwargs)

        nn.Module.__call__ = call  # type: ignore[method-assign]
        try:
            yield
        finally:
            nn.Module.__call__ = original  # type: ignore[method-assign]


def _same(a: Any, b: Any) -> bool:
    return a is b if isinstance(a, Tensor) or isinstance(b, Tensor) else bool(a == b)


def _versions(output: Any) -> list[int]:
    return [leaf._version for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
