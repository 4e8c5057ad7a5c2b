"""Forms of a set of kept layers for other tools: a mixed-precision ONNX file, arguments, a piece of configuration."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from cp_debug.backends.base import Program
from cp_debug.graph.casts import cast_surgery
from cp_debug.graph.unquantize import remove_qdq

FLAGS = {"fp16": "fp16", "fp16acc": "fp16", "bf16": "bf16"}
"""Low precision → its name in cast surgery, TensorRT's flag and AutoCast. TF32 is in no graph and of no layer."""


def write_onnx(programs: Sequence[Program], keep: Mapping[str, Sequence[str]], precision: str, target: Path) -> None:
    """Write the mixed-precision graph as ``target``; with several components, one file each into that folder.

    FP16 and BF16 by casts, INT8 by leaving Q/DQ pairs out. Raises InputError where a weight that is not kept is beyond
    the low precision.
    """
    several = len(programs) > 1
    (target if several else target.parent).mkdir(parents=True, exist_ok=True)
    for program in programs:
        file = target / f"{program.name}.onnx" if several else target
        if precision == "int8":
            remove_qdq(program.graph, keep[program.name], file)
        else:
            cast_surgery(program.graph, FLAGS[precision], keep[program.name], file)


def arguments(keep: Mapping[str, Sequence[str]], precision: str) -> dict[str, dict[str, str]]:
    """Component → tool → command line that keeps these nodes in FP32; components with nothing to keep are left out."""
    commands: dict[str, dict[str, str]] = {}
    for component, nodes in keep.items():
        if not nodes:
            continue
        excluded = shlex.join(f"^{re.escape(node)}$" for node in nodes)
        file = f"{component}.onnx"
        if precision == "int8":
            commands[component] = {
                "modelopt": f"python -m modelopt.onnx.quantization --onnx_path {file} --nodes_to_exclude {excluded}"
            }
        elif precision in FLAGS:
            flag = FLAGS[precision]
            listed = ",".join(f"{node}:fp32" for node in nodes)
            layers = shlex.join(f"{node}:float32" for node in nodes)
            commands[component] = {
                "polygraphy": f"polygraphy run {file} --trt --{flag} --precision-constraints obey "
                f"--layer-precisions {layers}",
                "trtexec": f"trtexec --onnx={file} --{flag} --precisionConstraints=obey "
                + shlex.join([f"--layerPrecisions={listed}", f"--layerOutputTypes={listed}"]),
                "autocast": f"python -m modelopt.onnx.autocast --onnx_path {file} --low_precision_type {flag} "
                f"--nodes_to_exclude {excluded}",
            }
    return commands


def deploy_fragment(keep: Mapping[str, Sequence[str]], precision: str) -> str:
    """The part of a configuration of ``cpdebug deploy`` (YAML) that keeps the nodes; empty where it has no such key."""
    if precision not in FLAGS or not any(keep.values()):
        return ""
    listed = "".join(
        f"  - {json.dumps(node)}\n" for component_nodes in keep.values() for node in component_nodes
    )  # JSON strings are YAML
    return f"tensorrt:\n  precision: {FLAGS[precision]}\n  keep_fp32:\n{listed}"
