"""Which ONNX Runtime is installed: Python 3.10 has none newer than 1.23."""

from __future__ import annotations

import onnxruntime
import pytest

VERSION = tuple(map(int, onnxruntime.__version__.split(".")[:2]))


def since(version: tuple[int, int], before: str) -> pytest.MarkDecorator:
    """Skip with an older ONNX Runtime; ``before`` says what such a one does."""
    number = ".".join(map(str, version))
    return pytest.mark.skipif(version > VERSION, reason=f"ONNX Runtime before {number} {before}")
