"""Every seeded fault, by name."""

from __future__ import annotations

from cp_debug.bisect.faults.base import Fault
from cp_debug.bisect.faults.layout import LAYOUT
from cp_debug.bisect.faults.precision import PRECISION
from cp_debug.bisect.faults.ranges import RANGES
from cp_debug.bisect.faults.several import SEVERAL
from cp_debug.bisect.faults.weights import WEIGHTS

FAULTS: dict[str, Fault] = {f.name: f for f in (*WEIGHTS, *LAYOUT, *RANGES, *PRECISION, *SEVERAL)}
