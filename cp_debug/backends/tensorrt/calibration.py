"""What TensorRT's own calibrator is given, for INT8 engines of graphs without Q/DQ nodes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cp_debug.backends.tensorrt.options import Options
from cp_debug.errors import InputError


def calibration(options: Options, component: str, scratch: Path) -> dict[str, Any] | None:
    """The runner's ``calibration`` of a component: its cache, and the arrays from which it is made where there is none.

    None when the options name neither. Raises InputError when there is nothing to calibrate with.
    """
    cache, data = options.calibration_cache, options.calibration_data
    if cache is None and data is None:
        return None
    files = sorted(map(str, (data / component).glob("*.npz"))) if data else []
    if cache is None:
        cache = scratch / "calibration.cache"
    elif not cache.suffix:
        cache.mkdir(parents=True, exist_ok=True)
        cache = cache / f"{component}.cache"
    if not cache.is_file() and not files:
        where = f"{data / component} holds no .npz file" if data else "--trt-calibrator is not given to make one"
        raise InputError(f"{cache}: there is no such calibration cache, and {where}")
    return {"cache": str(cache), "data": files, "kind": options.calibrator}
