"""torch.compile: public reports of wrong results, each rebuilt in a small network: is its operator named?

python benchmarks/compiled_reports.py                       # what the installed torch computes: named or not
python benchmarks/compiled_reports.py std angle             # these alone
python benchmarks/compiled_reports.py --json OUT            # also write what was found
python benchmarks/compiled_reports.py --mended              # reports that the installed torch no longer shows

Inductor's healthy networks, planted faults and functions that differ by design are those of ``compiled.py``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from cp_debug.bisect.engine import bisect
from cp_debug.bisect.result import TestResult
from cp_debug.errors import CpdebugError
from cp_debug.recipes.torch_callable import TorchModel

FP32, BF16, FP16 = (f"torch{p},torch-compile{p}" for p in ("", "-bf16", "-fp16"))
CASTS_LEFT_OUT = "missing-casts"


class Between(nn.Module):
    """A linear layer and tanh, the reported function, a linear layer."""

    def __init__(self, function: Callable[..., Tensor], width: int = 32) -> None:
        super().__init__()
        self.first, self.last, self.function = nn.Linear(16, width), nn.Linear(width, 4), function

    def forward(self, x: Tensor) -> Tensor:
        y = self.function(torch.tanh(self.first(x)))
        return self.last(y.to(self.last.weight.dtype))


class Attention(nn.Module):
    """Attention written out, whose keys are transposed together with the split into heads."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q = self.query(x).view(4, 4, 4, 4).transpose(1, 2)
        k = self.key(x).view(4, 4, 4, 4).permute(0, 2, 3, 1)
        v = self.value(x).view(4, 4, 4, 4).transpose(1, 2)
        y = torch.matmul(torch.softmax(torch.matmul(q, k) * 0.5, -1), v)
        return self.out(y.transpose(1, 2).reshape(4, 4, 16))


class Delay(nn.Module):
    """A line of past frames that is moved on in place."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor, line: Tensor) -> Tensor:
        line[1:] = line[:-1].clone()
        return self.last(torch.relu(self.first(x) + line))


class Scattered(nn.Module):
    """Rows put into a table, which is returned as it was, and then cleared for the next call."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        y = torch.slice_scatter(table, self.first(x), dim=0, start=1, end=3)
        table.zero_()
        return self.last(y), y


@dataclass(frozen=True)
class Report:
    """One report of pytorch/pytorch: the network, its backends, and what a finding must name."""

    thread: int
    module: Callable[[], nn.Module]
    wanted: tuple[str, ...]
    """Parts of names, of which each accused layer has one; or the cause."""
    backends: str = FP32
    shapes: tuple[tuple[int, ...], ...] = ((64, 16),)


def _of(function: Callable[..., Tensor], width: int = 32) -> Callable[[], nn.Module]:
    return lambda: Between(function, width)


def _cancels(x: Tensor) -> Tensor:
    y = functional.elu(x * 1e-5 - 0.6114, 1.24)
    return torch.reciprocal(y + torch.exp(y))


def _added(x: Tensor) -> Tensor:
    tenth = torch.sign(x).abs() * 0.10009765625  # BF16's 0.1
    return (tenth + torch.tensor(-0.1, dtype=torch.float64)) * 1e4


