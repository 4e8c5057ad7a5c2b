"""Two ONNX files that should be the same network: which layer differs, and is it the weights?

    python two_files.py before.onnx after.onnx

Without arguments it makes a file, and a second one with one weight changed.
"""

import sys
from pathlib import Path
from tempfile import mkdtemp

import numpy as np
import onnx
import torch
from onnx import numpy_helper

import cp_debug


def made() -> tuple[Path, Path]:
    """A small network, and the same with the second layer's weight 5 % larger."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4)).eval()
    before, after = (Path(mkdtemp(), name) for name in ("before.onnx", "after.onnx"))
    torch.onnx.export(net, (torch.randn(1, 8),), before, dynamo=False, input_names=["x"])
    proto = onnx.load(before)
    weight = next(tensor for tensor in proto.graph.initializer if list(tensor.dims) == [4, 16])
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * np.float32(1.05), weight.name))
    onnx.save(proto, after)
    return before, after


def main() -> None:
    before, after = map(Path, sys.argv[1:]) if len(sys.argv) == 3 else made()
    result = cp_debug.diagnose(before, "ort,ort", test_model=after)
    print(result)
    for finding in result.tests[0].findings:
        print(finding.cause, finding.layers, finding.fix)


if __name__ == "__main__":
    main()
