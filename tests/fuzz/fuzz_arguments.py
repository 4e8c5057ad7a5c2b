"""Arguments: every option of every command with values of other kinds, outputs that cannot be written, callables that
fail, and a TensorRT runner that answers nonsense."""

from __future__ import annotations

import functools
import json
import os
import random
import shutil
import sys
from enum import Enum
from pathlib import Path
from typing import Any

from fuzz_base import NUMBERS, TEXTS, Case
from fuzz_files import odd_place
from fuzz_world import World

OUTPUTS = (
    "",
    ".",
    "full",
    "net.onnx/x",
    "no/such/folder/out",
    "x" * 300,
    "x" * 5000,
    "deep/" * 900 + "x",
    "/proc/nothing/out",
    "/dev/full/out",
    "loop/out",
    "loop",
    "to-full",
    "out\x1b[31m",
    "out[b]x",
    "ünïcødé",
    "out\nput",
    "-",
    "--",
    "~nobody/x",
    "a\x00b",
)


@functools.cache
def _commands() -> dict[tuple[str, ...], Any]:
    """Words of a command → the command, as the parser has it."""
    import typer

    from cp_debug.cli.main import app

    found: dict[tuple[str, ...], Any] = {}

    def collect(command: Any, words: tuple[str, ...]) -> None:
        if hasattr(command, "commands"):
            for name, child in command.commands.items():
                collect(child, (*words, name))
        else:
            found[words] = command

    collect(typer.main.get_command(app), ())
    return found


BASES: dict[tuple[str, ...], list[str]] = {
    ("bisect",): ["net.onnx", "-b", "ort,emu-tf32"],
    ("check",): ["net.onnx"],
    ("compare",): ["capture-a", "capture-b"],
    ("capture",): ["net.onnx", "-b", "ort"],
    ("report",): ["result"],
    ("bundle",): ["result"],
    ("eval",): ["net.onnx", "-n", "1", "--draws", "0"],
    ("verify",): ["net.onnx", "-s", "ort,emu-fp16", "--samples", "1", "--no-explain"],
    ("deploy",): ["deploy.yaml"],
    ("export",): ["net.onnx", "-o", "out"],
    ("build",): ["net.onnx", "-o", "out"],
    ("bench",): ["net.onnx", "-b", "ort", "-n", "1", "--warmup", "0"],
    ("quantize", "ptq"): ["net.onnx", "-o", "out", "--batches", "1"],
    ("quantize", "qat"): ["net.py:make", "--from", "x.npz", "-o", "out"],
    ("quantize", "sensitivity"): ["net.onnx", "-n", "1"],
    ("search",): ["net.onnx", "-b", "ort,emu-fp16", "--goal", "rel_l2<0.5"],
    ("sweep", "bisect"): ["nowhere.onnx", "-b", "ort,emu-fp16", "-n", "1", "--workers", "1"],
    ("sweep", "eval"): ["nowhere.onnx", "-n", "1", "--workers", "1"],
    ("sweep", "ablate"): ["nowhere.onnx", "-n", "1", "--workers", "1"],
    ("sweep", "sensitivity"): ["nowhere.onnx", "-n", "1", "--workers", "1"],
    ("sweep", "search"): ["nowhere.onnx", "-b", "ort,emu-fp16", "-n", "1", "--workers", "1"],
    ("demo",): ["no-such-fault"],
    ("models",): [],
    ("doctor",): [],
}
"""Arguments that are valid, or nearly, and cheap."""

_SLOW = {"--epochs", "--steps", "--draws", "--trt-python", "--cluster", "--samples", "--repeats", "--warmup", "--batch"}


def arguments(rng: random.Random, world: World, folder: Path) -> Case:
    """Any command with odd values for some of its options."""
    words = rng.choice(list(_commands()))
    _place(world, folder, words)
    argv = [*words, *BASES.get(words, [])]
    options = [p for p in _commands()[words].params if p.name != "help"]
    for option in rng.sample(options, min(len(options), rng.choice((0, 1, 1, 2, 3)))):
        kind = _kind(option)
        if option.param_type_name == "argument":
            if len(argv) > len(words):
                argv[len(words)] = _value("text", rng)
            continue
        name = rng.choice(option.opts)
        if getattr(option, "is_flag", False):
            argv.append(name)
        elif name == "--cluster":
            argv += [
                name,
                rng.choice(("", "x", "tcp://", "tcp://127.0.0.1:1", "inproc://x", "\x1b[31m", "tcp://x:99999")),
            ]
        else:
            argv += [name, _value(kind, rng, name in _SLOW)]
    if rng.random() < 0.1:
        argv.append(rng.choice(("--nothing", "-x", "extra", "--", *TEXTS)))
    in_file = [a.replace("\x00", "") for a in argv]
    process = rng.random() < 0.03
    writes = _writes(argv, words)
    return Case("arguments", [in_file if process else argv], writes, ascii=rng.random() < 0.2, subprocess=process)


