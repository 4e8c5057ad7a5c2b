"""Every seeded fault, those of ``cpdebug demo`` and the others, by name."""

from __future__ import annotations

from faults.layout import LAYOUT
from faults.precision import PRECISION
from faults.ranges import RANGES
from faults.several import SEVERAL
from faults.weights import WEIGHTS

from cp_debug.bisect.demos import DEMOS, Fault

FAULTS: dict[str, Fault] = DEMOS | {f.name: f for f in (*WEIGHTS, *LAYOUT, *RANGES, *PRECISION, *SEVERAL)}
