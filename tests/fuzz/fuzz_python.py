"""Cases of Python programs: functions of the package with values of other types, modules that misbehave, the pytest
plug-in with hostile names. Each is a script in the case's folder; cpdebug's own errors end it with their exit code."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import onnx
from fuzz_base import ANYTHING_NEW, TEXTS, Case
from fuzz_onnx import rename
from fuzz_world import World

SCRIPT = """
import sys
import threading
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import nn

import cp_debug
from cp_debug.quantization.quantized_programs import Calibration
from cp_debug.recipes.input_files import ImageFormat

warnings.simplefilter("ignore")
class Odd:
    def __str__(self):
        raise ValueError("no text")
    __repr__ = __str__
    def __array__(self, *a, **k):
        raise ValueError("no array")
net = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2)).eval()
x = torch.ones(2, 4)
def run():
{body}
def shown(result):
    for face in (str, repr, lambda r: getattr(r, "frame", 0), lambda r: getattr(r, "layers", 0)):
        face(result)
try:
    shown(run())
except AssertionError:
    sys.exit(1)
except TypeError as error:
    if "Options.__init__() got an unexpected" not in str(error):  # that is Python's own word for it
        raise
except cp_debug.CpdebugError as error:
    print(error, file=sys.stderr)
    sys.exit(error.exit_code)
"""

VALUES = (
    "None", "0", "-1", "True", "2**63", "float('nan')", "1e308", "''", "'net.onnx'", "b'x'", "[]", "{}", "()", "set()",
    "object()", "Odd()", "int", "lambda *a: None", "(i for i in [1])", "Path('.')", "Path('net.onnx')", "np.ones(3)",
    "np.array(['a'])", "np.zeros(2, object)", "np.float32(2)", "np.array([1 + 2j])", "np.zeros(2, [('a', 'f4')])", "x",
    "x.to(torch.bfloat16)", "x.to_sparse()", "torch.empty(3, device='meta')", "torch.zeros(0)", "net", "nn.ReLU",
    "[[1], [1, 2]]", "{'x': x}", "{3: x}", "['torch', 'ort']", "'\\x1b[31mred\\u202e'", "'a\\n::error::injected'",
    "torch.quantize_per_tensor(x, 0.1, 0, torch.qint8)", "torch.nested.nested_tensor([x, x[:1]])", "1 + 2j", "range(3)",
)  # fmt: skip
"""Expressions of values: few are what an argument takes."""

CALLS = {
    "diagnose": ("model", "backends", "inputs", "test_model", "test_tensors", "tensors_precision", "channels_last"),
    "assert_agree": ("model", "backends", "inputs", "options"),
    "predict": ("model", "precision", "target", "inputs", "options"),
    "search": ("model", "backends", "goal", "inputs", "samples", "checkpoint"),
    "verify": ("model", "backends", "inputs", "samples", "seed", "options", "export"),
    "evaluate": ("model", "backends", "inputs", "samples", "data", "options"),
    "quantize": ("model", "output", "inputs", "batches", "method", "skip_layers", "cache", "overwrite"),
}
"""Function → arguments of which some get other values."""
GIVEN = {
    "model": "net", "backends": "'torch,ort'", "inputs": "x", "precision": "'fp16'", "target": "'trt-8.6'",
    "goal": "'rel_l2<1e-3'", "output": "'out'",
}  # fmt: skip
OPTIONS = {"diagnose": "Options", "assert_agree": "Options", "predict": "PredictOptions", "verify": "VerifyOptions"}
FIELDS = ("samples", "seed", "rtol", "oracle", "exporter", "memory", "maps", "save", "inputs", "reading", "max_abs")

BODIES = (
    "raise ValueError('\\x1b[2Jgone\\u202e' + 'line\\n' * 40)",
    "raise KeyError()",
    "raise StopIteration",
    "return None",
    "return 'text'",
    "return ()",
    "return {'\\x1b[31m<script>alert(1)</script>': y, 'b': [y, {'c': y}]}",
    "return [[y], (x, None)]",
    "return y, y",
    "return x",
    "x.add_(1); return self.b(torch.relu(self.a(x)))",
    "return y * float('nan')",
    "return y.half()",
    "return y.double()",
    "return torch.complex(y, y)",
    "return (y * 9).int()",
    "return y > 0",
    "return y.to_sparse()",
    "return y.to('meta')",
    "return y + torch.randn_like(y)",
    "return y.detach().numpy()",
    "return (i for i in [y])",
    "self.train(not self.training); return y",
    "self.b = nn.Linear(5, 2); return y",
    "torch.set_default_dtype(torch.float64); return y",
    "print('\\x1b[31mred'); return y",
    "warnings.warn('\\x1b[31mred'); return y",
    "return tuple(y + i for i in range(200))",
    "return y.expand(10**4, *y.shape)",
    "return y / 0",
    "self.a.weight.data.mul_(1.5); return y",
    "self.kept = y; return y",
    "return y * 1e-42",
    "return torch.zeros(2, 2)",
    "raise SystemExit(0)",
)
"""What a module may do in ``forward``, with its input ``x`` and the result ``y`` of two layers."""
SETTINGS = (
    ("reading=cp_debug.Reading({})", "shapes"),
    *(("reading=cp_debug.Reading(images=ImageFormat({}))", name) for name in ("mean", "std", "scale", "layout", "bgr")),
    *(("calibration=Calibration({})", name) for name in ("data", "samples", "method", "skip_layers")),
)
"""Settings inside of settings: how they are written, and a field of theirs."""

HELD = ("None", "threading.Lock()", "(i for i in [1])", "self.a(torch.ones(1, 4))", "open('/dev/null')", "Odd()")
"""What a module holds beside its layers; most of it cannot be copied."""

FED = ("x", "x", "x", "(x,)", "{'x': x}", "x.double()", "x[:0]", "(x, None)", "None", "(x, {'x': x})", "x.to_sparse()")

CASE = """
import pytest

