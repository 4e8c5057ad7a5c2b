"""One walk backward over the replayed segments of a graph: what each layer's own error makes of a sum of its outputs.

For a linear measure of the outputs, ⟨A, outputs⟩, and the error eᵢ of layer i, ⟨A, J eᵢ⟩ = ⟨Jᵀ A, eᵢ⟩, with J the
derivative of all that is behind the layer. Jᵀ A is the same for all layers and grows segment by segment, last to first,
by torch's autograd on a segment's replay from the test's own inputs; so J belongs to the test's trajectory. With the
mean derivative of each segment between two trajectories in its place, what is not linear is shared out as well.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cp_debug.backends.base import Tensor as AnyTensor
from cp_debug.backends.determinism import deterministic
from cp_debug.backends.executor import Executor
from cp_debug.bisect.whole_numbers import as_tensor
from cp_debug.errors import InputError, in_one_line
from cp_debug.graph.graph import Graph, Node
from cp_debug.graph.integer_values import level_values
from cp_debug.graph.operators import PRODUCTS
from cp_debug.graph.randomness import draws
from cp_debug.probes.distance import all_finite, product
from cp_debug.recipes.base import Arrays, Component, Model, Sample
from cp_debug.safe_text import some

ERRORS = 1 << 29
"""Bytes of introduced errors that are kept for the shares, where computing them again takes a pass of the oracle."""

OTHER_SHAPE = "its shape is another one in the test"
"""Why shares end at a value, as they do at what the reference's nodes cannot compute from it then."""
_MANY = 1 << 16
"""Elements from which on three digits of each do for their sum."""


def kept_as(error: Tensor) -> torch.dtype:
    """The dtype in which an introduced error of any shape is kept for the shares."""
    return torch.bfloat16 if error.numel() >= _MANY else torch.float32


Measure = Callable[[Tensor, Tensor], float]


