"""Final outputs over all ways and samples: the interval of each that holds floats, and remarks on all others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from cp_debug.errors import InputError
from cp_debug.prediction.result import Interval, PredictedOutput
from cp_debug.probes.caveats import ALL_ZERO, is_text
from cp_debug.probes.statistics import compare
from cp_debug.programs.pipeline import Key
from cp_debug.recipes.base import Arrays


@dataclass
class FinalOutputs:
    """Knowledge of every output of every component so far."""

    predicted: dict[Key, PredictedOutput] = field(default_factory=dict)
    """Outputs of floats."""
    _differ: dict[Key, tuple[int, int]] = field(default_factory=dict)
    """Output of whole numbers or strings → elements of which any way gives another, and all, on the worst sample."""
    _silent: dict[Key, str] = field(default_factory=dict)
    """Output without a finite number → why, as long as no sample has one."""
    _strange: dict[Key, tuple[int, int]] = field(default_factory=dict)
    """Output with finite numbers → its NaN and Inf in FP32, and all elements, on the sample with most."""
    _zero: set[Key] = field(default_factory=set)

    def add(
        self,
        component: str,
        exact: Arrays,
        ways: Mapping[str, Arrays],
        interval: Callable[[dict[str, float]], Interval],
    ) -> None:
        """Take in one sample. ``exact``: its outputs in FP32; ``ways``: kernel → its outputs; arrays in any dtype.

        ``interval`` makes one of the errors by kernel.
        """
        for name, array in exact.items():
            key = Key(component, name)
            if is_text(array) or not np.issubdtype(array.dtype, np.floating):
                self._count(key, array, {way: outputs.get(name) for way, outputs in ways.items()})
                continue
            own = compare(array, array)
            if own.nothing_compared:
                if key not in self.predicted:
                    self._silent[key] = "has no element" if not own.count else "is NaN or Inf everywhere in FP32"
                continue
            self._silent.pop(key, None)
            if strange := own.nan_ref + own.inf_ref:
                self._strange[key] = max(self._strange.get(key, (0, 1)), (strange, own.count))
            is_zero = own.both_zero and (key in self._zero or key not in self.predicted)
            (self._zero.add if is_zero else self._zero.discard)(key)
            errors = {way: _error(array, outputs.get(name)) for way, outputs in ways.items()}
            output = PredictedOutput(component, name, interval(errors))
            if key in self.predicted:
                output.error = output.error.joined(self.predicted[key].error)
            self.predicted[key] = output

    def _count(self, key: Key, exact: np.ndarray, ways: Mapping[str, np.ndarray | None]) -> None:
        """Count the elements that differ of an output of whole numbers or strings."""

        def count(way: np.ndarray | None) -> int:
            return exact.size if way is None or way.shape != exact.shape else int((way != exact).sum())

        most = max(map(count, ways.values()), default=0)
        self._differ[key] = max(self._differ.get(key, (0, 0)), (most, exact.size))

    def check(self, model: str, component: str) -> None:
        """Raise InputError where nothing is known of any output of the last component."""
        known = {*self.predicted, *(key for key, (_, size) in self._differ.items() if size)}
        if not any(key.component == component for key in known):
            why = ", ".join(f"{k.value} {reason}" for k, reason in self._silent.items() if k.component == component)
            raise InputError(
                f"{model}: no error of an output can be predicted: {why or 'there is none'}; give other inputs"
            )

    def notes(self) -> Iterator[str]:
        """Remarks on outputs that have no interval, and on what an interval does not tell."""
        for key, why in self._silent.items():
            yield f"nothing is predicted of {key.value}, which {why}"
        for key, (count, size) in self._strange.items():
            yield f"{key.value} holds {count} NaN or Inf of {size} elements in FP32: its error is that of the others"
        for key, (count, size) in self._differ.items():
            if not size:
                yield f"nothing is predicted of {key.value}, which has no element"
            elif count or not key.value.endswith((".length", ".given")):
                how = "no variant changes it" if not count else f"up to {count} of {size} elements differ"
                yield f"{key.value} holds no floats, so it has no relative error: {how}"
        if self.predicted and self._zero == self.predicted.keys():
            yield ALL_ZERO


def _error(exact: np.ndarray, way: np.ndarray | None) -> float:
    """Relative L2 error of one way; infinite where it is not finite, or the way has no such output."""
    error = np.inf if way is None or is_text(way) else compare(exact, way).rel_l2
    return error if np.isfinite(error) else np.inf
