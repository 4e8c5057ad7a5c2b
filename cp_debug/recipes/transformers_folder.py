"""Folders of Hugging Face's transformers: ``config.json`` and safetensors, loaded from disk alone."""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cp_debug.errors import InputError
from cp_debug.optional import require
from cp_debug.reading import read_json
from cp_debug.recipes.quantized_folder import packing_of, read_state, weight_files

if TYPE_CHECKING:
    from cp_debug.recipes.packed_weights import PackedWeight, Packing
    from cp_debug.recipes.torch_callable import TorchModel

TOKENS = 16
"""Length of made-up text."""
IMAGE = 224
"""Size of made-up images where the configuration names none."""
_REPEATED = re.compile(r"(layers?|depths?|blocks|experts)$")
"""Names of numbers of parts that have weights each."""
_FEW = 1000
"""Parts that are built without asking: several may share their weights."""
_SOURCES = ("", "text_config", "vision_config")
"""Parts of a configuration that may hold sizes."""


def check_folder(path: Path) -> None:
    """Raise InputError for a folder without a readable configuration or without safetensors; nothing is imported."""
    config = read_json(path / "config.json", what="configuration")
    if not isinstance(config, dict) or "model_type" not in config:
        raise InputError(f"MODEL: {path / 'config.json'} has no model_type; expected a folder of transformers")
    classes = config.get("architectures")
    named = classes is None or (isinstance(classes, list) and all(isinstance(name, str) for name in classes))
    for key, right, expected in (
        ("model_type", isinstance(config["model_type"], str), "a name"),
        ("architectures", named, "a list of names"),
    ):
        if not right:
            raise InputError(f"MODEL: {path / 'config.json'}: {key} is {str(config[key])[:80]!r}; expected {expected}")
    if not any(path.glob("*.safetensors")):
        pickled = [file.name for file in sorted(path.glob("*.bin"))]
        why = f"{pickled[0]} is pickled, and unpickling runs code" if pickled else "there are no weights"
        raise InputError(f"MODEL: {path}: {why}; expected .safetensors beside config.json")
    if packing_of(path, config) is not None:
        weight_files(path)


def load_folder(path: Path) -> TorchModel:
    """The model of a folder, in FP32 with plain attention, and example inputs that fit its configuration.

    Weights that GPTQ, AWQ or compressed-tensors packed are unpacked; the component keeps their levels, too.
    Nothing is downloaded, and code in the folder is never run. Raises InputError where that would be needed, or where
    transformers cannot load it; MissingPackage without transformers.
    """
    from cp_debug.recipes.torch_callable import TorchModel, library_call

    check_folder(path)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    transformers = require("transformers", "transformers")
    config = read_json(path / "config.json", what="configuration")
    local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    if own := config.get("auto_map"):
        classes = config.get("architectures") or []
        known = config["model_type"] in transformers.CONFIG_MAPPING
        # The library's own class of that name is taken; for a class that it lacks any other is another network.
        if not known or not all(hasattr(transformers, name) for name in classes[:1]):
            names = own.values() if isinstance(own, Mapping) else [own]
            raise InputError(
                f"MODEL: {path}: config.json names custom code ({', '.join(map(str, names))}), "
                "which is never run; load it in file.py:callable"
            )
    packing = packing_of(path, config)
    with library_call("transformers", path):
        transformers.logging.set_verbosity_error()
        _check_counts(path, config)
        settings = transformers.AutoConfig.from_pretrained(path, **local)
        settings.use_cache = False  # a cache is no output to compare
        name = next(iter(settings.architectures or []), "")
        kind = getattr(transformers, name, transformers.AutoModel)
        if kind is not transformers.AutoModel:
            local.pop("trust_remote_code")
        how = {"config": settings, "dtype": "float32", "attn_implementation": "eager", **local}
        packed: dict[str, PackedWeight] = {}
        if packing is None:
            module = kind.from_pretrained(path, use_safetensors=True, **how)
        else:
            module, packed = _unpacked(path, packing, kind, how)
    inputs = _inputs(path, module, settings)
    model = TorchModel(str(path), module, inputs, source=f"generated to fit config.json: {', '.join(inputs)}")
    model.components[0].packed = packed
    return model


