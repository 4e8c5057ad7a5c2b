"""Types of the runner's answers, checked because its process may be another TensorRT, an older file, or broken."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import ConfigDict, Field, StringConstraints
from typing_extensions import NotRequired, TypedDict


class _Open(TypedDict):
    """An answer that may hold more than is read here."""

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]


class Device(_Open):
    """The GPU."""

    name: str
    compute_capability: str
    cuda_driver: int | str


Version = Annotated[str, StringConstraints(pattern=r"^[0-9]{1,4}\.[0-9]{1,4}(\.|$)")]
"""A version of TensorRT, of which the first two numbers decide what it can do: ``10.12.0.36``, ``10.0.0b6``."""
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
"""Duration of a build or a run."""


class Facts(_Open):
    """Answer to ``probe``: versions, device and abilities."""

    tensorrt: Version
    python: str
    device: Device
    builder_flags: list[str]
    layer_precision: bool
    calibrator: bool
    debug_tensors: bool
    unfused_debug_tensors: bool


class LayerTensor(_Open):
    """An input or output in the inspector's JSON."""

    Name: str
    Dimensions: NotRequired[list[int] | None]


class LayerAnswer(_Open):
    """A layer in the inspector's JSON."""

    Name: str
    LayerType: NotRequired[str]
    Metadata: NotRequired[str | None]
    Inputs: NotRequired[list[LayerTensor] | None]
    Outputs: NotRequired[list[LayerTensor] | None]
    TacticName: NotRequired[str | None]
    TacticValue: NotRequired[str | None]


class Built(_Open):
    """Answer to ``build``: time, flags, marks and layers of the engine."""

    seconds: Seconds
    flags: dict[str, bool]
    timing_cache: Any
    marked: list[str]
    missing: list[str]
    layers: list[str | LayerAnswer]


class Written(TypedDict):
    """A tensor that ``run`` wrote."""

    name: str
    file: str
    dtype: str


class Ran(_Open):
    """Answer to ``run``: the tensors written, and the seconds of each run."""

    tensors: list[Written]
    seconds: list[Seconds]


class Failure(TypedDict):
    """Error of a step that failed."""

    kind: str
    message: str
    nodes: list[str]
    traceback: NotRequired[str]