@pytest.mark.parametrize("name", [{name!r}])
def test_one(assert_agree, name):
    assert_agree("a.onnx", "ort,ort", test_model={test!r})
"""

PYTEST = """
import os
import sys
import pytest
os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
{github}
arguments = ["-p", "cp_debug.pytest_plugin", "-p", "no:cacheprovider", "-q", "--no-header", "--tb=line"]
code = int(pytest.main([*arguments, "--cpdebug-report", {folder!r}, "test_case.py"]))
sys.exit(code if code > 1 else min(code, 1))
"""


def _script(folder: Path, text: str) -> None:
    (folder / "program.py").write_text(text, encoding="utf-8")


def values(rng: random.Random, world: World, folder: Path) -> Case:
    """A function of the package, some of whose arguments are of other types; tensors of all sorts compared."""
    shutil.copyfile(world.files / "net.onnx", folder / "net.onnx")
    if rng.random() < 0.3:
        call = rng.choice(
            (
                f"cp_debug.compare({rng.choice(VALUES)}, {rng.choice(VALUES)})",
                f"cp_debug.compare_tensors({{'a': {rng.choice(VALUES)}}}, {{'a': {rng.choice(VALUES)}, 3: x}})",
                f"cp_debug.compare_tensors({rng.choice(VALUES)}, {rng.choice(VALUES)})",
                f"cp_debug.Capture.open({rng.choice(VALUES)})",
                f"cp_debug.open_result({rng.choice(VALUES)})",
                f"cp_debug.diff_results({rng.choice(VALUES)}, {rng.choice(VALUES)})",
                f"cp_debug.diagnose(net, 'torch,torch', inputs=x).write_html({rng.choice(VALUES)})",
            )
        )
    else:
        name = rng.choice(sorted(CALLS))
        given = {argument: value for argument, value in GIVEN.items() if argument in CALLS[name]}
        for argument in rng.sample(CALLS[name], rng.choice((1, 1, 2))):
            given[argument] = rng.choice(VALUES)
        if name in ("diagnose", "assert_agree") and rng.random() < 0.15:
            inner, field = rng.choice(SETTINGS)
            given["options"] = f"cp_debug.Options({inner.format(f'{field}={rng.choice(VALUES)}')})"
        elif name in OPTIONS and rng.random() < 0.3:
            field, value = rng.choice(FIELDS), rng.choice(VALUES)
            given["options"] = f"cp_debug.{OPTIONS[name]}(**{{{field!r}: {value}}})"
        if name == "quantize":
            given.setdefault("batches", "1")
        call = f"cp_debug.{name}({', '.join(f'{argument}={value}' for argument, value in given.items())})"
    # An option that a class has not is Python's own TypeError.
    body = f"    try:\n        made = lambda: {call}\n        return made()\n    except TypeError as error:\n"
    body += (
        "        if 'unexpected keyword argument' in str(error): sys.exit(2 if print('no', file=sys.stderr) else 2)\n"
    )
    _script(folder, SCRIPT.format(body=body + "        raise"))
    return Case("python values", [[]], [ANYTHING_NEW], program="program.py")


def modules(rng: random.Random, world: World, folder: Path) -> Case:
    """A module that raises, prints, changes itself, or returns what no exporter takes."""
    function = rng.choice(("diagnose", "diagnose", "assert_agree", "verify", "predict", "quantize"))
    pair = rng.choice(("torch,ort", "torch,emu-fp16", "torch,torch", "torch,ort-int8"))
    rest = {"predict": "'fp16'", "quantize": "'out'"}.get(function, repr(pair))
    body = (
        "    class Rude(nn.Module):\n"
        "        def __init__(self):\n"
        "            super().__init__()\n"
        "            self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 2)\n"
        f"            self.held = {rng.choice(HELD) if rng.random() < 0.3 else None}\n"
        "        def forward(self, x):\n"
        "            y = self.b(torch.relu(self.a(x)))\n"
        f"            {rng.choice(BODIES)}\n"
        f"    return cp_debug.{function}(Rude().eval(), {rest}, inputs={rng.choice(FED)}, progress=False)"
    )
    _script(folder, SCRIPT.format(body=body))
    return Case("python modules", [[]], ["out"], program="program.py", prints=True)


def pytest_plugin(rng: random.Random, world: World, folder: Path) -> Case:
    """The fixture in a test with hostile names and folders; what it shows of a guilty layer, in GitHub's words too."""
    model = onnx.ModelProto()
    model.CopyFrom(world.net)
    named = [text for text in TEXTS if "\x00" not in text and text]
    rename(model.graph, {node.output[0]: rng.choice(named) + node.output[0] for node in model.graph.node[:1]})
    (folder / "a.onnx").write_bytes(model.SerializeToString())
    weight = next(tensor for tensor in model.graph.initializer if tensor.raw_data and tensor.data_type == 1)
    array = onnx.numpy_helper.to_array(weight) * 2
    weight.CopyFrom(onnx.numpy_helper.from_array(array, weight.name))
    (folder / "b.onnx").write_bytes(model.SerializeToString())
    test = rng.choice(("b.onnx", "b.onnx", "b.onnx", "a.onnx", "none.onnx"))
    (folder / "test_case.py").write_text(CASE.format(name=rng.choice(named), test=test), encoding="utf-8")
    pages = rng.choice(("pages", "pages/deep", "test_case.py", "a.onnx/x", "\x1b[31m", "<script>alert(1)</script>"))
    github = 'os.environ["GITHUB_ACTIONS"] = "true"' if rng.random() < 0.4 else ""
    _script(folder, PYTEST.format(github=github, folder=pages))
    return Case("pytest plug-in", [[]], [pages.partition("/")[0]], program="program.py")
