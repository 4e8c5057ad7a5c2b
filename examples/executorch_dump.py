"""ExecuTorch against the module that it was made of, layer by layer: its ETDump holds what every operator returned.

    python executorch_dump.py        # needs executorch

It makes a small network and runs it with ExecuTorch's portable kernels, behind a pass that takes GELU by its
approximation with tanh. Each recorded result is named by the node of the exported program that it comes from; the ONNX
file, written from that program, has the same names.
"""

from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import torch
from executorch.devtools import Inspector, generate_etrecord
from executorch.exir import to_edge
from executorch.exir.dialects._ops import ops as exir_ops
from executorch.exir.pass_base import ExportPass
from executorch.extension.pybindings.portable_lib import _load_for_executorch_from_buffer

import cp_debug


class FastGelu(ExportPass):
    """The pass of a team that wants speed."""

    def call_operator(self, op: Any, args: Any, kwargs: Any, meta: Any) -> Any:
        if op is exir_ops.edge.aten.gelu.default:
            kwargs = {**kwargs, "approximate": "tanh"}
        return super().call_operator(op, args, kwargs, meta)


def dumped(module: torch.nn.Module, x: torch.Tensor, folder: Path) -> Path:
    """A file with what ExecuTorch computes of ``x``, by names of the exported program."""
    edge = to_edge(torch.export.export(module, (x,))).transform([FastGelu()])
    of_handle = {
        node.meta["debug_handle"]: node.meta["from_node"][0].name
        for node in edge.exported_program().graph.nodes
        if node.op == "call_function"
    }
    record = folder / "net.etrecord"
    made = edge.to_executorch()
    generate_etrecord(str(record), edge, made)
    loaded = _load_for_executorch_from_buffer(made.buffer, enable_etdump=True, debug_buffer_size=64 << 20)
    loaded.run_method("forward", (x,))
    loaded.write_etdump_result_to_file(str(folder / "net.etdp"), str(folder / "net.bin"))
    inspector = Inspector(
        etdump_path=str(folder / "net.etdp"), etrecord=str(record), debug_buffer_path=str(folder / "net.bin")
    )
    values = {"x": x.numpy()}
    for block in inspector.event_blocks:
        for event in block.events:
            handles = event.debug_handles if isinstance(event.debug_handles, list | tuple) else [event.debug_handles]
            if event.name == "OPERATOR_CALL" and event.debug_data:
                values[of_handle[handles[-1]]] = event.debug_data[0].numpy()  # the last operator of a node wins
    np.savez(folder / "dump.npz", **values)
    return folder / "dump.npz"


def main() -> None:
    torch.manual_seed(0)
    layers = [torch.nn.Conv2d(3, 16, 3), torch.nn.GELU(), torch.nn.Conv2d(16, 16, 3), torch.nn.Sigmoid()]
    module = torch.nn.Sequential(*layers, torch.nn.Flatten(), torch.nn.Linear(16 * 12 * 12, 10)).eval()
    folder, x = Path(mkdtemp()), torch.randn(1, 3, 16, 16)
    torch.onnx.export(module, (x,), folder / "net.onnx", input_names=["x"], dynamo=True, verbose=False)
    print(cp_debug.diagnose(folder / "net.onnx", "ort", test_tensors=dumped(module, x, folder)))


if __name__ == "__main__":
    main()
