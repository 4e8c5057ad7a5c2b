"""Facts about a built engine: types, times, kernels, and the effects of building it again and of looking at it.

Sessions that build engines have them; ``settings`` of a run record hold the same as JSON, from which saved results are
read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

ONLY_WHERE_SET = ("rebuilt", "probed", "stopped", "cached", "unmarked")
"""Fields that JSON has only where they say something."""
INTERRUPTED = "stopped by Ctrl-C: only the outputs are judged"
"""Why nothing inside is shown where a user waited for it no longer; nothing more is built then."""


@dataclass(frozen=True)
class BuildInfo:
    """Facts about one engine, its second build and the engine with probes, as far as they were built."""

    regime: str = ""
    """``weak`` or ``strong`` typing."""
    flags: list[str] = field(default_factory=list)
    timing_cache: Any = None
    realised: bool = True
    """Whether any layer runs in the precision asked for, as far as layers tell."""
    realised_precision: dict[str, float] = field(default_factory=dict)
    """Data type → share of the layers' inputs and outputs; empty where the engine tells none."""
    build_seconds: dict[str, float] = field(default_factory=dict)
    """Build time in seconds, by ``plain``, ``rebuilt`` and ``probed``."""
    run_seconds: float | None = None
    """Median of the plain engine, copies left out; None before it ran for its time."""
    observer_gap: float | None = None
    """Relative L2 distance of the probed engine's outputs from the plain one's; None before both ran."""
    rebuild_floor: float | None = None
    """Relative L2 distance of the rebuilt engine's outputs from the plain one's."""
    layers: list[dict[str, Any]] = field(default_factory=list)
    """``EngineLayer.to_dict`` of each, of the plain engine."""
    rebuilt: dict[str, Any] = field(default_factory=dict)
    """Differences from the plain engine: fusions, tactics."""
    probed: dict[str, Any] = field(default_factory=dict)
    stopped: str = ""
    """Reason why values inside are not shown."""
    cached: bool = False
    """Whether the engine was taken from the cache."""
    unmarked: list[str] = field(default_factory=list)
    """Values that are not shown, as that would have changed the engine."""

    def to_settings(self) -> dict[str, Any]:
        """JSON-safe, as ``settings`` of a session hold it."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        return {name: value for name, value in values.items() if value or name not in ONLY_WHERE_SET}

    @classmethod
    def of_settings(cls, settings: Mapping[str, Any]) -> BuildInfo | None:
        """The facts in a component's ``settings``; None where these are of no engine that cpdebug built."""
        if "realised_precision" not in settings:
            return None
        return cls(**{each.name: settings[each.name] for each in fields(cls) if each.name in settings})
