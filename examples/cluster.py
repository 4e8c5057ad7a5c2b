"""Many samples on a Dask cluster: which layer is guilty on how many of them?

    python cluster.py net.onnx samples/ tcp://head:8786

The last argument is the address of a scheduler that runs, whose workers see the same files. Without arguments it makes
a network and samples, and a cluster of two processes here. Needs ``pip install '.[dask]'`` in a checkout of cpdebug.
"""

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import mkdtemp

import numpy as np
import torch
from torch import nn


def made() -> tuple[Path, Path]:
    """A network that overflows in FP16 on large inputs, and six samples, each ten times as large as the one before."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
    folder = Path(mkdtemp())
    image = torch.rand(1, 3, 16, 16)
    torch.onnx.export(net, (image,), folder / "net.onnx", dynamo=False, input_names=["image"], opset_version=17)
    (folder / "samples").mkdir()
    for power in range(6):
        np.savez(folder / "samples" / f"{power}.npz", image=(image * 10.0**power).numpy())
    return folder / "net.onnx", folder / "samples"


@contextlib.contextmanager
def scheduler(address: str | None) -> Iterator[str]:
    """The address of a cluster: one that runs, or one of two processes here."""
    if address is not None:
        yield address
        return
    from distributed import LocalCluster

    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
        yield cluster.scheduler_address


def main() -> int:
    if len(sys.argv) == 4:
        model, samples, address = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    else:
        (model, samples), address = made(), None
    with scheduler(address) as running:
        command = ["sweep", "bisect", str(model), "--inputs", str(samples), "-n", "6", "-b", "ort,emu-fp16"]
        command += ["--cluster", running, "-o", str(Path(mkdtemp()) / "out")]
        return subprocess.run([sys.executable, "-m", "cp_debug", *command], check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