REPORTS: dict[str, Report] = {
    "floor-divide": Report(197895, _of(lambda x: torch.floor_divide(torch.round(x, decimals=1), 0.1)), ("floor_div",)),
    "elu-near-0": Report(189801, _of(lambda x: (functional.elu(x * 1e-9, 0.52) * 1e38) * 1e3), ("elu",)),
    "elu-cancels": Report(189803, _of(_cancels), ("elu", "fp32")),
    "zero-sign-add": Report(
        189799, _of(lambda x: torch.exp(torch.reciprocal(torch.ceil(x) + torch.zeros_like(x)))), ("add",)
    ),
    "delay-line": Report(197829, Delay, ("clone", "copy", "setitem", "slice"), shapes=((16, 16), (16, 16))),
    "scatter-cleared": Report(198094, Scattered, ("slice_scatter",), shapes=((2, 16), (16, 16))),
    "attention-keys": Report(195320, Attention, ("matmul", "softmax"), shapes=((4, 4, 16),)),
    "std-large": Report(197089, _of(lambda x: x / ((x * 1e25).std(-1, keepdim=True) * 1e-25)), ("std",)),
    "std-small": Report(197089, _of(lambda x: x * ((x * 1e-25).std(-1, keepdim=True) * 1e25)), ("std",)),
    "softmax-sum": Report(189787, _of(lambda x: x + torch.floor(torch.softmax(x, -1).sum(-1, keepdim=True))), ("sum",)),
    "fp16-square": Report(183607, _of(lambda x: 1 / (1 + 1e-5 * ((x * 400).half() ** 2).float())), (CASTS_LEFT_OUT,)),
    "bf16-round-trip": Report(176565, _of(lambda x: (x * 8).bfloat16().float()), (CASTS_LEFT_OUT,)),
    "bf16-add": Report(185605, _of(_added), ("add",), BF16),
    "remainder-infinite": Report(
        198057, _of(lambda x: torch.remainder(torch.relu(x), torch.exp(x * 1e-9 + 200))), ("remainder",)
    ),
    "remainder-large": Report(198057, _of(lambda x: torch.remainder(x * 1e12, 3.0)), ("remainder",)),
    "remainder-bf16": Report(186875, _of(lambda x: torch.remainder(x.sign() * 1.703125, 1.7)), ("remainder",), BF16),
    "fmod-fp16": Report(97333, _of(lambda x: torch.fmod(torch.sign(x) * 2.30078125, 2.3) * 1e3), ("fmod",), FP16),
    "remainder-fp16": Report(183083, _of(lambda x: torch.remainder(x.sign() * 3.140625, 3.14)), ("remainder",), FP16),
    "log-times-0": Report(186281, _of(lambda x: x + torch.log(x) * 0), ("log", "mul")),
    "matmul-bf16": Report(181568, _of(lambda x: (x @ x.T).bfloat16() + x[:, :1], 64), (CASTS_LEFT_OUT,)),
    "elu-zero-sign": Report(189799, _of(lambda x: torch.exp(1 / functional.elu(torch.ceil(x)))), ("elu",)),
    "sqrt-sign": Report(189808, _of(lambda x: torch.signbit(torch.sqrt(x)).float()), ("sqrt",)),
}


def _line(function: Callable[..., Any], *given: Any) -> tuple[Callable[..., Any], tuple[Tensor, ...]]:
    return function, tuple(g if isinstance(g, Tensor) else torch.tensor(g) for g in given)


def _fraction() -> Tensor:
    return torch.linspace(-0.95, -0.05, 64)


MENDED: dict[str, tuple[int, Callable[[], tuple[Callable[..., Any], tuple[Tensor, ...]]]]] = {
    "uint8-negative": (156788, lambda: _line(lambda x: x.to(torch.uint8), _fraction() * 4)),
    "byte": (131910, lambda: _line(lambda x: x.byte(), _fraction() * 4)),
    "uint8-pow": (98149, lambda: _line(lambda x: torch.cos(x.pow(5)), torch.full((32,), 4, dtype=torch.uint8))),
    "uint8-add": (105264, lambda: _line(lambda x: (x + x).short(), torch.full((32,), 128, dtype=torch.uint8))),
    "uint8-abs": (187018, lambda: _line(lambda x: torch.cat([-x.abs()] * 2), torch.full((32,), 200).byte())),
    "int32-add": (108520, lambda: _line(lambda x: (x + x).long(), torch.full((32,), 2**31 - 1).int())),
    "int32-mul": (190764, lambda: _line(lambda x: (x * 3 - x).long(), torch.full((31,), 2**31 - 1).int())),
    "shift-right-64": (143555, lambda: _line(torch.bitwise_right_shift, [1000] * 32, [64] * 32)),
    "shift-left-64": (143566, lambda: _line(torch.bitwise_left_shift, [1000] * 32, [64] * 32)),
    "frac-zero": (183606, lambda: _line(lambda x: 1 / torch.frac(x.ceil()), _fraction())),
    "copysign": (174172, lambda: _line(lambda x: torch.copysign(x, -0.0), -_fraction())),
    "argmax-nan": (113175, lambda: _line(lambda x: torch.log(x + 0.5).argmax(), _fraction())),
    "log1p-argmax": (118266, lambda: _line(lambda x: torch.log1p(x * 3).argmax(), _fraction())),
    "division-sign": (101009, lambda: _line(lambda x: x * (x + 0.5) / torch.relu(x), _fraction())),
    "softmax-large": (161150, lambda: _line(lambda x: torch.softmax(x * -1.7e14 * 1.7e14, 0), _fraction())),
    "softmax-scaled": (163932, lambda: _line(lambda x: torch.softmax(x * 1e14, 0), _fraction())),
    "hardshrink": (102461, lambda: _line(lambda x: functional.hardshrink(x.sign() * x, 0.7), _fraction())),
    "threshold": (185470, lambda: _line(lambda x: functional.threshold(x, 0.1, 0), torch.full((32,), 0.1).bfloat16())),
    "polygamma": (147450, lambda: _line(lambda x: torch.special.polygamma(1, x), [-1.0, -2.0, 0.5, 3.0] * 8)),
    "log-ndtr": (187336, lambda: _line(torch.special.log_ndtr, [100.0, -30.0, 0.0, 3.0] * 8)),
    "layer-norm": (143182, lambda: _line(lambda x: functional.layer_norm(x, (64,)), _fraction().repeat(8, 1))),
    "replicate-pad": (
        115157,
        lambda: _line(lambda x: functional.pad(x.abs(), (0, 24, 34, 0), "replicate") * 2, torch.randn(1, 2, 5, 6)),
    ),
    "subnormal": (126848, lambda: _line(lambda x: x * 2.0**-124 * 2.0**120, _fraction())),
    "bf16-equal": (173987, lambda: _line(lambda x: x == 3.14, torch.full((32,), 3.14).bfloat16())),
}  # fmt: skip
"""Reports that were tried and do not differ: issue, and the function with what it is given."""