def _check_counts(path: Path, config: Mapping[str, Any]) -> None:
    """Raise InputError where a configuration asks for more layers than there can be weights for: building them could
    take hours before the first one is missed."""
    from safetensors import safe_open

    most = _FEW
    for file in weight_files(path):
        with safe_open(file, "np") as opened:
            most += len(opened.keys())
    for part in _SOURCES:
        named = config.get(part) if part else config
        for name, value in named.items() if isinstance(named, Mapping) else ():
            counts = [n for n in (value if isinstance(value, list) else [value]) if isinstance(n, int)]
            if _REPEATED.search(str(name)) and sum(counts) > most:
                raise InputError(
                    f"MODEL: {path / 'config.json'}: {name} is {str(value)[:80]}; "
                    f"number of tensors beside it: {most - _FEW}"
                )


def _unpacked(path: Path, packing: Packing, kind: Any, how: dict[str, Any]) -> tuple[Any, dict[str, PackedWeight]]:
    """A packed folder's model in floats, and its packed weights by the path of their layer.

    Raises InputError as ``read_state``, for weights that the model has and the folder lacks, and for layers that it
    lacks.
    """
    state, packed = read_state(path, packing)
    settings = how["config"]
    if hasattr(settings, "quantization_config"):
        del settings.quantization_config  # it would ask for the quantizer's own package
    loading = {"output_loading_info": True, "ignore_mismatched_sizes": True}  # reported, and refused below
    module, report = kind.from_pretrained(None, state_dict=state, **loading, **how)
    for name, shape, own in sorted(report["mismatched_keys"], key=str):
        text = f"holds {name} with the shape {list(shape)}; config.json makes it {list(own)}"
        raise InputError(f"MODEL: {path}: {text}")
    if missing := sorted(report["missing_keys"]):
        raise InputError(f"MODEL: {path}: holds no {missing[0]}, which {type(module).__name__} has")
    if unknown := sorted({f"{layer}.weight" for layer in packed} & {*report["unexpected_keys"]}):
        raise InputError(f"MODEL: {path}: holds {unknown[0]}, packed, which {type(module).__name__} lacks")
    return module, packed


def _inputs(path: Path, module: Any, config: Any) -> dict[str, np.ndarray]:
    """Example inputs by parameter of ``forward``: token ids, masks, pixels."""
    parameters = inspect.signature(module.forward).parameters
    rng = np.random.default_rng(0)
    inputs: dict[str, np.ndarray] = {}
    if "input_ids" in parameters:
        words = _size(config, "vocab_size", 2)
        length = min(TOKENS, _size(config, "max_position_embeddings", TOKENS))
        inputs["input_ids"] = rng.integers(0, words, (1, length))
        if "attention_mask" in parameters:
            inputs["attention_mask"] = np.ones((1, length), np.int64)
        if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in parameters:
            inputs["decoder_input_ids"] = rng.integers(0, words, (1, length))
    if "pixel_values" in parameters:
        size, channels = _size(config, "image_size", IMAGE), _size(config, "num_channels", 3)
        inputs["pixel_values"] = rng.normal(size=(1, channels, size, size)).astype(np.float32)
    if not inputs:
        raise InputError(f"MODEL: {path}: takes {', '.join(parameters)}; expected text or images, or file.py:callable")
    return inputs


def _size(config: Any, name: str, default: int) -> int:
    """A size of the configuration or of a part of it."""
    for part in _SOURCES:
        value = getattr(getattr(config, part, None) if part else config, name, None)
        if isinstance(value, int):
            return value
        if isinstance(value, list | tuple) and value and isinstance(value[0], int):
            return int(value[0])
    return default
