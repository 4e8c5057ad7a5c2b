"""Result of a mixed-precision search: the set, how it is known, and every trial."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from cp_debug.display import Shown
from cp_debug.mixed_precision.emit import Named, arguments, deploy_fragment
from cp_debug.mixed_precision.fusion_groups import FusionGroup
from cp_debug.mixed_precision.trial import Trial
from cp_debug.serialize import JsonForm

SCHEMA = "cpdebug.search/2"


@dataclass(frozen=True)
class KeptLayer(JsonForm):
    """A layer of the set."""

    fusion_group: FusionGroup = field(metadata={"inline": True})
    ops: tuple[str, ...]
    introduced: float | None
    """Error that it introduces by itself in the low precision, emulated: relative L2, infinite where it overflows."""
    share: float | None
    """Part that it makes of the divergence with nothing kept but what is not finite by itself, emulated; None where
    nobody asked."""
    without: dict[str, float]
    """The figures of the set without this layer, where that was tried on the backend."""


@dataclass(frozen=True, repr=False)
class MixedPrecisionResult(JsonForm, Shown):
    """Layers to keep in higher precision: the smallest set that was tried and holds."""

    model: str
    reference: str
    backend: str
    emulated: bool
    """Whether the backend is an emulation itself."""
    precision: str
    goal: str
    layers: int
    """Number of layers that could be kept."""
    reached: bool
    kept: list[KeptLayer]
    """The best set that was verified on the backend: the smallest that reaches the goal, else the one that comes
    closest."""
    minimal: bool
    """Whether leaving out any single layer of it was tried on the backend and misses the goal."""
    best: Trial
    """Trial of the best set."""
    baseline: Trial
    """Trial of the empty set."""
    trials: list[Trial]
    """Trials of this search and, before them, of its log."""
    keep: dict[str, list[str]]
    """Component → nodes that its runtime must be told to keep: the layers', and what moves numbers between them."""
    named: Named = field(default_factory=Named)
    """The files in which the nodes have these names."""
    weak: bool = True
    """Whether TensorRT may be told precisions of layers: not of 11, if the backend is one."""
    stopped: str = ""
    """Reason why the search ended early."""
    builds: int = 0
    """Number of engines or sessions made for this search, those of its log not counted."""
    passes: float = 0.0
    """Work of the emulator, prediction included, in passes over all samples."""
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)

    @property
    def pareto(self) -> list[Trial]:
        """The trials on the backend that no other beats in both, layers kept and error; fewest layers first."""
        front: list[Trial] = []
        on_backend = [t for t in self.trials if not t.emulated and not t.error]
        for trial in sorted(on_backend, key=lambda t: (t.layers, t.measured.figures["rel_l2"])):
            if not front or trial.measured.figures["rel_l2"] < front[-1].measured.figures["rel_l2"]:
                front.append(trial)
        return front

    @property
    def arguments(self) -> dict[str, dict[str, str]]:
        """Component → tool → command line that keeps the set."""
        return arguments(self.keep, self.precision, self.named, weak=self.weak)

    @property
    def verdict(self) -> str:
        """The outcome in a sentence."""
        count = f"{len(self.kept)} of {self.layers} layers"
        if not self.reached:
            excess = f"the closest was {_figures(self.best)} with {count} kept"
            return f"{self.goal} was not reached: {excess}" + (f" ({self.stopped})" if self.stopped else "")
        if not self.kept:
            return f"{self.goal} holds with nothing kept"
        least = "none of them can be left out" if self.minimal else f"some may not be needed: {self.stopped}"
        return f"{self.goal} holds with {count} kept; {least}"

    def derived(self) -> dict[str, Any]:
        """The schema, the outcome, the best trials, and the set in the forms that other tools take."""
        return {
            "schema": SCHEMA,
            "verdict": self.verdict,
            "arguments": self.arguments,
            "deploy": deploy_fragment(self.keep, self.precision, self.named),
            "pareto": self.pareto,
        }


def _figures(trial: Trial) -> str:
    figures = trial.measured.figures
    return ", ".join(f"{k} {v:.3g}" for k, v in figures.items()) or trial.error
