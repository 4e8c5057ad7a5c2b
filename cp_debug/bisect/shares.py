"""Shares of all layers in the final divergence, by one walk backward over the replayed segments.

D is the test's final outputs minus the reference's, each output scaled by its reference norm. The share of layer i,
which introduced eᵢ, is ⟨D, J eᵢ⟩ ÷ ‖D‖² = ⟨Jᵀ D, eᵢ⟩ ÷ ‖D‖², and Jᵀ D is the same for all (``backward``). Behind it
stands an exact sum: with Gᵢ the oracle from layer i to the end, test − exact = Σ Gᵢ(testᵢ) − Gᵢ(oracleᵢ of the test's
inputs). The reference has such a sum of its own; D is the difference of the two, and what the reference's rounding
makes of it is told by itself. All of it adds up to 1 where J is made of the mean derivative of each segment on the
straight way from the reference's values of its inputs to the test's: the difference of its results is exactly that mean
times the difference of its inputs. The derivative midway is that mean to second order; where it leaves much, the mean
is taken over more places.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial

import numpy as np
import torch

from cp_debug.backends.base import Tensor
from cp_debug.bisect.backward import Backward, Measure, spread, walk_back
from cp_debug.bisect.candidate_run import CandidateRun, loader
from cp_debug.bisect.replayed import EXCESS
from cp_debug.bisect.result import Attribution, LayerRow
from cp_debug.errors import InputError, in_one_line
from cp_debug.probes.arrays import as_numpy, as_torch
from cp_debug.probes.distance import all_finite, distance, product
from cp_debug.probes.held import CapturedRun
from cp_debug.probes.statistics_reduce import are_wide, differences, dot
from cp_debug.programs.pipeline import Key
from cp_debug.programs.walk import tensors_as_arrays, walk
from cp_debug.recipes.base import Arrays, Component, Sample

NOT_LINEAR = 0.1
"""What the shares may leave of the final divergence for the network to count as linear over it."""
BEYOND = 10.0
"""Share, or sum of all, that no derivative can mean: a mask of −3e38 differs by 1e36 in BF16 and hides all the same."""
MIDWAY = (0.5,)
"""Place between both sides at which a derivative is taken for its mean: exact for functions of second degree."""
POINTS = 0.5 - 0.75**0.5 / 3, 0.5 + 0.75**0.5 / 3
"""Two such places, where one does not do: Gauss's, exact for functions of fourth degree."""
CARRIED = 4
"""Layers whose error is carried forward at most, the largest shares first: each takes two runs of what is behind."""


def set_shares(shares: Shares, rows: Mapping[Key, LayerRow]) -> Attribution | None:
    """Give every replayed row of the test its share of the final divergence.

    None where the final outputs have no finite difference, or end in NaN or Inf in the test alone. Where the reference
    is at fault, no row has a share. Where NaN or Inf is born that ends in numbers (1 ÷ Inf is 0), or whole numbers are
    wrong, no derivative says what it does: it is carried to the end, of the first such layers.
    """
    if not shares.differs or shares.ends_in_infinity:
        return None
    own = {k: r.replay for k, r in rows.items() if r.side == "test" and r.replay and r.replay.introduced is not None}
    born = [k for k, replay in own.items() if replay.new_nonfinite or (replay.introduced and shares.stops(k))]
    names = {key: row.name for key, row in rows.items()}
    guilty = sorted((k for k, r in own.items() if (r.excess or 0.0) > EXCESS), key=lambda k: -(own[k].excess or 0.0))
    told = shares.attribution(names, born[:CARRIED], guilty, asks=not all(r.within for r in rows.values()))
    for key in own.keys() - set(born[CARRIED:]):
        rows[key].share = shares.of_layers.get(key, 0.0)
    return told