class Backward:
    """Walks one component's graph back, from derivatives of its outputs to those of its inputs."""

    def __init__(
        self,
        graph: Graph,
        known: Collection[str],
        test: Callable[[str], AnyTensor],
        oracle: Executor,
        follower: Executor | None = None,
        errors: dict[str, Tensor] | None = None,
        plain: Mapping[str, Node] | None = None,
        at: Sequence[Callable[[str], AnyTensor]] = (),
        measure: Measure = product,
    ) -> None:
        """``test`` loads one of the test's values, of which ``known`` are there. ``oracle`` says what is exact;
        ``follower``, else the oracle, is derived. ``errors``: introduced errors that are known already, to which others
        are added. ``plain``: nodes that read in front of Q/DQ pairs (``plain_nodes``); then every value is known.
        ``at`` load the values at which the derivative of a segment is taken, the mean of all, where these are not the
        test's. ``measure`` takes a derivative and an introduced error in its shape.
        """
        self._measure = measure
        self._graph, self._known, self._test, self._at = graph, known, test, at or (test,)
        self._of_test = not at
        self._oracle, self._follower = oracle, follower or oracle
        self._errors, self._plain, self._levels = {} if errors is None else errors, plain or {}, level_values(graph)
        self._room = 0 if errors is None else ERRORS - sum(e.untyped_storage().nbytes() for e in errors.values())
        self.derivatives: dict[str, Tensor] = {}
        """Value → derivative of the measure by it, on the device of the replay; those behind the walk are freed."""
        self.stopped: dict[str, str] = {}
        """Value whose segment passes no derivative on, or not all of it → reason."""

    def walk(self, derivatives: Arrays) -> Iterator[tuple[str, float]]:
        """(Value, ⟨derivative, introduced error⟩) for each captured value that reaches the outputs, the last one first.

        ``derivatives``: output → derivative of the measure by it, in its shape. Afterwards ``self.derivatives`` has
        those of the graph's inputs. NaN and Inf count as no error, and pass no derivative on.
        """
        for name, value in derivatives.items():
            if value.any():  # else the outputs are equal, and no layer has a share in that
                self._add(name, torch.from_numpy(value).to(self._follower.device))
        for node in reversed(self._graph.nodes):
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
        nodes, starts = self._graph.segment([*derivatives], self._known)
        if any(n.name in self._plain for n in nodes):
            nodes = [self._plain.get(n.name, n) for n in nodes]
            starts = [name for name in dict.fromkeys(i for n in nodes for i in n.inputs) if name in self._known]
        if any(draws(inner, self._graph) for inner in nodes):
            raise InputError("it draws random numbers")
        errors: dict[str, float] = {}
        alone = len(nodes) == 1 and nodes[0].op in PRODUCTS and self._follower.arithmetic.value is None
        # What multiplies one value by constants is linear: its derivative is the same at every place.
        places = [self._test] if alone and sum(name in starts for name in nodes[0].inputs) == 1 else self._at
        for load in places:
            given = {name: load(name) for name in starts}
            leaves = {name: leaf for name in starts if (leaf := self._leaf(name, given[name])) is not None}
            needed = self._of_test and not self._errors.keys() >= derivatives.keys()
            with _Uncomputed() if alone and not needed else nullcontext():
                exact = self._follower.run_nodes(nodes, given | leaves, [*derivatives], differentiable=True)
            followed: dict[str, Tensor] = {}
            unknown = [n.name for n in nodes if n.name in self._follower.in_reference] if leaves else []
            self.stopped |= dict.fromkeys(derivatives, f"no derivative of {unknown[0]} is known") if unknown else {}
            for name, derivative in derivatives.items():
                result = as_tensor(exact[name])
                if result.shape != derivative.shape:
                    self.stopped[name] = OTHER_SHAPE
                    continue
                if name in self._known and name not in errors:
                    errors[name] = self._measure(derivative, self._introduced(name, nodes, starts, result))
                if result.requires_grad:
                    followed[name] = result
            if followed and leaves:
                self._follow(followed, derivatives, leaves, len(places))
        return errors

    def _follow(
        self,
        results: Mapping[str, Tensor],
        derivatives: Mapping[str, Tensor],
        leaves: Mapping[str, Tensor],
        places: int,
    ) -> None:
        """Add what a segment passes back from the derivatives of its ``results`` to the ``leaves`` that it reads, which
        is one of so many places whose mean is taken."""
        with torch.enable_grad():
            measures = [_Along.apply(value, derivatives[name].to(value.dtype)) for name, value in results.items()]
        gradients = torch.autograd.grad(measures, [*leaves.values()], allow_unused=True)
        for name, gradient in zip(leaves, gradients, strict=True):
            if gradient is not None and not all_finite(gradient):
                gradient = torch.nan_to_num(gradient, 0.0, 0.0, 0.0)
            if gradient is not None:
                self._add(name, gradient if places == 1 else gradient / places)

    def _introduced(self, name: str, nodes: list[Node], starts: Collection[str], result: Tensor) -> Tensor:
        """The introduced error of a value, against what the oracle makes of the test's inputs, or as ``kept_as``."""
        if (known := self._errors.get(name)) is not None:
            return known
        oracle = self._oracle
        if self._follower is not oracle or not self._of_test:
            result = as_tensor(oracle.run_nodes(nodes, {start: self._test(start) for start in starts}, [name])[name])
        held = as_tensor(oracle.arithmetic.hold(self._test(name), oracle.device))
        error = held.double() - result.detach().double()
        if error.nbytes <= self._room:
            self._errors[name] = error.to(kept_as(error))
            self._room -= self._errors[name].nbytes
        return error

    def _leaf(self, name: str, value: AnyTensor) -> Tensor | None:
        """A captured value as autograd follows it; None for whole numbers, the levels of a quantizer apart."""
        held = as_tensor(self._follower.arithmetic.hold(value, self._follower.device))
        if not held.is_floating_point():
            if name not in self._levels:
                return None
            held = held.to(self._follower.arithmetic.dtype)
        return held.detach().requires_grad_()

    def _add(self, name: str, derivative: Tensor) -> None:
        known = self.derivatives.get(name)
        self.derivatives[name] = derivative if known is None else known + derivative


def spread(derivative: Tensor, introduced: Tensor) -> float:
    """√Σ (a·b)² of two tensors in one shape: what an error makes of a measure where its elements have random signs.

    Of about ``_MANY`` elements, which do for a ranking; 0 for a sum that is no number.
    """
    step = derivative.numel() // _MANY | 1  # odd: channels and rows of even lengths are all met
    a, b = (tensor.flatten()[::step].float() for tensor in (derivative, introduced))
    size = float((a * b).norm()) * step**0.5
    return size if math.isfinite(size) else 0.0