def _kind(option: Any) -> str:
    """``integer``, ``float``, ``choice`` …, from whichever parser this version of Typer has."""
    if hasattr(option, "type"):
        return str(option.type.name)
    annotation = option.type_descriptor.annotation
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return "choice"
    return getattr(annotation, "__name__", "text")


def _value(kind: str, rng: random.Random, small: bool = False) -> str:
    texts = [text for text in TEXTS if not text.startswith("/proc")]
    if kind.startswith(("int", "float")):
        odd = ("nan", "inf", "-inf", "1e400", "-1", "0", "", "x", "1_000", "0x10", "٣", "1e3", " 5 ", "-0.0", "1e-320")
        if small:
            return rng.choice((*odd[:7], "1"))
        return rng.choice((*odd, *map(str, NUMBERS), "9" * 5000))
    if kind == "choice":
        return rng.choice((*texts, "AUTO", "none"))
    files = ("x.npz", "net.onnx", "net.py", "net.py:make", "fifo", "full", "loop", "no", "to-full", ".", "..", "/", "-")
    files = (*files, "~", "net.onnx,ort", "ort,torch,trt-fp16", "ort,ort", "emu-fp99", "@cpu", "ort@cuda:99999", ",")
    files = (
        *files,
        "x<1",
        "rel_l2<nan",
        "rel_l2<1e-3 and max_abs<0",
        "x:1x2:1x2:1x2",
        "x:1:1",
        "1h",
        "0s",
        "9" * 400 + "h",
    )
    files = (*files, "torch,ort", "torch@cpu,ort@cpu", "heatmap=x", "=1", "a=1e999", "car=5", "car=-1", "car=nan")
    return rng.choice((*texts, *files, *files))


def _writes(argv: list[str], words: tuple[str, ...]) -> list[str]:
    """Every value that could name an output, and where commands write without one."""
    usual = ["out", "capture", "bundle", "report.html", "annotated.onnx", "layers.parquet", "sweep.jsonl", "work"]
    usual += ["sweep.json", "sweep.csv", "sweep.html", "log.jsonl"]
    if words[0] == "sweep":
        usual += [str(Path(a).with_suffix(".jsonl")) for a in argv if a.endswith(".parquet")]
    named = [os.path.normpath(a) for a in argv[1:] if a and "\x00" not in a]
    return [*usual, *(n for n in named if n not in (".", ".."))]


def _place(world: World, folder: Path, words: tuple[str, ...]) -> None:
    files = world.files
    for name in ("net.onnx", "x.npz", "net.py"):
        shutil.copyfile(files / name, folder / name)
    os.mkfifo(folder / "fifo")
    (folder / "loop").symlink_to("loop")
    (folder / "to-full").symlink_to("/dev/full")
    (folder / "full").mkdir()
    (folder / "full" / "x").write_text("stays")
    if words == ("compare",):
        for source in world.captures:
            world.copy(source, folder)
    elif words[0] in ("report", "bundle"):
        world.copy(world.result, folder)
    elif words == ("deploy",):
        (folder / "deploy.yaml").write_text(json.dumps({"work_dir": "work", "model": "net.py:nothing"}))


