"""Options about INT8 on the fly."""

from __future__ import annotations

from dataclasses import dataclass, fields
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cp_debug.cli.flags import MOST, check_made_up
from cp_debug.cli.given import check_given
from cp_debug.cli.typed import refuse, typed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cp_debug.backends.spec import BackendSpec
    from cp_debug.quantization.quantized_programs import Calibration
    from cp_debug.recipes.input_files import Reading


class Method(str, Enum):
    """Method of choosing scales."""

    max = "max"
    percentile = "percentile"
    mse = "mse"
    entropy = "entropy"


def own_scales(specs: Sequence[BackendSpec], model: str, checkpoint: Path | None, test_model: Path | None) -> str:
    """Phrase that names what brings scales, where every backend in INT8 among ``specs`` has such; else empty.

    ``specs``: the reference first. Raises InputError for an ONNX file that cannot be read.
    """
    if not typed(f.name for f in fields(CalibrationFlags)):
        return ""
    reference = _scaled(model, checkpoint)
    sources = [reference, *[reference if test_model is None else _scaled(str(test_model), None)] * (len(specs) - 1)]
    int8_sources = [source for spec, source in zip(specs, sources, strict=True) if spec.variant.startswith("int8")]
    return f"the scales are those of {int8_sources[0]}" if int8_sources and all(int8_sources) else ""


def _scaled(model: str, checkpoint: Path | None) -> str:
    """The file with scales that a model has: a checkpoint of ``cpdebug quantize``, or a graph with Q/DQ pairs."""
    from cp_debug.graph.graph import Graph

    if checkpoint is not None:
        from cp_debug.quantization.checkpoint import file_of, is_ptq_checkpoint

        return str(checkpoint) if is_ptq_checkpoint(file_of(checkpoint)) else ""
    path = Path(model)
    files = sorted(path.glob("*.onnx")) if path.is_dir() else [path] if path.suffix == ".onnx" else []
    return next((str(file) for file in files if Graph(file).precision == "int8"), "")


def check_calibration(
    model: str, data: Path | None, samples: int, flag: str = "--calib-samples", reading: Reading | None = None
) -> None:
    """Read what is calibrated on, before anything slow. Raises InputError for a file that cannot be used."""
    check_made_up(samples, data, flag=flag, given_by="--calib-data")
    if data is not None:
        check_given(model, inputs=data, samples=samples, flag="--calib-data", reading=reading)


Data = Annotated[Path | None, typer.Option("--calib-data", help="Data to calibrate on, as --inputs.")]
Samples = Annotated[int, typer.Option("--calib-samples", min=1, max=MOST, help="At most this many samples.")]
Calibrator = Annotated[Method, typer.Option("--calib-method", help="How scales are chosen.")]
SkipLayers = Annotated[
    list[str] | None, typer.Option("--skip-layers", help="Leave these unquantized: globs; repeatable.")
]


@dataclass(frozen=True)
class CalibrationFlags:
    """All options about calibration."""

    calib_data: Data = None
    calib_samples: Samples = 8
    calib_method: Calibrator = Method.mse
    skip_layers: SkipLayers = None

    def check(self, specs: Sequence[BackendSpec], quantized: str = "") -> None:
        """Raise InputError for a flag that was typed where no backend is calibrated here. ``quantized``: what brings
        scales of its own, in words, where something does."""
        names = ", ".join(map(str, specs))
        why = quantized or f"none of {names} runs in INT8"
        quantizes = any(spec.variant.startswith("int8") for spec in specs) and not quantized
        refuse((f.name for f in fields(self)), unless=quantizes, why=why)

    @property
    def chosen(self) -> Calibration:
        """The settings that the flags ask for."""
        from cp_debug.quantization.quantized_programs import Calibration

        skipped = tuple(self.skip_layers or ())
        return Calibration(self.calib_data, self.calib_samples, self.calib_method.value, skipped)