class Shares:
    """Shares of one test's layers in its final divergence on one sample."""

    def __init__(
        self,
        run: CandidateRun,
        sample: Sample,
        reference: CapturedRun,
        test: CapturedRun,
        results: Mapping[str, Arrays],
        feed: Callable[[Key], Tensor],
    ) -> None:
        """``results``: component → output name → array, of the test; ``feed``: what glue makes of them for an input."""
        self._run, self._sample, self._reference, self._test = run, sample, reference, test
        self._results, self._feed = results, feed
        self._model = run.pipeline.model
        self._components = [c.name for c in self._model.components]
        self._norms: dict[str, float] = {}
        self.notes: list[str] = []
        """Sentences about what has no share and why."""

    @cached_property
    def of_layers(self) -> dict[Key, float]:
        """Share of every replayed value, with a row or without; by derivatives where ``attribution`` carries none."""
        return self._walked(MIDWAY)

    @cached_property
    def spreads(self) -> dict[Key, float]:
        """Value → what its error makes of the divergence with random signs."""
        return self._walked(MIDWAY, spread)

    def _walked(self, points: Sequence[float], measure: Measure = product) -> dict[Key, float]:
        found: dict[Key, float] = {}
        last = self._components[-1]
        derivatives = {
            name: (difference / (self._norm(name) * self._size)).reshape(_array(self._reference, name, last).shape)
            for name, difference in self._divergence.items()
        }
        backward = partial(self._backward, points, measure)
        walked = walk_back(self._model, self._sample, self._results, derivatives, backward, self.notes)
        for component, errors, at_inputs in walked:
            found |= {Key(component.name, value): share for value, share in errors.items()}
            if self._run.reference.model is not self._model:  # whose own glue may have made another input
                for name, derivative in at_inputs.items():
                    key = Key(component.name, name)
                    introduced = _difference(_array(self._test, name, component.name), as_numpy(self._feed(key)))
                    if introduced.shape == derivative.shape:
                        found[key] = float(as_numpy(derivative).ravel() @ introduced.ravel())
        return found

    def _backward(self, points: Sequence[float], measure: Measure, component: Component) -> Backward:
        """A walk with the derivatives at ``points`` on the way from the reference's values, 0, to the test's, 1."""
        of = self._run.replayer(component.name, self._test)
        test, reference = (loader(c, component.name) for c in (self._test, self._reference))

        def at(part: float, name: str) -> Tensor:
            theirs, ours = (v if torch.is_tensor(v) else as_torch(v) for v in (test(name), reference(name)))
            ours = ours.to(theirs.device)
            if ours.shape != theirs.shape or not (ours.is_floating_point() and theirs.is_floating_point()):
                return theirs
            dtype = torch.promote_types(torch.promote_types(ours.dtype, theirs.dtype), torch.float32)
            between = torch.lerp(ours.to(dtype), theirs.to(dtype), part)
            return between if all_finite(between) else torch.where(torch.isfinite(between), between, theirs.to(dtype))

        places = [partial(at, part) for part in points]
        return Backward(of.graph, of.known, test, of.oracle, of.follower, of.errors, at=places, measure=measure)

    def stops(self, key: Key) -> bool:
        """Whether a layer's result is whole numbers, and no derivative passes what reads them."""
        stopped = not self.of_layers.get(key, 0.0)  # asked first: tensors of a GPU are copied
        return stopped and _array(self._test, key.value, key.component).dtype.kind in "iub"

    def attribution(
        self, names: Mapping[Key, str], born: Sequence[Key] = (), guilty: Sequence[Key] = (), *, asks: bool = True
    ) -> Attribution:
        """The sum of all shares, and what of the divergence they leave. ``names``: value → its layer's name.

        Where they leave more than ``NOT_LINEAR``, the reference's own share is computed. Where that does not fill it,
        the derivatives are the mean over ``POINTS`` between both sides. The layers ``born`` are carried forward, and
        then the ``guilty`` ones (behind −1e9, a softmax has no derivative) and those with the largest shares, until it
        fits. Nothing of it is done where nobody ``asks``, as all is within the tolerance.
        """
        told = Attribution(sum(self.of_layers.values()))
        if asks and abs(told.remainder) > NOT_LINEAR:
            told.reference = self._of_reference()
        if asks and abs(told.remainder) > NOT_LINEAR:
            self.of_layers |= self._walked(POINTS)
        carried = [*born]
        for key in born:
            self._carry(key, names)
        told.layers = sum(self.of_layers.values())
        for _ in range(CARRIED):
            fits = (not asks or abs(told.remainder) <= NOT_LINEAR) and abs(told.layers) < BEYOND
            ranked = sorted(self.of_layers, key=lambda key: -abs(self.of_layers[key]))
            first = next((key for key in (ranked if fits else [*guilty, *ranked]) if key not in carried), None)
            if first is None or (fits and abs(self.of_layers[first]) < BEYOND):
                break
            self._carry(first, names)
            carried.append(first)
            told.layers = sum(self.of_layers.values())
        told.carried = [names.get(key, key.value) for key in carried]
        for name in self._components:
            self._run.replayer(name, self._test).errors.clear()
        return told

    def _carry(self, key: Key, names: Mapping[Key, str]) -> None:
        try:
            self.of_layers[key] = self.share(key)
        except InputError as error:
            name = names.get(key, key.value)
            self.notes.append(f"{name}: its share is a first-order estimate: {in_one_line(error)}")

    def share(self, key: Key) -> float:
        """⟨D, Δ⟩ ÷ ‖D‖² with Δ the change that the layer's introduced error makes of the outputs, carried to the end.

        Raises InputError where its segment, or what is behind it, cannot be replayed.
        """
        return self._along(self.change(key))

    def _along(self, change: Arrays) -> float:
        parts = (float(dot(d, change[n].ravel())) / self._norm(n) for n, d in self._divergence.items())
        return sum(parts) / self._size

    def _of_reference(self) -> float | None:
        """Share of what the reference's own rounding makes; None where the oracle cannot compute the whole network."""

        last = self._components[-1]
        try:
            outputs = walk(self._model, self._sample, self._exact)[last]
        except InputError:
            return None
        return self._along({n: _difference(outputs[n], _array(self._reference, n, last)) for n in self._divergence})

    @property
    def differs(self) -> bool:
        """Whether the final outputs have a difference whose square is a finite number."""
        return 0 < self._size < np.inf

    @cached_property
    def _size(self) -> float:
        """‖D‖²."""
        with np.errstate(over="ignore"):
            return sum(float(dot(d, d)) for d in self._divergence.values())

    @cached_property
    def ends_in_infinity(self) -> bool:
        """Whether the test's final outputs hold NaN or Inf where the reference's are finite."""
        component = self._components[-1]
        for name in self._divergence:
            ours, theirs = (_array(c, name, component) for c in (self._reference, self._test))
            floats = ours.dtype.kind == theirs.dtype.kind == "f"
            if floats and bool((np.isfinite(ours) & ~np.isfinite(theirs)).any()):
                return True
        return False

    @cached_property
    def _divergence(self) -> dict[str, np.ndarray]:
        """D by final output, [elements] float64, over the reference's norm; those that both have in one shape."""
        component, found = self._components[-1], {}
        shown = set(self._test.names(component=component))
        for name in self._outputs(component):
            if name not in shown:
                continue
            ours, theirs = (_array(c, name, component) for c in (self._reference, self._test))
            if ours.shape == theirs.shape:
                found[name] = _difference(theirs, ours).ravel() / self._norm(name)
        return found

    def _norm(self, name: str) -> float:
        """Norm of a final output of the reference, which is read once: every share is divided by it."""
        if name not in self._norms:
            value = _array(self._reference, name, self._components[-1])
            self._norms[name] = distance(value, value).whole or 1.0
        return self._norms[name]

    def change(self, key: Key) -> dict[str, np.ndarray]:
        """Change of the final outputs by the introduced error of the layer ``key``.

        Everything in front is the test's, everything behind is computed by the oracle: once from what the layer gave,
        once from what the oracle gives in its place. Output name → array in float64.
        Raises InputError where its segment, or what is behind it, cannot be replayed.
        """
        with_error, without = (self.behind(key, value) for value in (self.captured(key), self.exact(key)))
        return {name: _difference(value, without[name]) for name, value in with_error.items()}

    def alone(self, key: Key, results: Mapping[str, Arrays]) -> float:
        """Relative L2 change of the final outputs by the introduced error of the layer ``key``, were it the only one.

        It is added to the reference's value, everything behind is computed by the oracle. ``results``: the reference's
        outputs, by component, each in its dtype; the final ones are scaled by their norms, and their squares add up.
        Raises InputError where its segment, or what is behind it, cannot be replayed.
        """
        captured, exact = self.captured(key), self.exact(key)
        reference = _array(self._reference, key.value, key.component)
        if reference.shape != exact.shape or not captured.dtype.kind == exact.dtype.kind == reference.dtype.kind == "f":
            raise InputError(f"{key.value} has other shapes or types on the two sides")
        with np.errstate(invalid="ignore", over="ignore"):  # −3.4e38 less −3.4e38, of masks
            moved = np.where(exact == reference, captured, reference + (captured.astype(np.float64) - exact))
        ends = self.behind(key, moved, self._reference, results)
        changes = (
            _difference(ends[n], results[self._components[-1]][n]).ravel() / self._norm(n) for n in self._divergence
        )
        return float(sum(dot(change, change) for change in changes)) ** 0.5

    def captured(self, key: Key) -> np.ndarray:
        """What the test gave for a layer, in its dtype."""
        return _array(self._test, key.value, key.component)

    def exact(self, key: Key) -> np.ndarray:
        """What the oracle gives for a layer, from the test's own inputs, in the oracle's dtype.

        Raises InputError where its segment cannot be replayed.
        """
        test, replayer = loader(self._test, key.component), self._run.replayer(key.component, self._test)
        if key.value not in replayer.graph.producer:
            return as_numpy(self._feed(key))
        return as_numpy(replayer.exact(key.value, test))

    def behind(
        self,
        key: Key,
        value: np.ndarray,
        side: CapturedRun | None = None,
        ends: Mapping[str, Arrays] | None = None,
    ) -> Arrays:
        """The final outputs by the oracle, from the test's values in front of ``key`` and ``value`` in its place.

        ``side``, ``ends``: another side's values, and its outputs by component, to start from.
        Output name → array of its shape, in the oracle's dtype where that computed it. Raises InputError where what is
        behind cannot be replayed.
        """
        place = self._components.index(key.component)
        results: dict[str, Arrays] = {c: (ends or self._results)[c] for c in self._components[:place]}
        graph, load = self._run.programs[key.component].graph, loader(side or self._test, key.component)
        replayer = self._run.replayer(key.component, self._test)
        maker = graph.producer.get(key.value)
        last = -1 if maker is None else maker.index
        inputs = {v.name for v in graph.inputs}
        in_front = {n for n in replayer.known if n in inputs or graph.producer[n].index <= last} | {key.value}
        outputs = self._outputs(key.component)
        behind = [n for n in outputs if n not in in_front]
        own = {n: value if n == key.value else as_numpy(load(n)) for n in outputs if n in in_front}
        if behind:
            nodes, starts = graph.segment(behind, in_front)
            given = {s: value if s == key.value else load(s) for s in starts}
            own |= tensors_as_arrays(replayer.oracle.run_nodes(nodes, given, behind))
        results[key.component] = own
        return walk(self._model, self._sample, self._exact, results)[self._components[-1]]

    def _exact(self, component: Component, inputs: Arrays) -> Arrays:
        return tensors_as_arrays(self._run.replayer(component.name, self._test).oracle.run(inputs))

    def _outputs(self, component: str) -> list[str]:
        return [v.name for v in self._run.programs[component].graph.outputs]


def _difference(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a − b in float64, exact for wide integers; 0 where either is NaN or Inf."""
    with np.errstate(invalid="ignore", over="ignore"):
        apart = differences(a, b) if are_wide(a, b) else a.astype(np.float64) - b.astype(np.float64)
    return np.nan_to_num(apart, nan=0.0, posinf=0.0, neginf=0.0)


def _array(capture: CapturedRun, name: str, component: str) -> np.ndarray:
    return as_numpy(capture.load(name, component=component))
