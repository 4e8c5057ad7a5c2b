"""A quantization as a recipe of NVIDIA ModelOpt: formats by its key names, layers left out by their paths.

The form is that of ``modelopt_recipes/general/ptq`` of NVIDIA/Model-Optimizer, read by ``modelopt.recipe.load_recipe``
since 0.4x; older versions have ``quant_cfg`` as a mapping.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from cp_debug.backends.narrow_options import NarrowOptions

FILE = "modelopt.yaml"


def modelopt_recipe(options: NarrowOptions, left_out: Iterable[str]) -> dict[str, Any] | None:
    """The recipe as plain data, to be written as YAML; None where ModelOpt has no such format.

    ``left_out``: paths of modules that stay in FP32. ModelOpt has scales of INT4 groups with ``sym`` only, blocks of
    FP8 for weights only, and rounds MX scales up, by which its figures differ from those of ``options``.
    """
    formats = _formats(options)
    if formats is None:
        return None
    weight, data, algorithm = formats
    entries: list[dict[str, Any]] = [
        {"quantizer_name": "*", "enable": False},
        {"quantizer_name": "*weight_quantizer", "cfg": weight},
    ]
    if data is not None:
        entries.append({"quantizer_name": "*input_quantizer", "cfg": data})
    for layer in left_out:
        entries.append({"quantizer_name": f"{layer}.*_quantizer", "enable": False})
    return {
        "metadata": {"recipe_type": "ptq", "description": f"{options}, as cpdebug quantized it"},
        "quantize": {"algorithm": algorithm, "quant_cfg": entries},
    }


def _formats(options: NarrowOptions) -> tuple[dict[str, Any], dict[str, Any] | None, str | None] | None:
    """Weights, data (None: as they are) and algorithm."""
    if options.family == "int4":
        if not options.symmetric:
            return None
        return {"num_bits": 4, "block_sizes": {-1: options.group, "type": "static"}}, None, "max"
    if options.family == "fp8":
        fp8: dict[str, Any] = {"num_bits": options.element}
        if options.granularity == "tensor":
            return fp8 | {"axis": None}, fp8 | {"axis": None}, "max"
        if options.granularity == "channel":
            return fp8 | {"axis": 0}, fp8 | {"type": "dynamic", "block_sizes": {-1: None}}, "max"
        return None
    blocks: dict[Any, Any] = {-1: 16 if options.family == "nvfp4" else 32, "type": "dynamic"}
    blocks["scale_bits"] = "e4m3" if options.family == "nvfp4" else "e8m0"
    element = "e2m1" if options.family in ("nvfp4", "mxfp4") else options.element
    both = {"num_bits": element, "block_sizes": blocks}
    return both, both, "max" if options.family == "nvfp4" else None
