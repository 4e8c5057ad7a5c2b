"""Quantized models as files: plain tensors and lists, so that nothing is run when one is loaded."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from typing_extensions import TypedDict

from cp_debug.errors import InputError
from cp_debug.files import complete_path
from cp_debug.graph.scales import LayerScales
from cp_debug.probes.module_state import copied
from cp_debug.programs.batchnorm_folding import Folding, apply_folding
from cp_debug.programs.torch_layers import channels, is_quantized, layers_of, quantizers
from cp_debug.quantization.ptq import install
from cp_debug.quantization.record import Quantization, also_named, quantization_of
from cp_debug.reading import check_file, typed
from cp_debug.recipes.checkpoint import check_tensors, load_state, read_torch

FORMAT = "cpdebug quantized model 1"
FILE = "model.pt"
"""Name of the checkpoint in the folder that ``cpdebug quantize ptq`` writes."""


@also_named(model="module")
def save_ptq_model(module: nn.Module | Mapping[str, nn.Module], path: Path) -> None:
    """Write what ``quantize_ptq`` returned, or several such components by name: weights, scales, folding and skips.

    Raises InputError for a module that is not quantized, and when the file cannot be written.
    """
    modules = module if isinstance(module, Mapping) else {"": module}
    components = {name: entry_of(part) for name, part in modules.items()}
    with complete_path(path) as partial:
        torch.save({"format": FORMAT, "components": components}, partial)


@also_named(model="module", checkpoint_path="path")
def load_ptq_model(module: nn.Module, path: Path, component: str = "") -> nn.Module:
    """The quantized model of a file, bit for bit as it was saved, on the device of ``module``.

    ``module`` is the FP32 model that was quantized, BatchNorm not folded; its weights are not used. ``component``
    chooses from a file of several. Raises InputError for a file that is no such checkpoint, for a module that is built
    otherwise or quantized already, and a component that the file lacks.
    """
    components = read_ptq_checkpoint(path)
    if component not in components:
        raise InputError(f"{path}: holds the components {', '.join(map(repr, components))}; expected {component!r}")
    return rebuild(module, components[component], str(path))


def rebuild(module: nn.Module, entry: Mapping[str, Any], source: str) -> nn.Module:
    """The quantized model that ``entry_of`` described, from the FP32 one.

    ``source`` names the file in messages. Raises InputError as ``load_ptq_model`` does.
    """
    if is_quantized(module):
        raise InputError(f"{source}: {type(module).__name__} is quantized already; expected the FP32 model")
    plain = copied(module)
    try:
        written = dict(entry["about"])
        written["residual_adds"] = written.pop("adds", ())
        about = Quantization(**(written | {"folding": Folding(**written["folding"])}))
        apply_folding(plain, about.folding)
        layers = layers_of(plain)
        unit = {path: LayerScales(1.0, np.ones(channels(layers[path]), np.float32)) for path in about.layers}
        rebuilt = install(plain, about.model, about.method, unit, dict.fromkeys(about.residual_adds, 1.0))
    except (InputError, LookupError, TypeError, ValueError, AttributeError) as error:
        raise InputError(
            f"{source}: this is the checkpoint of another model than {type(module).__name__} ({error})"
        ) from None
    load_state(rebuilt, entry["state_dict"], source)
    rebuilt.quantization = about  # type: ignore[assignment]
    switched_off = set(entry["switched_off"])
    for name, quantizer in quantizers(rebuilt):
        if name in switched_off:
            quantizer.disable()
    return rebuilt


def read_ptq_checkpoint(path: Path) -> dict[str, Any]:
    """Component → entry of a checkpoint file, as ``entry_of`` made it.

    Raises InputError for a file that is no checkpoint of cpdebug.
    """
    check_file(path, "checkpoint")
    document = read_torch(path)
    if (
        not isinstance(document, dict)
        or document.get("format") != FORMAT
        or not isinstance(document.get("components"), dict)
    ):
        raise InputError(f"{path}: not a checkpoint of a quantized model; expected what save_ptq_model wrote")
    components: dict[str, ComponentEntry] = typed(
        dict[str, ComponentEntry], document["components"], f"{path}: not a checkpoint that cpdebug wrote"
    )
    for entry in components.values():
        check_tensors(entry["state_dict"], str(path))
    return dict(components)


class ComponentEntry(TypedDict):
    """One component in a checkpoint."""

    about: dict[str, Any]
    switched_off: list[str]
    state_dict: dict[str, Any]


def file_of(checkpoint: Path) -> Path:
    """The file that a folder of `cpdebug quantize` means; any other path itself."""
    return checkpoint / FILE if checkpoint.is_dir() else checkpoint


def is_ptq_checkpoint(path: Path) -> bool:
    """Whether a file is the checkpoint of a quantized model; False for one that cannot be read."""
    try:
        return bool(read_ptq_checkpoint(path))
    except InputError:
        return False


def entry_of(module: nn.Module) -> dict[str, Any]:
    """Weights, scales, folding and skips of a quantized module as plain tensors and containers."""
    about = dataclasses.asdict(quantization_of(module))
    about["adds"] = about.pop("residual_adds")
    return {
        "about": about,
        "switched_off": [
            name for name, quantizer in quantizers(module) if quantizer.amax is not None and not quantizer.is_enabled
        ],
        "state_dict": module.state_dict(),
    }
