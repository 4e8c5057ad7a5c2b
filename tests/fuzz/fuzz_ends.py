"""Cases about ends: streams that are closed, full or unread, few files and little memory, commands that fail on their
way, interpreters that never answer; and options of Python functions, and files quantized to levels of any type."""

from __future__ import annotations

import math
import random
import signal
from pathlib import Path

import numpy as np
import onnx
from fuzz_base import Case
from fuzz_world import World
from onnx import TensorProto, helper, numpy_helper

_LEVELS = {
    TensorProto.INT8: (-100, 100),
    TensorProto.UINT8: (0, 255),
    TensorProto.INT4: (-8, 7),
    TensorProto.UINT4: (0, 15),
    TensorProto.INT16: (-500, 500),
    TensorProto.UINT16: (0, 500),
    TensorProto.INT32: (-1000, 1000),
    TensorProto.FLOAT8E4M3FN: (-4, 4),
    TensorProto.FLOAT8E5M2: (-4, 4),
    TensorProto.FLOAT4E2M1: (-4, 4),
}
"""Element type → smallest and largest number of a weight."""
_BACKENDS = (
    *("ort,ort-all", "ort", "torch,ort", "ort,emu-fp32", "ort,emu-fp16", "ort,emu-int8", "ort,ort-int8", "ort,emu-fp8"),
    *("ort,emu-int4:g16", "ort,emu-nvfp4", "ort,emu-mxfp8", "emu-fp16,ort", "ort,emu-bf16,emu-int8"),
)
_ENDLESS = (
    "exec yes",
    "exec cat /dev/zero",
    "exec yes cpdebug 3 11",
    "seq 1 100000 >&2; exit 1",
    "printf '\\033[31m' >&2",
)


