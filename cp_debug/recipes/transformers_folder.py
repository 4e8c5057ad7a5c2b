"""Folders of Hugging Face's transformers: ``config.json`` and safetensors, loaded from disk alone.

Linear layers that GPTQ, AWQ or compressed-tensors packed into few bits are read without these packages. The
configuration says how (``quantization_config`` of ``config.json``, as transformers has it; AutoGPTQ's own
``quantize_config.json``). Every packed weight is unpacked into floats; nothing else of the folder changes.
"""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cp_debug.errors import InputError
from cp_debug.optional import require
from cp_debug.reading import check_file, read_json, readable
from cp_debug.recipes.packed_weights import BITS, PackedWeight, Packing, unpack

if TYPE_CHECKING:
    from torch import Tensor

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


OF_TRANSFORMERS = ("fp8", "mxfp4")
"""Methods whose weights transformers itself turns into floats on a CPU."""
INDEX = "model.safetensors.index.json"


def packing_of(path: Path, config: Mapping[str, Any]) -> Packing | None:
    """Packing of a folder's layers; None for a folder in floats, and for one that transformers reads by itself.

    ``config``: the content of ``config.json``. Raises InputError, with the file and the field, for another method,
    format or number of bits than those that are read here.
    """
    said, where = config.get("quantization_config"), f"{path / 'config.json'}: quantization_config"
    own = path / "quantize_config.json"
    if said is None and own.is_file():
        said, where = read_json(own, what="configuration"), str(own)
        said = {"quant_method": "gptq", **said} if isinstance(said, dict) else said
    if said is None:
        return None
    if not isinstance(said, dict):
        raise InputError(f"MODEL: {where} is {type(said).__name__}; expected an object")
    method = said.get("quant_method")
    if method in OF_TRANSFORMERS:
        return None
    if method == "compressed-tensors":
        return _compressed(said, where)
    if method not in ("gptq", "awq"):
        raise InputError(
            f"MODEL: {where}.quant_method is {method!r}, whose weights only its own package reads; expected gptq, awq "
            "or compressed-tensors"
        )
    bits = _number(said, "bits" if "bits" in said else "w_bit", where, BITS if method == "gptq" else (4,))
    group = _number(said, "group_size" if "group_size" in said else "q_group_size", where)
    if method == "awq":
        layout = str(said.get("version") or said.get("format") or "gemm").lower()
        if layout != "gemm":
            raise InputError(f"MODEL: {where}.version is {layout!r}; expected gemm, which is what is read here")
        return Packing("awq", bits, group)
    layout = str(said.get("checkpoint_format") or said.get("format") or "gptq").lower()
    if layout not in ("gptq", "gptq_v2"):
        raise InputError(f"MODEL: {where}.checkpoint_format is {layout!r}; expected gptq or gptq_v2")
    reordered, mixed = bool(said.get("desc_act", False)), bool(said.get("dynamic"))
    return Packing("gptq", bits, group, layout == "gptq", reordered, mixed)


def _compressed(said: Mapping[str, Any], where: str) -> Packing:
    if said.get("format") != "pack-quantized":
        raise InputError(f"MODEL: {where}.format is {said.get('format')!r}; expected pack-quantized")
    groups = said.get("config_groups")
    chosen = list(groups.values()) if isinstance(groups, dict) else []
    group = chosen[0] if len(chosen) == 1 and isinstance(chosen[0], dict) else {}
    weight = group.get("weights")
    if not isinstance(groups, dict) or not isinstance(weight, dict):
        raise InputError(f"MODEL: {where}.config_groups holds {len(chosen)} groups; expected one, with weights")
    if group.get("input_activations"):
        raise InputError(f"MODEL: {where}.config_groups quantizes activations; expected only weights")
    place = f"{where}.config_groups.{next(iter(groups))}.weights"
    if weight.get("type", "int") != "int":
        raise InputError(f"MODEL: {place}.type is {weight['type']!r}; expected int")
    if weight.get("strategy") not in ("group", "channel"):
        raise InputError(f"MODEL: {place}.strategy is {weight.get('strategy')!r}; expected group or channel")
    bits = _number(weight, "num_bits", place, BITS)
    size = -1 if weight["strategy"] == "channel" else _number(weight, "group_size", place)
    return Packing("compressed-tensors", bits, size, reordered=weight.get("actorder") in ("group", "dynamic"))


