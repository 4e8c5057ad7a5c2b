"""The displays of results, by their types."""

from __future__ import annotations

from collections.abc import Mapping

from cp_debug.bisect.import_dump import ImportedDump
from cp_debug.bisect.result import BisectResult
from cp_debug.bisect.result_diff import ResultDiff
from cp_debug.deploy.quantize_narrow import NarrowResult
from cp_debug.deploy.quantize_output import PtqResult
from cp_debug.deploy.verify import VerifyResult
from cp_debug.detection.evaluation import EvaluationResult
from cp_debug.display import Faces
from cp_debug.mixed_precision.result import MixedPrecisionResult
from cp_debug.prediction.result import Prediction
from cp_debug.quantization.record import QuantizerRow
from cp_debug.reports import (
    deployment,
    evaluation,
    import_dump,
    mixed_precision,
    page,
    quantization,
    result_diff,
    summary,
    tables,
)

FACES: Mapping[type, Faces] = {
    BisectResult: Faces(tables.render, summary.render_notebook, summary.summary, page.write_result),
    MixedPrecisionResult: Faces(mixed_precision.render),
    Prediction: Faces(mixed_precision.render_prediction),
    ResultDiff: Faces(result_diff.render, page=result_diff.write_page),
    ImportedDump: Faces(import_dump.render),
    VerifyResult: Faces(deployment.render_verification),
    EvaluationResult: Faces(evaluation.render),
    PtqResult: Faces(quantization.render),
    NarrowResult: Faces(quantization.render_narrow),
    QuantizerRow: Faces(quantization.quantizers),
}
