"""A model as the debugger sees it: components, how to feed them, how to read their outputs.

A model is a chain of components. Each is exported, built and compared by itself; glue code (voxelization, scatter) runs
between them on the torch side and is the same for every backend. A backend under test is fed its *own* upstream
outputs, as in a deployed pipeline, so an error in the first component reaches the second.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, overload, runtime_checkable

import numpy as np

from cp_debug.errors import InputError

if TYPE_CHECKING:
    import torch

    from cp_debug.recipes.packed_weights import PackedWeight

Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Stage:
    """A coarse, named cut of a component.

    ``path`` is a prefix of torch module paths (``pts_backbone.blocks.0``) or of ONNX value names. The stage's tensor
    is the last value in execution order below that prefix.
    """

    name: str
    path: str


class NamesOnDemand(Sequence[str]):
    """Names that take a forward to find, which is run when one of them is first asked for.

    They follow from a module and its inputs, and stand for those two in ``repr``. Whatever ``find`` raises passes.
    """

    def __init__(self, find: Callable[[], Sequence[str]]) -> None:
        self._find = find

    @cached_property
    def _names(self) -> Sequence[str]:
        return self._find()

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[str]: ...
    def __getitem__(self, index: int | slice) -> str | Sequence[str]:
        return self._names[index]

    def __len__(self) -> int:
        return len(self._names)

    def __repr__(self) -> str:
        return "names of what a forward returns"


@dataclass
class Component:
    """A part that is exported by itself: a torch module, an ONNX file, or both."""

    name: str
    input_names: Sequence[str]
    output_names: Sequence[str]
    module: torch.nn.Module | None = None
    """The torch module in eval mode, on the CPU, in FP32. ``prefix`` completes its module paths."""
    onnx_path: Path | None = None
    """Set for models that come as ONNX; else the debugger exports ``module``."""
    shown: str | None = None
    """The name of the user's file, where ``onnx_path`` is a working copy that nobody has seen."""
    prefix: str = ""
    """Prefix of the module paths of ``module``: ``pts_voxel_encoder`` when that submodule is the component."""
    dynamic_axes: Mapping[str, Mapping[int, str]] = field(default_factory=dict)
    """Input name → axis → symbolic name, as ``torch.onnx.export`` takes it."""
    deployed_axes: Mapping[str, Mapping[int, str]] = field(default_factory=dict)
    """``dynamic_axes`` of files that are deployed: axes that stay free there, though a debugged model has one size."""
    stages: Sequence[Stage] = ()
    packed: Mapping[str, PackedWeight] = field(default_factory=dict)
    """Path of a linear layer → its weight in few bits, as the model's folder stores it; ``module`` has it in floats."""


@dataclass
class Sample:
    """One input of the model: named raw tensors (a point cloud, or the graph's own inputs) and where they came from."""

    arrays: dict[str, np.ndarray]
    source: str
    """A file name, or ``random seed 3``, or ``synthetic scene 7``."""
    truth: Any = None
    """Ground truth, where the recipe knows it."""
    remarks: tuple[str, ...] = ()
    """Sentences about how it was read that a reader of the result must know."""


@runtime_checkable
class Model(Protocol):
    """A model with the way to feed and read it. Recipes implement this."""

    name: str
    """Name as the user wrote it: ``centerpoint:tiny``, ``net.onnx``, ``nets.py:build``."""
    components: Sequence[Component]

    def samples(self, count: int, seed: int, inputs: Path | None) -> Iterator[Sample]:
        """``count`` samples, from ``inputs`` or made from ``seed``. Raises InputError for unusable input files."""
        ...

    def feed(self, component: Component, sample: Sample, results: Mapping[str, Arrays]) -> dict[str, np.ndarray]:
        """Arrays for the inputs of ``component``, by name.

        ``results``: component name → output name → array, for the components before it.
        """
        ...

    def decode(self, sample: Sample, results: Mapping[str, Arrays]) -> Any | None:
        """The final, human-readable result (detections) of a sample; None when the model has none.

        ``results``: component name → output name → array, for all components.
        """
        ...


class Unglued:
    """Base of models without glue: a sample holds what the components read, and nothing decodes what they give."""

    def feed(self, component: Component, sample: Sample, results: Mapping[str, Arrays]) -> dict[str, np.ndarray]:
        """The sample's arrays by input name, unchanged in shape and dtype."""
        return sample.arrays

    def decode(self, sample: Sample, results: Mapping[str, Arrays]) -> None:
        """Nothing."""


def check_samples(model: Model, count: int, inputs: Path | None) -> None:
    """Read all samples that files give, so that a bad one is told before anything slow begins.

    Raises InputError as ``Model.samples`` does, for fewer than one sample, and where the files give none.
    """
    if count < 1:
        raise InputError(f"samples: {count}; expected at least 1")
    if inputs is not None and not sum(1 for _ in model.samples(count, 0, inputs)):
        raise InputError(f"--inputs: {inputs} gives no sample")
