"""Tensors that another program dumped, judged layer by layer: nothing but its files and the ONNX file are needed.

    python dump_from_elsewhere.py net.onnx dump/

Without arguments it makes a network, and a dump in which one layer is wrong, as a broken kernel leaves it.
"""

import sys
from pathlib import Path
from tempfile import mkdtemp

import numpy as np
import onnx
import torch

import cp_debug


def made() -> tuple[Path, Path]:
    """A small network, and a folder with a ``.npy`` for each of its values, the second layer's 5 % too large."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4)).eval()
    folder = Path(mkdtemp())
    x = torch.randn(1, 8)
    torch.onnx.export(net, (x,), folder / "net.onnx", dynamo=False, input_names=["x"], output_names=["y"])
    names = ["x", *(name for node in onnx.load(folder / "net.onnx").graph.node for name in node.output)]
    with torch.no_grad():
        values = [x, hidden := net[0](x), torch.relu(hidden), net[2](torch.relu(hidden)) * 1.05]
    (folder / "dump").mkdir()
    for name, value in zip(names, values, strict=True):
        np.save(folder / "dump" / f"{name.strip('/').replace('/', '_')}.npy", value.numpy())
    return folder / "net.onnx", folder / "dump"


def main() -> None:
    model, dump = map(Path, sys.argv[1:]) if len(sys.argv) == 3 else made()
    print(cp_debug.diagnose(model, "ort", test_tensors=dump))


if __name__ == "__main__":
    main()
