"""Graph optimizers of ONNX Runtime that change a model, by the names that ``disabled_optimizers`` takes."""

from __future__ import annotations

import os
import re
import sys
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import IO

from cp_debug.backends.ort_options import Runtime
from cp_debug.graph.graph import Graph

RULE_BASED = "Level1_RuleBasedTransformer"
"""One transformer that applies all of ``RULES``; the log names only it."""
RULES = (
    "CastChainElimination",
    "CastElimination",
    "ClipQuantRewrite",
    "ConvAddFusion",
    "ConvBNFusion",
    "ConvMulFusion",
    "DivMulFusion",
    "EliminateDropout",
    "EliminateIdentity",
    "EliminateSlice",
    "ExpandElimination",
    "FuseReluClip",
    "GemmSumFusion",
    "GemmTransposeFusion",
    "LabelEncoderFusion",
    "MatMul_BatchNormalization_Fusion",
    "NoopElimination",
    "NotWhereFusion",
    "Pad_Fusion",
    "PreShapeNodeElimination",
    "ReluQuantRewrite",
    "UnsqueezeElimination",
)
"""ONNX Runtime 1.31's rewrite rules; names that a version does not know are ignored by it."""
_MODIFIED = re.compile(rb"GraphTransformer (\w+) modified: 1")


def active_optimizers(runtime: Runtime, graph: Graph, level: str, disabled: Collection[str] = ()) -> list[str]:
    """The optimizers that change ``graph`` when it is opened at ``level``, in the order in which they first do.

    ONNX Runtime's own log tells. Raises InputError when ONNX Runtime refuses the model.
    """
    with _stderr_of_libraries() as log:
        runtime.session(graph.path, level=level, disabled_optimizers=sorted(disabled), log=True)
        log.seek(0)
        return [name.decode() for name in dict.fromkeys(_MODIFIED.findall(log.read()))]


@contextmanager
def _stderr_of_libraries() -> Iterator[IO[bytes]]:
    """Redirect the process's file descriptor 2, which libraries write to, into a file while the block runs."""
    sys.stderr.flush()
    with tempfile.TemporaryFile() as file:
        before = os.dup(2)
        try:
            os.dup2(file.fileno(), 2)
            yield file
        finally:
            os.dup2(before, 2)
            os.close(before)