class _Along(torch.autograd.Function):
    """⟨derivative, result⟩ without its number, for the way back: given a derivative itself, torch imports sympy."""

    @staticmethod
    def forward(ctx: Any, result: Tensor, derivative: Tensor) -> Tensor:
        ctx.derivative = derivative
        return result.new_zeros(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None]:
        return ctx.derivative, None


class _Uncomputed(TorchDispatchMode):
    """Leaves products uncomputed: their derivatives, which alone are asked, do not hang on what they give.

    Autograd has recorded a product with its operands before this mode is asked for its numbers. Results have the right
    shape and dtype, and any numbers.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """False: torch imports its compiler to keep it off a mode, seconds where nothing else needs it."""
        return False

    def __torch_dispatch__(
        self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func not in _OF_PRODUCTS:
            return func(*args, **(kwargs or {}))
        if func is torch.ops.aten.convolution.default:  # without a sample it is known at once; meta tensors load sympy
            shape = len(args[0]), *func(args[0][:0], *args[1:]).shape[1:]
        else:
            shape = *args[-2].shape[:-1], args[-1].shape[-1]
        return args[0].new_empty(shape)


_OF_PRODUCTS = {
    torch.ops.aten.convolution.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.mm.default,
    torch.ops.aten.bmm.default,
}


def apart(reference: Arrays, test: Arrays) -> tuple[dict[str, np.ndarray], float]:
    """(Derivatives of ⟨D, outputs⟩ by each output in its shape, float64, ‖D‖²).

    D is the test's outputs of floats minus the reference's, each over the reference's norm; 0 for NaN and Inf.
    """
    derivatives, size = {}, 0.0
    for name, exact in reference.items():
        if exact.dtype.kind == "f" and name in test and test[name].shape == exact.shape:
            norm = np.linalg.norm(_finite(exact)) or 1.0
            with np.errstate(invalid="ignore", over="ignore"):
                off = _finite(test[name].astype(np.float64) - exact) / norm
            derivatives[name], size = off / norm, size + float(np.sum(off**2))
    return derivatives, size


def _finite(array: np.ndarray) -> np.ndarray:
    """The array in float64, with 0 for NaN and Inf."""
    return np.nan_to_num(array.astype(np.float64), posinf=0.0, neginf=0.0)


def walk_back(
    model: Model,
    sample: Sample,
    results: Mapping[str, Arrays],
    derivatives: Arrays,
    backward: Callable[[Component], Backward],
    notes: list[str],
) -> Iterator[tuple[Component, dict[str, float], dict[str, Tensor]]]:
    """(Component, value → ⟨derivative, introduced error⟩, input → derivative), the last component first.

    ``results``: component → output → array, of the test; ``derivatives``: those of the measure by final outputs, in
    the shapes of the outputs.
    ``notes`` takes sentences about where the walk ends, and why.
    """
    names = [component.name for component in model.components]
    of_outputs = {(names[-1], name): value for name, value in derivatives.items()}
    for place, component in reversed([*enumerate(model.components)]):
        walked = backward(component)
        # On a GPU the derivative of a convolution sums in another order each time, and autograd's thread has no CUDA
        # context before its first cuBLAS call; torch warns that it makes one.
        with deterministic(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Attempting to run cuBLAS")
            errors = dict(walked.walk({n: d for (c, n), d in of_outputs.items() if c == component.name}))
        for reason in dict.fromkeys(walked.stopped.values()):
            values = [value for value, why in walked.stopped.items() if why == reason]
            notes.append(f"shares of layers before {some(values, 1)} are not complete: {reason}")
            if reason == OTHER_SHAPE:  # so are those that the reference's nodes cannot compute then
                break
        at_inputs = {n: d for n, d in walked.derivatives.items() if n in component.input_names}
        yield component, errors, at_inputs
        if not place or not any(bool(d.any()) for d in at_inputs.values()):
            continue
        try:
            earlier = {name: results[name] for name in names[:place]}
            for of, derivative in _through_glue(model, component, sample, earlier, at_inputs).items():
                of_outputs[of] = of_outputs.get(of, 0.0) + derivative
        except Exception as error:
            notes.append(f"layers before {component.name} have no share: {in_one_line(error)}")
            return


def _through_glue(
    model: Model,
    component: Component,
    sample: Sample,
    results: Mapping[str, Arrays],
    derivatives: Mapping[str, Tensor],
) -> dict[tuple[str, str], np.ndarray]:
    """Derivatives of a measure by the outputs of earlier components, from those by the inputs of ``component``.

    ``results``: earlier component → output name → array, of the test; ``derivatives``: input name → tensor in
    its shape. Returns (component, output) → array in the output's shape, float64.
    Glue copies: it scatters, cuts, stacks. It is asked where each number comes from, by numbers that count their
    places, and the answer is checked on those that it was really given. Raises InputError where the glue computes.
    """
    outputs = {(c, n): array for c, arrays in results.items() for n, array in arrays.items() if array.dtype.kind == "f"}
    ends = np.cumsum([0, *(array.size for array in outputs.values())])
    parts = dict(zip(outputs, itertools.pairwise(ends), strict=True))
    counts: dict[str, list[np.ndarray]] = {}
    exact = model.feed(component, sample, results)
    # Places are counted in digits that are whole numbers in all dtypes: FP16 has them to 2¹¹, FP32 to 2²⁴.
    floats = [array.dtype for array in (*outputs.values(), *exact.values()) if array.dtype.kind == "f"]
    base = 1 << min([24, *(np.finfo(dtype).nmant + 1 for dtype in floats)])
    weights = list(itertools.takewhile(lambda weight: weight <= ends[-1], (base**n for n in itertools.count())))
    for weight in weights:
        digits = np.arange(1, ends[-1] + 1) // weight % base
        counted = {component_name: dict(arrays) for component_name, arrays in results.items()}
        for (of, name), (first, end) in parts.items():
            array = outputs[of, name]
            counted[of][name] = digits[first:end].reshape(array.shape).astype(array.dtype)
        for name, digit in model.feed(component, sample, counted).items():
            counts.setdefault(name, []).append(digit.ravel())
    flat = np.concatenate([np.zeros(1), *(array.ravel().astype(np.float64) for array in outputs.values())])
    total = np.zeros(len(flat))
    for name in filter(counts.__contains__, derivatives):
        first, *others = counts[name]
        copies = np.flatnonzero(sum(others, first))  # a canvas is mostly constant
        place = np.dot(weights, [digit[copies].astype(np.float64) for digit in counts[name]])
        whole = np.clip(np.nan_to_num(place), 0, ends[-1]).astype(np.int64)
        given = exact[name].ravel()[copies]
        if not bool(np.all((whole == place) & (flat[whole] == given) | ~np.isfinite(given))):
            raise InputError(f"the glue before {component.name} computes its input {name}")
        derivative = derivatives[name].flatten()  # of a GPU's, only what is copied comes to the host
        derivative = derivative[torch.from_numpy(copies).to(derivative.device)].double()
        total += np.bincount(whole, derivative.cpu().numpy(), len(total))
    return {of: total[first + 1 : end + 1].reshape(outputs[of].shape) for of, (first, end) in parts.items()}


def shares_over(
    model: Model,
    samples: Sequence[Sample],
    run: Callable[[int, Sample], tuple[Arrays, Mapping[str, Arrays], Callable[[Component], Backward]]],
    notes: list[str],
) -> dict[tuple[str, str], float]:
    """(Component, layer or value) → its share of what a test is off, over all samples, to first order.

    ``run`` takes a sample and its place, and gives the exact final outputs and, by component, the test's results, each
    array in the shape of its output, and the walk back over one component. Empty where no output of floats differs.
    ``notes``: as of ``walk_back``.
    """
    whole, found = 0.0, defaultdict[tuple[str, str], float](float)
    for place, sample in enumerate(samples):
        exact, results, backward = run(place, sample)
        derivatives, size = apart(exact, results[model.components[-1].name])
        whole += size
        for component, errors, _ in walk_back(model, sample, results, derivatives, backward, notes):
            for name, share in errors.items():
                found[component.name, name] += share
    return {key: share / whole for key, share in found.items()} if whole else {}
