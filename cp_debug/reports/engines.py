"""One line about an engine: typing regime, types that its layers really run in, and effects of looking at it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from rich.text import Text

from cp_debug.backends.base import RunRecord
from cp_debug.backends.capabilities import BuildInfo
from cp_debug.backends.spec import INDUCTOR
from cp_debug.backends.tensorrt.inspector import COMPILED, decode
from cp_debug.bisect.result import LayerRow
from cp_debug.programs.pipeline import settings_by_component
from cp_debug.reports.numbers import number

_KINDS = {"fp16acc": "sum in FP16", "fp16": "FP16 with sums in FP32", "bf16": "BF16 with sums in FP32"}
_KINDS |= {name: name.upper() for name in ("fp32", "tf32", "int8")}


def engine_lines(record: RunRecord) -> Iterator[Text]:
    """One line for each component that ran as a TensorRT engine."""
    for component, settings in settings_by_component(record.settings).items():
        if (info := BuildInfo.of_settings(settings)) is None:
            continue
        shares = ", ".join(f"{dtype} {share:.0%}" for dtype, share in info.realised_precision.items())
        nothing = "" if info.realised else f"no layer runs in {record.precision}"
        parts = [f"{info.regime}ly typed", nothing, shares, f"built in {info.build_seconds['plain']:.1f} s"]
        if info.run_seconds is not None and info.observer_gap is not None and info.rebuild_floor is not None:
            parts.append(f"runs in {1e3 * info.run_seconds:.3g} ms")
            parts.append(f"observer gap {number(info.observer_gap)}, rebuild floor {number(info.rebuild_floor)}")
        left_alone = f"{len(info.unmarked)} values not shown, because that would change it" if info.unmarked else ""
        parts += ["engine taken from the cache" if info.cached else "", info.stopped or "", left_alone]
        parts.append(sums(info.layers))
        about = "; ".join(filter(None, parts))
        yield Text(f"engine{f' of {component}' if component else ''}: {about}", style="dim")


def sums(layers: Iterable[Mapping[str, Any]]) -> str:
    """Arithmetics of an engine's products by their kernels' names, ``products: 57 sum in FP16, 4 FP32``; empty where no
    layer tells.

    ``layers``: as ``BuildInfo.layers``. Regions of several operators name no kernel and are counted apart.
    """
    found = [layer for layer in layers if isinstance(layer, Mapping)]  # a saved result may hold anything
    tactics = [decode(str(layer.get("tactic") or "")) for layer in found]
    counts = Counter(tactic.arithmetic for tactic in tactics if tactic.arithmetic)
    told = [f"{count} {_KINDS.get(name, name)}" for name, count in counts.most_common()]
    if split := sum(tactic.split > 1 for tactic in tactics):
        told.append(f"{split} of them with a split sum")
    if silent := sum(layer.get("kind") in COMPILED for layer in found):
        told.append(f"{silent} region{'s' * (silent > 1)} without kernel names")
    return f"products: {', '.join(told)}" if told else ""


def kernels(row: LayerRow) -> str:
    """What computed a row: its kernel, or for a region of several layers what they compute in: ``40 fp16acc, 4 fp32``.

    Empty where nothing tells.
    """
    found = sorted(row.region.kernels.items(), key=lambda item: -item[1]) if row.region else ()
    return ", ".join(f"{count} {name}" for name, count in found) or kernel(row.tactic)


def kernel(tactic: str) -> str:
    """A kernel's arithmetic and the depth of its tile, as far as its name tells: ``fp16acc/64``, ``fp32 winograd``.

    ``fp16acc/64÷2`` shares each tile between two partial sums, ``fp16acc/64 split 7`` gives the tiles to 7 in turn
    (split-K), ``fp16acc/v8`` loads vectors of 8 channels. Inductor's and OpenVINO's kernels have names of
    their own.
    """
    if tactic.startswith(INDUCTOR) or re.fullmatch(r"\w+:\w+", tactic):
        return tactic
    tactic_parts = decode(tactic)
    text = tactic_parts.arithmetic or ""
    if tactic_parts.arithmetic == "fp16acc" and tactic_parts.tile:
        depth = f"v{tactic_parts.vector}" if tactic_parts.vector else str(tactic_parts.tile[2])
        text += f"/{depth}" + (f"÷{tactic_parts.slices}" if tactic_parts.slices > 1 else "")
        text += f" split {tactic_parts.split}" if tactic_parts.split > 1 else ""
    return f"{text} winograd".strip() if tactic_parts.winograd else text
