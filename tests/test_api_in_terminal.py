"""The Python API in a terminal of 80 columns: a few lines, whatever the model prints, however often it is exported."""

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.process

EXAMPLES = Path(__file__).parent.parent / "examples"
MODULE = """
import torch
import cp_debug

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 2, 1))

    def forward(self, x):
        if torch.jit.is_tracing() and x.sum() > 1e30:  # a trace warns here
            return x
        print("a line of the model")
        return self.net(x)

torch.manual_seed(0)
net, image = Net().eval(), torch.randn(1, 3, 32, 32)
torch.onnx.export(net.net, (image,), "net.onnx", dynamo=False, input_names=["image"], opset_version=17)
"""
CALLS = {
    "diagnose": 'cp_debug.diagnose(net, "torch,ort", inputs=image)',
    "diagnose, torch first": 'cp_debug.diagnose(net.net, "torch,ort", inputs=image)',
    "diagnose a file": 'cp_debug.diagnose("net.onnx", "ort,emu-fp16")',
    "assert_agree": 'cp_debug.assert_agree(net.net, "torch,ort", inputs=image)',
    "predict": "cp_debug.predict(net.net, inputs=image)",
    "search": "cp_debug.search(net.net, inputs=image)",
    "verify": "cp_debug.verify(net, inputs=image)",
    "verify, TorchScript": 'cp_debug.verify(net, inputs=image, export=cp_debug.ExportOptions(exporter="torchscript"))',
    "evaluate": 'cp_debug.evaluate("centerpoint:tiny", samples=1)',
    "quantize": 'cp_debug.quantize(net.net, "int8", inputs=image)',
    "compare_tensors": 'cp_debug.compare_tensors({"y": image}, {"y": image})',
}


def in_a_terminal(command: list[str], folder: Path) -> tuple[int, str]:
    """Exit code of a command and all that it wrote to a terminal of 80 columns and 24 rows."""
    leader, terminal = pty.openpty()
    environment = {**os.environ, "COLUMNS": "80", "LINES": "24", "TERM": "xterm-256color"}
    with subprocess.Popen(
        command, stdin=terminal, stdout=terminal, stderr=terminal, cwd=folder, env=environment
    ) as running:
        os.close(terminal)
        written = b""
        try:
            while piece := os.read(leader, 65536):
                written += piece
                if len(written) > 3_000_000:  # a flood need not be waited for
                    running.kill()
                    break
        except OSError:  # what Linux says when nobody holds the terminal any more
            pass
        finally:
            os.close(leader)
    return running.returncode, written.decode(errors="replace")


def no_flood(written: str) -> None:
    """At most 150 lines; bars that are drawn again in their place, ten times a second, in less than 1 MB."""
    assert written.count("\n") <= 150, written[-2000:]
    assert len(written) < 1_000_000


@pytest.mark.parametrize("call", CALLS)
def test_a_function_says_a_few_lines(call: str, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(f"{MODULE}\nprint({CALLS[call]})\nprint('done')\n")
    code, written = in_a_terminal([sys.executable, "script.py"], tmp_path)
    assert code == 0, written[-2000:]
    assert written.rstrip().endswith("done")
    no_flood(written)


@pytest.mark.parametrize("example", sorted(p.name for p in EXAMPLES.glob("*.py") if not p.name.startswith("test_")))
def test_an_example_says_a_few_lines(example: str, tmp_path: Path) -> None:
    for library in re.findall(r"^(?:from|import) (\w+)", (EXAMPLES / example).read_text(), re.MULTILINE):
        pytest.importorskip(library)
    code, written = in_a_terminal([sys.executable, str(EXAMPLES / example)], tmp_path)
    assert code in (0, 1, 2, 3), written[-2000:]
    assert "Traceback" not in written
    no_flood(written)
