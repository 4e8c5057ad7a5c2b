"""The displays of results: ``display`` imports this module when the first result is shown."""

from __future__ import annotations

from cp_debug.bisect.import_dump import ImportedDump
from cp_debug.bisect.result import BisectResult
from cp_debug.bisect.result_diff import ResultDiff
from cp_debug.deploy.quantize_narrow import NarrowResult
from cp_debug.deploy.quantize_output import PtqResult
from cp_debug.deploy.verify import VerifyResult
from cp_debug.detection.evaluation import EvaluationResult
from cp_debug.display import register
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

register(BisectResult, tables.render, summary.render_notebook, summary.summary, page.write_result)
register(MixedPrecisionResult, mixed_precision.render)
register(Prediction, mixed_precision.render_prediction)
register(ResultDiff, result_diff.render, page=result_diff.write_page)
register(ImportedDump, import_dump.render)
register(VerifyResult, deployment.render_verification)
register(EvaluationResult, evaluation.render)
register(PtqResult, quantization.render)
register(NarrowResult, quantization.render_narrow)
register(QuantizerRow, quantization.quantizers)
