"""One line about an engine: typing regime, types that its layers really run in, and effects of looking at it."""

from __future__ import annotations

from collections.abc import Iterator

from rich.text import Text

from cp_debug.backends.base import RunRecord
from cp_debug.backends.build_info import BuildInfo
from cp_debug.backends.tensorrt.tactics import decode
from cp_debug.programs.pipeline import settings_by_component
from cp_debug.reports.numbers import number


def engine_lines(record: RunRecord) -> Iterator[Text]:
    """One line for each component that ran as a TensorRT engine."""
    for component, settings in settings_by_component(record.settings).items():
        if (info := BuildInfo.of_settings(settings)) is None:
            continue
        shares = ", ".join(f"{dtype} {share:.0%}" for dtype, share in info.realised_precision.items())
        parts = [f"{info.regime}ly typed", shares, f"built in {info.build_seconds['plain']:.1f} s"]
        if not info.realised:
            parts.insert(1, f"no layer runs in {record.precision}")
        if info.run_seconds is not None and info.observer_gap is not None and info.rebuild_floor is not None:
            parts.append(f"runs in {1e3 * info.run_seconds:.3g} ms")
            parts.append(f"observer gap {number(info.observer_gap)}, rebuild floor {number(info.rebuild_floor)}")
        if info.cached:
            parts.append("engine taken from the cache")
        if info.stopped:
            parts.append(info.stopped)
        if info.unmarked:
            parts.append(f"{len(info.unmarked)} values not looked at, which would have changed it")
        if info.search:
            first_value = f"first value that departs: {info.search['first'] or 'none'}"
            parts.append(f"{first_value}, found with {info.search['builds']} builds of one probe each")
        yield Text(f"engine{f' of {component}' if component else ''}: {'; '.join(parts)}", style="dim")


def kernel(tactic: str) -> str:
    """A kernel's arithmetic and the depth of its tile, as far as its name tells: ``fp16acc/64``, ``fp32 winograd``.

    ``fp16acc/64÷2`` shares each tile between two partial sums; ``fp16acc/v8`` loads vectors of 8 channels.
    """
    tactic_parts = decode(tactic)
    text = tactic_parts.arithmetic or ""
    if tactic_parts.arithmetic == "fp16acc" and tactic_parts.tile:
        depth = f"v{tactic_parts.vector}" if tactic_parts.vector else str(tactic_parts.tile[2])
        text += f"/{depth}" + (f"÷{tactic_parts.slices}" if tactic_parts.slices > 1 else "")
    return f"{text} winograd".strip() if tactic_parts.winograd else text