def mended() -> None:
    """Which reports do not differ in the installed version."""
    same = 0
    for name, (thread, make) in MENDED.items():
        function, given = make()
        torch.compiler.reset()
        pair = [f(*(g.clone() for g in given)) for f in (function, torch.compile(function, fullgraph=True))]
        alike = torch.allclose(pair[0].double(), pair[1].double(), 1e-5, 1e-6, equal_nan=True)
        same += alike
        print(f"{name:20} #{thread} {'same' if alike else f'DIFFERS {pair}'}", flush=True)
    print(f"torch {torch.__version__}: {same} of {len(MENDED)} agree")


def run(name: str, report: Report) -> TestResult:
    """Eager against compiled."""
    torch.manual_seed(0)
    random = torch.Generator().manual_seed(1)
    args: Any = tuple(torch.randn(*shape, generator=random) for shape in report.shapes)
    (test,) = bisect(TorchModel(name, report.module().eval(), args), report.backends).tests
    return test


def main() -> None:
    """Run what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--mended", action="store_true")
    given = parser.parse_args()
    if given.mended:
        mended()
        return
    found: dict[str, Any] = {}
    for name in given.names or REPORTS:
        report = REPORTS[name]
        entry: dict[str, Any] = {"issue": report.thread, "backends": report.backends}
        try:
            test = run(name, report)
        except CpdebugError as error:
            entry["refused"] = str(error)
            print(f"{name:20} #{report.thread} refused: {error}", flush=True)
        else:
            causes = [finding.cause for finding in test.findings]
            first = test.first_divergent
            layers = [r.name for r in test.guilty] or [n for f in test.findings for n in f.layers]
            named = causes == [*report.wanted] or (
                bool(layers) and all(any(part in layer for part in report.wanted) for layer in layers)
            )
            entry |= {
                "differs": not test.agrees, "named": named, "layers": layers, "causes": causes,
                "kernels": [r.tactic for r in test.guilty],
                "first": first and first.name,
                "says": [f.headline for f in test.findings],
                "notes": list(test.notes),
            }  # fmt: skip
            told = "does not differ" if test.agrees else f"{'named' if named else 'NOT NAMED'} {layers} {causes}"
            print(f"{name:20} #{report.thread} {told}; first {first and first.name}", flush=True)
            for line in [*entry["says"], *entry["notes"]]:
                print(f"    {line}", flush=True)
        found[name] = entry
    differ = [e for e in found.values() if e.get("differs")]
    threads = {e["issue"] for e in differ}
    print(f"torch {torch.__version__}: {len(differ)} networks of {len(threads)} reports differ")
    print(f"named exactly: {sum(e['named'] for e in differ)} of {len(differ)}")
    if given.json:
        command = "python benchmarks/compiled_reports.py --json OUT"
        record = {"command": command, "torch": torch.__version__, "cpu": torch.backends.cpu.get_cpu_capability()}
        given.json.write_text(json.dumps(record | {"reports": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