def outputs(rng: random.Random, world: World, folder: Path) -> Case:
    """Outputs that cannot be written: folders, loops, names too long, a full disk."""
    made: tuple[tuple[tuple[str, ...], list[str]], ...] = (
        (("bisect",), ["net.onnx", "-b", "ort,emu-tf32", "--json", "@"]),
        (("bisect",), ["net.onnx", "-b", "ort,emu-tf32", "--csv", "@"]),
        (("bisect",), ["net.onnx", "-b", "ort,emu-tf32", "--html", "@"]),
        (("bisect",), ["net.onnx", "-b", "ort,emu-tf32", "--save", "@"]),
        (("capture",), ["net.onnx", "-b", "ort", "-o", "@"]),
        (("compare",), ["capture-a", "capture-b", "--json", "@"]),
        (("compare",), ["capture-a", "capture-b", "--csv", "@"]),
        (("report",), ["result", "-o", "@"]),
        (("report",), ["result", "-f", "onnx", "-o", "@"]),
        (("report",), ["result", "-f", "parquet", "-o", "@"]),
        (("report",), ["result", "-f", "markdown", "-o", "@"]),
        (("bundle",), ["result", "-o", "@"]),
        (("search",), ["net.onnx", "-b", "ort,emu-fp16", "--goal", "rel_l2<0.5", "--log", "@"]),
        (("search",), ["net.onnx", "-b", "ort,emu-fp16", "--goal", "rel_l2<0.5", "--onnx", "@"]),
        (("verify",), ["net.onnx", "-s", "ort,emu-fp16", "--samples", "1", "--junit", "@"]),
        (("bench",), ["net.onnx", "-b", "ort", "-n", "1", "--warmup", "0", "--json", "@"]),
        (("quantize", "ptq"), ["net.onnx", "--batches", "1", "-o", "@"]),
        (("export",), ["net.py:make", "-o", "@"]),
        (("sweep", "bisect"), ["net.onnx", "-b", "ort,emu-fp16", "-n", "1", "--workers", "1", "--log", "@.jsonl"]),
        (("sweep", "bisect"), ["nowhere.onnx", "-b", "ort,emu-fp16", "-n", "1", "--workers", "1", "-o", "@"]),
    )
    words, rest = rng.choice(made if rng.random() < 0.2 else made[:-3])
    _place(world, folder, words)
    limit = None
    target = rng.choice(OUTPUTS)
    if rng.random() < 0.25:
        target, limit = "out", rng.choice((0, 1, 100, 5000))
    argv = [*words, *(a.replace("@", target) for a in rest)]
    ending = ("jsonl",) if words[0] == "sweep" else ()
    path = os.path.normpath(target) if target else "out"
    writes = [] if path in (".", "..") else [path, *(f"{path}.{e}" for e in ending)]
    if words[0] == "sweep":
        writes.append("sweep.jsonl")
    return Case("outputs", [argv], writes, file_limit=limit, ascii=rng.random() < 0.1)


CALLABLES = (
    "",
    "make = 5",
    "def make(): return None",
    "def make(): return 1, 2",
    "def make(): raise ValueError('\\x1b[31mno\\n' * 50)",
    "def make(): raise SystemExit(0)",
    "def make(): raise SystemExit('bye')",
    "def make(): raise KeyboardInterrupt",
    "def make(): raise MemoryError",
    "def make(): return make()",
    "def make(a): return a",
    "import sys; sys.exit(0)",
    "raise KeyboardInterrupt",
    "import no_such_module_anywhere",
    "def make(:",
    "\x00",
    "\udcff",
    "class E(Exception):\n    def __str__(self): raise ValueError\ndef make(): raise E",
    "class B(BaseException): pass\ndef make(): raise B('x')",
    "import torch\ndef make(): return torch.nn.Linear(2, 2), ()",
    "import torch\ndef make(): return torch.nn.Linear(2, 2), None",
    "import torch\ndef make(): return torch.nn.Linear(2, 2), 5",
    "import torch\ndef make(): return torch.nn.Linear(2, 2), {'x': torch.ones(2)}",
    "import torch\ndef make(): return torch.nn.Linear(2, 2), {5: torch.ones(2)}",
    "import torch\ndef make(): return torch.nn.Linear(2, 2), (torch.ones(3),)",
    "import torch\ndef make(): return torch.nn.Linear(2, 2), (torch.ones(2), torch.ones(2))",
    "import torch\ndef make(): return torch.nn.Linear(2, 2), [['x']]",
    "import torch\ndef make(): return torch.nn.Linear(2, 2), (torch.ones(2, device='meta'),)",
    "import torch\ndef make(): return torch.nn.Linear(2, 2, device='meta'), (torch.ones(2),)",
    "import torch\ndef make(): return torch.nn.Identity(), (torch.ones(2),)",
    "import torch\ndef make(): return torch.nn.Identity(), (torch.ones(2, dtype=torch.complex64),)",
    "import torch\ndef make(): return torch.nn.Identity(), (torch.ones(2).to_sparse(),)",
    "import torch\ndef make(): return torch.nn.Identity(), (torch.ones(0, 3),)",
    "import torch\ndef make(): return torch.nn.Identity(), (torch.tensor(float('nan')),)",
    "import torch\ndef make(): return torch.nn.Module(), (torch.ones(2),)",
    "import torch\ndef make(): return torch.nn.Identity(), (torch.nested.nested_tensor([torch.ones(2)]),)",
    "import torch\nx = [torch.ones(1)]\nx.append(x)\ndef make(): return torch.nn.Identity(), (x,)",
    "class B(BaseException): pass\nraise B('x')",
    "import torch\ndef make(): return torch.nn.Linear, (torch.ones(2),)",
    *(
        f"import torch\nclass N(torch.nn.Module):\n    def forward(self, x): {body}\n"
        "def make(): return N(), (torch.ones(1, 2),)"
        for body in (
            "return None",
            "return 5",
            "return 'text'",
            "return {}",
            "return []",
            "return [[x], {'a': (x, None)}]",
            "return {5: x}",
            "return {'\\x1b[31m': x}",
            "return self.forward(x)",
            "return x.no_such()",
            "raise RuntimeError('\\x1b]0;t\\x07' + 'x\\n' * 100)",
            "raise SystemExit(0)",
            "raise KeyboardInterrupt",
            "return x.numpy()",
            "return x + torch.rand(2)",
            "return x > 0",
            "return x.sum() if x.sum() > 0 else x",
            "return x.to_sparse_csr()",
            "return torch.nested.nested_tensor([x])",
            "return torch.quantize_per_tensor(x, 0.1, 0, torch.qint8)",
            "return x.to_mkldnn()",
            "return x.to_sparse_csr().to_dense() + 1",
            "return torch.zeros(1 << 50)",
            "return x.to(torch.complex64)",
            "return x.expand(1 << 40, 1, 2)",
        )
    ),
)


