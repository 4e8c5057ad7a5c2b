"""What the command line can say about INT8 on the fly."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from cp_debug.quantization.quantized_programs import Calibration

PANEL = "INT8, where the model is not quantized"


class Method(str, Enum):
    """How scales are chosen."""

    max = "max"
    percentile = "percentile"
    mse = "mse"
    entropy = "entropy"


Data = Annotated[
    Path | None, typer.Option("--calib-data", help="What to calibrate on, as --inputs.", rich_help_panel=PANEL)
]
Samples = Annotated[
    int, typer.Option("--calib-samples", min=1, help="At most this many samples.", rich_help_panel=PANEL)
]
Calibrator = Annotated[Method, typer.Option("--calib-method", help="How scales are chosen.", rich_help_panel=PANEL)]
SkipLayers = Annotated[
    list[str] | None,
    typer.Option("--skip-layers", help="Leave these unquantized: globs; repeatable.", rich_help_panel=PANEL),
]


@dataclass(frozen=True)
class Flags:
    """All of them."""

    calib_data: Data = None
    calib_samples: Samples = 8
    calib_method: Calibrator = Method.mse
    skip_layers: SkipLayers = None

    @property
    def chosen(self) -> Calibration:
        """What they say."""
        from cp_debug.quantization.quantized_programs import Calibration

        skipped = tuple(self.skip_layers or ())
        return Calibration(self.calib_data, self.calib_samples, self.calib_method.value, skipped)
