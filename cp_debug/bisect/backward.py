"""One walk backward over the replayed segments of a graph: what each layer's own error makes of a sum of its outputs.

For a linear measure of the outputs, ⟨A, outputs⟩, and the error eᵢ of layer i, ⟨A, J eᵢ⟩ = ⟨Jᵀ A, eᵢ⟩, with J the
derivative of all that is behind the layer. Jᵀ A is the same for all layers and grows segment by segment, last to first,
by torch's autograd on a segment's replay from the test's own inputs; so J belongs to the test's trajectory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

from cp_debug.backends.base import Tensor as AnyTensor
from cp_debug.bisect.replay import Load, Replayer
from cp_debug.bisect.whole_numbers import as_tensor
from cp_debug.errors import InputError, in_one_line
from cp_debug.graph.graph import Node
from cp_debug.graph.randomness import draws


class Backward:
    """Walks one component's graph back, from derivatives of its outputs to those of its inputs."""

    def __init__(self, replayer: Replayer, test: Load) -> None:
        """``test`` loads the test's captured values, by the names of the replayer's graph."""
        self._replayer, self._test = replayer, test
        self.derivatives: dict[str, Tensor] = {}
        """Value → derivative of the measure by it, on the device of the replay; those behind the walk are freed."""
        self.stopped: dict[str, str] = {}
        """Value whose segment passes no derivative on, or not all of it → reason."""

    def walk(self, derivatives: Mapping[str, np.ndarray]) -> Iterator[tuple[str, float]]:
        """(Value, ⟨derivative, introduced error⟩) for each captured value that reaches the outputs, the last one first.

        ``derivatives``: output → derivative of the measure by it, in its shape. Afterwards ``self.derivatives`` has
        those of the graph's inputs. NaN and Inf count as no error, and pass no derivative on.
        """
        graph, device = self._replayer.graph, self._replayer.follower.device
        for name, value in derivatives.items():
            self._add(name, torch.from_numpy(value).to(device))
        for node in reversed(graph.nodes):
            targets = [name for name in node.outputs if name in self.derivatives]
            if not targets:
                continue
            of_targets = {name: self.derivatives.pop(name) for name in targets}
            try:
                errors = self._segment(node, of_targets)
            except (InputError, RuntimeError) as error:  # a kernel that autograd cannot follow raises the latter
                self.stopped |= dict.fromkeys(targets, in_one_line(error))
                continue
            yield from errors.items()

    def _segment(self, node: Node, derivatives: dict[str, Tensor]) -> dict[str, float]:
        """⟨derivative, introduced error⟩ of a node's results; the derivatives of what it started from are added."""
        replayer = self._replayer
        nodes, starts = replayer.graph.segment([*derivatives], replayer.known)
        if any(draws(inner, replayer.graph) for inner in nodes):
            raise InputError("it draws random numbers")
        given = {name: self._test(name) for name in starts}
        leaves = {name: leaf for name in starts if (leaf := self._leaf(name, given[name])) is not None}
        exact = replayer.follower.run_nodes(nodes, given | leaves, [*derivatives], differentiable=True)
        errors: dict[str, float] = {}
        followed: list[str] = []
        unknown = [n.name for n in nodes if n.name in replayer.follower.in_reference] if leaves else []
        self.stopped |= dict.fromkeys(derivatives, f"no derivative of {unknown[0]} is known") if unknown else {}
        for name, derivative in derivatives.items():
            result = as_tensor(exact[name])
            if result.shape != derivative.shape:
                self.stopped[name] = "its shape is another one in the test"
                continue
            if name in replayer.known:
                introduced = torch.nan_to_num(self._introduced(name, nodes, given, result), 0.0, 0.0, 0.0)
                errors[name] = float(derivative.double().flatten() @ introduced.flatten())
            if result.requires_grad and bool(derivative.any()):
                followed.append(name)
        if followed and leaves:
            results = [exact[name] for name in followed]
            backward = [derivatives[name].to(exact[name].dtype) for name in followed]
            gradients = torch.autograd.grad(results, [*leaves.values()], backward, allow_unused=True)
            for name, gradient in zip(leaves, gradients, strict=True):
                if gradient is not None:
                    self._add(name, torch.nan_to_num(gradient, 0.0, 0.0, 0.0))
        return errors

    def _introduced(self, name: str, nodes: list[Node], given: Mapping[str, AnyTensor], result: Tensor) -> Tensor:
        """The introduced error of a value in float64, against what the oracle makes of the test's inputs."""
        replayer = self._replayer
        if (known := replayer.errors.pop(name, None)) is not None:
            return known.double()
        if replayer.follower is not replayer.oracle:
            result = as_tensor(replayer.oracle.run_nodes(nodes, given, [name])[name])
        held = as_tensor(replayer.oracle.arithmetic.hold(self._test(name), replayer.oracle.device))
        return held.double() - result.detach().double()

    def _leaf(self, name: str, value: AnyTensor) -> Tensor | None:
        """A captured value as autograd follows it; None for whole numbers, the levels of a quantizer apart."""
        held = self._hold(value)
        if not held.is_floating_point():
            if name not in self._replayer.levels:
                return None
            held = held.to(self._replayer.follower.arithmetic.dtype)
        return held.detach().requires_grad_()

    def _hold(self, value: AnyTensor) -> Tensor:
        follower = self._replayer.follower
        return as_tensor(follower.arithmetic.hold(value, follower.device))

    def _add(self, name: str, derivative: Tensor) -> None:
        known = self.derivatives.get(name)
        self.derivatives[name] = derivative if known is None else known + derivative
