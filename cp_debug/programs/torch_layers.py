"""Layers of a torch module that INT8 is for, and how a user names them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

from torch import nn

from cp_debug.errors import InputError

Transposed: TypeAlias = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
WeightedLayer: TypeAlias = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d | Transposed
"""Layers that sum products: INT8 is for these, and BatchNorm is folded into these."""


def layers_of(module: nn.Module) -> dict[str, WeightedLayer]:
    """Path → layer, for the layers that INT8 is for."""
    return {path: part for path, part in module.named_modules() if isinstance(part, WeightedLayer)}


def channels(layer: WeightedLayer) -> int:
    """Number of output channels of a layer."""
    return layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels


def weight_axis(layer: WeightedLayer) -> int:
    """The axis of the output channels in a layer's weight."""
    return 1 if isinstance(layer, Transposed) else 0


def full_path(prefix: str, path: str) -> str:
    """A path in a component as one in the whole model; sums in the component's own code are ``/add``."""
    return prefix + path if path.startswith("/") else ".".join(part for part in (prefix, path) if part)


def own_path(prefix: str, path: str) -> str:
    """A path in the whole model as one in a component: the opposite of ``full_path``."""
    return path.removeprefix(prefix).removeprefix(".") if prefix else path


def matches(path: str, glob: str) -> bool:
    """Whether a glob means this layer or addition, or a container around it."""
    return any(fnmatchcase(path, pattern) for pattern in (glob, f"{glob}.*", f"{glob}/*"))


def select(paths: Iterable[str], globs: Sequence[str]) -> dict[str, str]:
    """Path → the glob that means it. Raises InputError, with the nearest names, for a glob that means none."""
    paths = list(paths)
    glob_of: dict[str, str] = {}
    for glob in globs:
        hits = [path for path in paths if matches(path, glob)]
        if not hits:
            containers = {path.rsplit(".", depth)[0] for path in paths for depth in range(1, path.count(".") + 1)}
            near = get_close_matches(glob, [*paths, *sorted(containers)], n=3, cutoff=0.3)
            hint = f"; the nearest names are {', '.join(near)}" if near else ""
            raise InputError(f"no layer matches {glob!r}{hint}")
        glob_of.update(dict.fromkeys(hits, glob))
    return glob_of


def quantizers(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Every quantizer in a module by its path, on or off."""
    for path, part in module.named_modules():
        if type(part).__name__ == "TensorQuantizer":
            yield path, part


def is_quantized(module: nn.Module) -> bool:
    """Whether there is any quantizer; answers without the library."""
    return next(quantizers(module), None) is not None