def _number(said: Mapping[str, Any], key: str, where: str, among: tuple[int, ...] = ()) -> int:
    value = said.get(key)
    fits = (
        isinstance(value, int)
        and not isinstance(value, bool)
        and (value in among if among else value == -1 or value > 0)
    )
    if not fits:
        expected = f"one of {', '.join(map(str, among))}" if among else "a number above 0, or -1"
        raise InputError(f"MODEL: {where}.{key} is {value!r}; expected {expected}")
    return int(value)  # type: ignore[arg-type]


def weight_files(path: Path) -> list[Path]:
    """The safetensors files that hold a folder's weights.

    Raises InputError for an index that is none, for a shard that is not there, and for several files without an index.
    """
    index = path / INDEX
    if not index.is_file():
        found = sorted(path.glob("*.safetensors"))
        whole = [file for file in found if file.name == "model.safetensors"]
        if len(found) > 1 and not whole:
            raise InputError(
                f"MODEL: {path}: {len(found)} .safetensors files and no {INDEX}, which says what is in which"
            )
        return whole or found
    mapped = read_json(index, what="index")
    names = mapped.get("weight_map") if isinstance(mapped, dict) else None
    if not isinstance(names, dict) or not names or not all(isinstance(n, str) for n in names.values()):
        raise InputError(f"MODEL: {index}: weight_map is missing or maps no tensor to a file")
    files = []
    for name in sorted(set(names.values())):
        if Path(name).name != name:
            raise InputError(f"MODEL: {index}: weight_map names {name!r}; expected a file of this folder")
        if not (path / name).is_file():
            raise InputError(f"MODEL: {index}: weight_map names {name}, which is not there")
        files.append(path / name)
    return files


def read_state(path: Path, packing: Packing) -> tuple[dict[str, Tensor], dict[str, PackedWeight]]:
    """A folder's weights by their names in the model, packed ones as float32, and those by the path of their layer.

    Raises InputError as ``weight_files`` and ``unpack``, and for files that are no safetensors.
    """
    import torch

    with _opened(weight_files(path)) as opened:
        place = {name: file for file, handle in opened.items() for name in handle.keys()}  # noqa: SIM118
        names = {name: str(file) for name, file in place.items()}

        def read(name: str) -> np.ndarray:
            tensor = opened[place[name]].get_tensor(name)
            return np.asarray((tensor.float() if tensor.is_floating_point() else tensor).numpy())

        layers = sorted(name.removesuffix(packing.marker) for name in names if name.endswith(packing.marker))
        if not layers:
            raise InputError(
                f"MODEL: {path}: config.json says {packing.method}, and no tensor is called *{packing.marker}"
            )
        packed = {layer: unpack(layer, names, read, packing) for layer in layers}
        apart = {f"{layer}{end}" for layer in layers for end in packing.ends}
        state = {name: opened[file].get_tensor(name) for name, file in place.items() if name not in apart}
    if scaled := next((name for name in state if name.endswith("act.scales")), ""):
        raise InputError(f"MODEL: {names[scaled]}: {scaled} scales an activation, which is not read here")
    for layer, weight in packed.items():
        state[f"{layer}.weight"] = torch.from_numpy(weight.weight())
    return state, packed


@contextmanager
def _opened(files: list[Path]) -> Iterator[dict[Path, Any]]:
    from safetensors import safe_open

    with ExitStack() as stack:
        handles: dict[Path, Any] = {}
        for file in files:
            check_file(file, "safetensors file")
            with readable(f"MODEL: {file}", "a readable safetensors file"):
                handles[file] = stack.enter_context(safe_open(file, framework="pt"))
        yield handles