def callables(rng: random.Random, world: World, folder: Path) -> Case:
    """Models of the user's own that fail while they are imported, made or run."""
    shutil.copyfile(world.files / "x.npz", folder / "x.npz")
    (folder / "own.py").write_text(rng.choice(CALLABLES), encoding="utf-8", errors="surrogatepass")
    name = rng.choice(("own.py:make", "own.py:make", "own.py:make", "own:make", "own.py:nothing", "own.py:__name__"))
    if rng.random() < 0.1:
        name = rng.choice(("os:getcwd", "json:loads", "sys:exit", "x" * 300 + ".py:a", ":", "a:b:c"))
    if rng.random() < 0.05:
        (folder / "own.py").unlink()
        odd_place(folder / "own.py", rng)
    commands = (
        ["check", name],
        ["bisect", name, "-b", "torch,torch-fp64"],
        ["capture", name, "-b", "torch", "-o", "out"],
        ["bench", name, "-b", "torch", "-n", "1", "--warmup", "0"],
        ["export", name, "-o", "out"],
        ["bisect", name, "-b", "torch,ort"],
        ["quantize", "ptq", name, "-o", "out", "--batches", "1"],
        ["search", name, "-b", "torch,emu-fp16"],
        ["verify", name, "-s", "torch,ort", "--samples", "1"],
    )
    argv = list(commands[min(int(rng.expovariate(0.5)), len(commands) - 1)])
    return Case("callables", [argv], ["out"], ascii=rng.random() < 0.1)


