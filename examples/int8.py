"""An ONNX file quantized to INT8: how far it is from FP32, and the layers to leave out so that it is near enough.

    python int8.py net.onnx calibration/

``calibration`` is what ``--inputs`` takes: a folder of samples, an ``.npz`` … Without arguments it makes a network in
which one channel is far larger than the others, and samples for it.
"""

import sys
from pathlib import Path
from tempfile import mkdtemp

import numpy as np
import torch
from torch import nn

import cp_debug


def made() -> tuple[Path, Path]:
    """A small network, and a folder of eight samples."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 4, 1)
    ).eval()
    with torch.no_grad():
        net[0].bias[3] = 300.0  # one channel far larger than the others: all of them share its scale
    folder = Path(mkdtemp())
    image = torch.rand(1, 3, 32, 32)
    torch.onnx.export(net, (image,), folder / "net.onnx", dynamo=False, input_names=["image"], opset_version=17)
    (folder / "calibration").mkdir()
    for index in range(8):
        np.savez(folder / "calibration" / f"{index}.npz", image=torch.rand(1, 3, 32, 32).numpy())
    return folder / "net.onnx", folder / "calibration"


def main() -> None:
    model, samples = map(Path, sys.argv[1:]) if len(sys.argv) == 3 else made()
    written = cp_debug.quantize(model, Path(mkdtemp()) / "int8", inputs=samples)
    print(written)
    quantized = next(file for file in written.files if file.suffix == ".onnx")

    # Is any layer worse than INT8 must be? With "ort-int8" the limits are those of INT8.
    print(cp_debug.diagnose(model, "ort,ort-int8", test_model=quantized, inputs=samples))

    # A large error that no layer is guilty of is the price of the scales: which layers to leave unquantized?
    print(cp_debug.search(model, "ort,ort-int8", "rel_l2<1e-3", test_model=quantized, inputs=samples))


if __name__ == "__main__":
    main()