def quantized(rng: random.Random, world: World, folder: Path) -> Case:
    """A product whose weights are levels of any type, with scales a tensor, a channel or a block, sound or not."""
    numbers = np.random.default_rng(rng.randrange(1 << 30))
    kind, rows, block = rng.choice(list(_LEVELS)), rng.choice((4, 8, 16)), rng.choice((0, 0, 2, 4, 8))
    axis = 0 if block else rng.choice((None, 0, 1))
    smallest, largest = _LEVELS[kind]
    shape = [max(1, rows // block), 4] if block else [] if axis is None else [rows if axis == 0 else 4]
    scale = np.asarray(np.abs(numbers.standard_normal(shape)) * 0.05 + 0.001).astype(rng.choice(("f4", "f4", "f2")))
    if rng.random() < 0.1:
        scale = np.asarray(scale * rng.choice((0, -1, math.nan, math.inf)), scale.dtype)
    weights = [
        helper.make_tensor("w", kind, [rows, 4], numbers.integers(smallest, largest, rows * 4).tolist()),
        numpy_helper.from_array(scale, "s"),
    ]
    names = ["w", "s"]
    if rng.random() < 0.4 and kind in (TensorProto.INT8, TensorProto.UINT8, TensorProto.INT4, TensorProto.UINT4):
        zeros = numbers.integers(0, 3, math.prod(shape)).tolist()
        weights.append(helper.make_tensor("z", kind, shape, zeros))
        names.append("z")
    said = {} if axis is None else {"axis": axis}
    nodes = [helper.make_node("DequantizeLinear", names, ["f"], **said, **({"block_size": block} if block else {}))]
    data = "x"
    if rng.random() < 0.5:
        nodes += [
            helper.make_node("QuantizeLinear", ["x", "t"], ["q"]),
            helper.make_node("DequantizeLinear", ["q", "t"], ["d"]),
        ]
        weights.append(numpy_helper.from_array(np.float32(0.03), "t"))
        data = "d"
    nodes += [helper.make_node("MatMul", [data, "f"], ["h"]), helper.make_node("Relu", ["h"], ["y"])]
    ends = [helper.make_tensor_value_info("x", 1, [2, rows])], [helper.make_tensor_value_info("y", 1, [2, 4])]
    opset = helper.make_opsetid("", rng.choice((21, 21, 21, 23, 19)))
    model = helper.make_model(helper.make_graph(nodes, "g", *ends, weights), opset_imports=[opset], ir_version=10)
    onnx.save(model, str(folder / "m.onnx"))
    command = rng.choice(
        (
            ["bisect", "m.onnx", "-b", rng.choice(_BACKENDS), "--json", "out/o.json"],
            ["capture", "m.onnx", "-b", rng.choice(("ort", "emu-fp16", "emu-int8")), "-o", "out/o"],
            ["quantize", "ptq", "m.onnx", "-o", "out/o", "--batches", "1"],
            ["export", "m.onnx", "-o", "out/o", "--opset", rng.choice(("17", "21", "23"))],
            ["search", "m.onnx", "-b", "ort,emu-int8", "--goal", "rel_l2<1e-3", "--max-builds", "3"],
            ["check", "m.onnx"],
        )
    )
    return Case("quantized", [command], ["out"], unchanged=True)


def _plain(rng: random.Random, world: World, folder: Path) -> list[str]:
    """A command on sound files, whose outputs are in folders that are not there yet."""
    for name in ("net.onnx", "x.npz"):
        world.copy(world.files / name, folder)
    world.copy(world.result, folder)
    return rng.choice(
        (
            ["bisect", "net.onnx", "-b", "ort,emu-fp16", "--save", "out/a/s"],
            ["capture", "net.onnx", "-b", "ort", "-o", "out/a/b/c"],
            ["quantize", "ptq", "net.onnx", "-o", "out/a/q", "--batches", "1"],
            ["export", "net.onnx", "-o", "out/a/e", "--opset", "18"],
            ["search", "net.onnx", "-b", "ort,emu-fp16", "--goal", "rel_l2<1e-4", "--onnx", "out/a/m.onnx"],
            ["bundle", "result", "-o", "out/a/b"],
            ["report", "result", "-f", "html", "-o", "r.html"],
            ["report", "result", "-f", "github"],
            ["check", "net.onnx", "--json"],
            ["doctor"],
            ["models"],
        )
    )


def streams(rng: random.Random, world: World, folder: Path) -> Case:
    """Standard streams that are closed, full, or that nobody reads; few open files, little memory."""
    command = _plain(rng, world, folder)
    case = Case("streams", [command], ["out", "r.html"])
    if rng.random() < 0.6:
        case.streams = rng.choice(("stdout closed", "stderr closed", "both closed", "stdout full", "stdout unread"))
    else:
        case.limits = rng.choice(({"NOFILE": rng.choice((8, 12, 20, 40))}, {"AS": rng.choice((3, 4, 5, 6)) << 30}))
    return case


def failing(rng: random.Random, world: World, folder: Path) -> Case:
    """A command that fails somewhere on its way: what it was to write is as it was, down to the folders around it."""
    command = _plain(rng, world, folder)
    spoiled = rng.choice(("net.onnx", "x.npz", "result/result.json"))
    if spoiled == "net.onnx":
        model = onnx.load(str(folder / spoiled))
        node = rng.choice(list(model.graph.node))
        change = rng.randrange(4)
        if change == 0:
            node.op_type = rng.choice(("Conv", "Add", "TopK", "NonMaxSuppression", "Det"))
        elif change == 1:
            node.input[0] = rng.choice([output for each in model.graph.node for output in each.output])
        elif change == 2:
            del node.input[1:]
        else:
            model.opset_import[0].version = rng.choice((7, 11, 21))
        (folder / spoiled).write_bytes(model.SerializeToString())
    else:
        (folder / spoiled).write_bytes((folder / spoiled).read_bytes()[: rng.randrange(2000)])
    takes_inputs = command[0] in ("bisect", "capture", "search", "check")
    inputs = ["--inputs", "x.npz"] if takes_inputs and rng.random() < 0.5 else []
    return Case("failing", [[*command, *inputs]], ["out", "r.html"], unchanged=True)


def endless(rng: random.Random, world: World, folder: Path) -> Case:
    """A Python named by ``--trt-python`` that writes without end, or something else than its version."""
    world.copy(world.files / "net.onnx", folder)
    program = folder / "python"
    program.write_text(f"#!/bin/sh\n{rng.choice(_ENDLESS)}\n")
    program.chmod(0o755)
    command = rng.choice((["capture", "net.onnx", "-b", "trt-fp32", "-o", "out"], ["build", "net.onnx", "-o", "out"]))
    return Case("endless", [[*command, "--trt-python", "./python"]], ["out"], unchanged=True)


_OPTIONS = """
import dataclasses, random
import numpy as np
import torch
import cp_debug

rng = random.Random({seed})
VALUES = [None, 0, -1, 3, True, 0.5, float("nan"), 10**30, "", "text", "x" * 5000, "\\x1b[31m", b"x", [], {{}}, (),
    set(), object(), type, print, lambda: 1, ..., np.zeros(2), np.array(None), torch.ones(2), torch.nn.ReLU(),
    iter([1]), range(3), "net.onnx", {{"x": (1, 3, 8, 8)}}, {{1: 2}}, [None], ["conv1"], 1 + 2j]
kind, call = rng.choice([
    (cp_debug.Options, lambda o: cp_debug.diagnose("net.onnx", "ort,emu-fp16", options=o, progress=False)),
    (cp_debug.Reading, lambda o: cp_debug.diagnose(
        "net.onnx", "ort,ort-all", options=cp_debug.Options(reading=o), progress=False)),
    (cp_debug.VerifyOptions, lambda o: cp_debug.verify("net.onnx", "ort,ort-all", options=o, progress=False)),
    (cp_debug.PredictOptions, lambda o: cp_debug.predict("net.onnx", "fp16", options=o, progress=False)),
    (cp_debug.MixedPrecisionOptions, lambda o: cp_debug.search(
        "net.onnx", "ort,emu-fp16", "rel_l2<1e-4", options=o, progress=False)),
])
field = rng.choice([field.name for field in dataclasses.fields(kind)])
try:
    print(call(kind(**{{field: rng.choice(VALUES)}})))
except cp_debug.CpdebugError as error:
    assert 0 < len(str(error).splitlines()) <= 12, error
"""


def options(rng: random.Random, world: World, folder: Path) -> Case:
    """Options of a Python function, one of whose fields is of another type."""
    world.copy(world.files / "net.onnx", folder)
    (folder / "case.py").write_text(_OPTIONS.format(seed=rng.randrange(1 << 30)))
    return Case("options", [[]], program="case.py")


def kills(rng: random.Random, world: World, folder: Path) -> Case:
    """Signals to the guard, to the process that it guards, or to both."""
    case = Case("kills", [_plain(rng, world, folder)], ["out", "r.html"], guarded=True)
    case.signal = rng.choice((signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGKILL))
    case.signal_after = rng.random() * 1.5
    return case
