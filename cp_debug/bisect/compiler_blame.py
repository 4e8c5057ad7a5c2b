"""Blame of torch's compiler: which of its stages, passes, decompositions or lowerings makes a difference.

Torch's own bisector decides: it disables one subsystem after the other until the outputs of the compiled module, which
runs without probes, are those of eager, and halves the number of times that the guilty one is applied.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import replace

from cp_debug.backends.base import Backend, Program
from cp_debug.backends.registry import create
from cp_debug.backends.spec import COMPILED
from cp_debug.bisect.observe import gap
from cp_debug.bisect.optimizer_blame import REST, Culprit, OptimizerBlame
from cp_debug.programs.pipeline import Pipeline
from cp_debug.recipes.base import Arrays, Model, Sample


def blame_compiler(
    model: Model, programs: Sequence[Program], backend: Backend, sample: Sample, noise_floor: float
) -> OptimizerBlame:
    """Find the step of ``torch-compile`` that makes its outputs differ from eager's in the same precision.

    Without a difference above ``noise_floor`` (relative L2) nothing is searched. A step is responsible where no more
    than the noise floor, or ``REST`` of the whole difference, remains without it. Raises InputError when the model
    fails.
    """
    differences: list[float] = []

    def outputs(backend: Backend) -> dict[str, Arrays]:
        with Pipeline(model, programs, backend) as pipeline:
            return pipeline.run(sample)

    eager = replace(backend.spec, name=backend.spec.name.replace(COMPILED, "torch", 1), options="")
    expected = outputs(create(eager))

    def difference() -> float:
        apart = gap(expected, outputs(create(backend.spec)))
        differences.append(math.inf if math.isnan(apart) else apart)
        return differences[-1]

    whole = difference()
    if whole <= noise_floor:
        return OptimizerBlame(None, whole, whole, runs=2)
    allowed = max(noise_floor, REST * whole)
    from torch._inductor.compiler_bisector import BACKENDS, CompilerBisector, ConfigChange

    with redirect_stdout(io.StringIO()):
        found = CompilerBisector.do_bisect(lambda: difference() <= allowed)
    stage, runs = found.backend if found else None, 1 + len(differences)
    if found is None or found.subsystem is None:
        return OptimizerBlame(stage, whole, whole, active=["all that torch can disable there"], runs=runs)
    name, number = found.subsystem, found.bisect_number or 0
    setting = next((s for s in BACKENDS[found.backend] if s.name == name and isinstance(s, ConfigChange)), None)
    if setting is not None:
        told = f"{setting.config_field} = {setting.config_value}"
        culprit, fix = Culprit(told, whole, ()), f"torch._inductor.config.{told}"
    else:
        what = re.sub(r"<OpOverload\(op='(.+?)'.*", r"\1", found.debug_info or f"number {number}")
        culprit = Culprit(f"{name.rstrip('s')} of {what}", whole, ())
        fix = f"TORCH_BISECT_BACKEND={found.backend} TORCH_BISECT_SUBSYSTEM={name} TORCH_BISECT_MAX={number - 1}"
        fix += " leaves out this one and all behind it"
    return OptimizerBlame(stage, whole, min(differences), [culprit], runs=runs, fix=fix)
