"""INT8 files on this processor: how far ONNX Runtime's result is from FP32, and what ``bisect`` says of it.

    python benchmarks/processors/run.py vnni python benchmarks/processors/int8.py

Prints JSON. A small network (convolutions, a residual addition, a linear layer: ``tests/test_file_quantization.py``)
and a bidirectional LSTM with two linear layers, quantized by ONNX Runtime in the usual ways.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from onnxruntime.quantization import QuantFormat, QuantType, quantize_dynamic, quantize_static

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))
from test_file_quantization import Reader, parent

from cp_debug.bisect.engine import bisect

SIGNED, UNSIGNED = QuantType.QInt8, QuantType.QUInt8


class Tagger(torch.nn.Module):
    """A bidirectional LSTM and two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = torch.nn.LSTM(24, 32, bidirectional=True)
        self.hidden, self.last = torch.nn.Linear(64, 40), torch.nn.Linear(40, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Scores [T, B, 10] of x [T, B, 24]."""
        return self.last(torch.relu(self.hidden(self.lstm(x)[0])))


def files(folder: Path) -> Iterator[tuple[str, Path, Path]]:
    """(name, float file, quantized file)."""
    net = parent(folder / "net.onnx")
    for reduced in (False, True):
        for name, form, data in (
            ("Q/DQ, signed data", QuantFormat.QDQ, SIGNED),
            ("Q/DQ, unsigned data", QuantFormat.QDQ, UNSIGNED),
        ):
            file = folder / f"{len(name)}{reduced}.onnx"
            options = {"quant_format": form, "activation_type": data, "weight_type": SIGNED, "reduce_range": reduced}
            quantize_static(str(net), str(file), Reader(), per_channel=True, **options)
            yield name + (", weights of 7 bits" if reduced else ""), net, file
    torch.manual_seed(0)
    tagger = folder / "tagger.onnx"
    torch.onnx.export(Tagger().eval(), (torch.randn(12, 5, 24),), str(tagger), dynamo=False, opset_version=17)
    for reduced in (False, True):
        file = folder / f"tagger{reduced}.onnx"
        quantize_dynamic(str(tagger), str(file), weight_type=SIGNED, reduce_range=reduced)
        yield "LSTM, dynamic" + (", weights of 7 bits" if reduced else ""), tagger, file


def error(plain: Path, file: Path, precise: bool) -> float:
    """Relative L2 of a quantized file's first output, for a random input; ``precise`` sets x64quantprecision."""
    options = ort.SessionOptions()
    options.add_session_config_entry("session.x64quantprecision", str(int(precise)))
    sessions = [ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"]) for path in (plain, file)]
    (info,) = sessions[0].get_inputs()
    given = {info.name: np.random.default_rng(3).standard_normal(info.shape).astype(np.float32)}
    exact, got = (session.run(None, given)[0] for session in sessions)
    return float(np.linalg.norm(got - exact) / np.linalg.norm(exact))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    target = parser.parse_args().json
    logging.disable()
    warnings.simplefilter("ignore")
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, plain, file in files(Path(folder)):
            (test,) = bisect(str(plain), "ort,ort-all", test_model=file).tests
            found[name] = {
                "rel_l2": error(plain, file, False),
                "rel_l2_x64quantprecision": error(plain, file, True),
                "guilty": [row.name for row in test.guilty],
                "causes": [[finding.cause, finding.explained] for finding in test.findings],
            }
    text = json.dumps(found, indent=1)
    print(text)
    if target is not None:
        target.write_text(text + "\n")


if __name__ == "__main__":
    main()