RUNNER = """
import importlib.util, json, math, os, random, sys
from pathlib import Path

sys.path[:0] = [{tests!r}, {fuzz!r}]
import fake_tensorrt
import fuzz_base
import numpy as np

spec = importlib.util.spec_from_file_location("trt_runner", sys.argv[1])
runner = importlib.util.module_from_spec(spec)
spec.loader.exec_module(runner)
runner.Cuda = fake_tensorrt.FakeCuda
sys.modules["tensorrt"] = fake_tensorrt.fake_tensorrt({version!r})
rng = random.Random({seed!r})
honest, left = runner.execute, [{after!r}]


def spoilt(result):
    kind = rng.randrange(8)
    tensors = [t for r in result.get("results", []) if isinstance(r, dict) for t in r.get("tensors", [])]
    if tensors and kind < 4:
        tensor = rng.choice(tensors)
        file = Path(tensor["file"])
        what = rng.randrange(9)
        if what == 0:
            file.unlink()
        elif what == 1:
            np.save(file, np.array([{{"a": 1}}], dtype=object), allow_pickle=True)
        elif what == 2:
            np.save(file, np.ones(rng.choice(((), (1,), (0,), (3, 1)))))
        elif what == 3:
            file.write_bytes(fuzz_base.damage(file.read_bytes(), rng))
        elif what == 4:
            tensor["file"] = rng.choice(("/etc/passwd", "../x", "", "/dev/zero", "a\\x00b", str({outside!r})))
        elif what == 5:
            np.save(file, np.array(["text"]))
        elif what == 6:
            np.save(file, np.load(file).astype(rng.choice(("f8", "i4", "c8", "?"))))
        elif what == 7:
            file.unlink()
            os.mkfifo(file)
        else:
            np.save(file, np.full_like(np.load(file), np.nan))
        return result
    if kind == 4:
        lists = [r["seconds"] for r in result.get("results", []) if isinstance(r, dict) and "seconds" in r]
        for times in lists:
            if isinstance(times, list):
                times[:] = rng.choice(([], times[:1], times * 2, [math.nan] * len(times), [-1.0] * len(times)))
        for r in result.get("results", []):
            if isinstance(r, dict) and "tensorrt" in r:
                r["tensorrt"] = rng.choice(("", "x", "10", "8.x", "99999.1"))
        return result
    return fuzz_base.mutated(result, rng)


def execute(job, emit):
    result = honest(job, emit)
    left[0] -= 1
    if left[0] > 0:
        return result
    kind = rng.randrange(12)
    if kind == 0:
        emit({{"event": "progress"}})
    elif kind == 1:
        emit({{"event": "progress", "phase": {{}}, "done": "x", "steps": None}})
    elif kind == 2:
        print(json.dumps({{"event": "log", "text": "\\x1b[31mred\\u202e"}}), flush=True)
        print("\\x1b[31m[b]lib" * 100, flush=True)
    elif kind == 3:
        print(json.dumps([1, {{"event": "step"}}]), '{{"event": "step"}}', '{{"event": 5}}', sep="\\n", flush=True)
    elif kind == 4:
        sys.exit(rng.choice((0, 1, 3, 139)))
    elif kind == 5:
        os.abort()
    elif kind == 6:
        odd = [math.nan, math.inf, 10**400, "x", [1], {{}}, None, -1, True, "\\x1b[2J"]
        fields = {{"phase": "p", "done": 1, "steps": rng.choice((0, 3)), "layer": 2, "layers": 5}}
        for field in rng.sample(sorted(fields), 2):
            fields[field] = rng.choice(odd)
        emit({{"event": "progress", **fields}})
    return spoilt(result)


runner.execute = execute
if {text!r} is not None:
    runner._write = lambda path, data: path.write_bytes({text!r})
sys.exit(runner.main(Path(sys.argv[2]), "--stay" in sys.argv))
"""


def runners(rng: random.Random, world: World, folder: Path) -> Case:
    """A Python named by ``--trt-python`` whose answers are wrong."""
    shutil.copyfile(world.files / "net.onnx", folder / "net.onnx")
    tests = Path(__file__).resolve().parents[1]
    texts = (None, None, None, None, None, b"", b"{", b"[]", b"null", b'{"results": []}', b'{"results": [[]]}')
    texts = (*texts, b'{"results": null}', b'{"results": [], "error": {}}', b'{"results": [], "error": 5}')
    texts = (*texts, b"[" * 100_000, b"\xff\xfe", b'{"results": [1e400, NaN]}', b'{"results": [{"tensors": 5}]}')
    text = RUNNER.format(
        tests=str(tests),
        fuzz=str(Path(__file__).resolve().parent),
        version=rng.choice(("10.3.0", "8.6.0", "10.12.0")),
        seed=rng.randrange(1 << 30),
        after=rng.choice((1, 1, 2, 2, 3)),
        outside=str(folder.parent / "outside" / "x"),
        text=rng.choice(texts),
    )
    (folder / "body.py").write_text(text)
    python = folder / "python"
    fake = f'[ "$1" = -c ] && exec {sys.executable} "$@"\nexec {sys.executable} {folder}/body.py "$@"\n'
    if rng.random() < 0.15:
        fake = rng.choice(
            ("exit 0\n", "exit 3\n", "echo cpdebug x y\n", "echo cpdebug 3 99999999999999\n", "yes | head -c 100000\n")
        )
        fake = rng.choice((fake, "printf '\\033[31m'\n", "kill -SEGV $$\n", "echo 'cpdebug 2 7'\n"))
    python.write_text(f"#!/bin/sh\n{fake}")
    python.chmod(0o755 if rng.random() < 0.95 else 0o644)
    backend = rng.choice(("trt-fp32", "trt-fp16", "trt-fp16"))
    trt = ["--trt-python", "./python"]
    commands = (
        ["bisect", "net.onnx", "-b", f"ort,{backend}", "--profile", "x:1x3x8x8:1x3x8x8:1x3x8x8", *trt],
        ["bisect", "net.onnx", "-b", f"ort,{backend}", "--probes", rng.choice(("all", "boundaries")), *trt],
        ["capture", "net.onnx", "-b", backend, "-o", "out", *trt],
        ["build", "net.onnx", "-o", "out", *trt],
        ["search", "net.onnx", "-b", f"ort,{backend}", "--goal", "rel_l2<1e-7", *trt],
    )
    return Case("runners", [list(rng.choice(commands))], ["out"], environment={"PYTHONDONTWRITEBYTECODE": "1"})
