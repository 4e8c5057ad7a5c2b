"""Files of ``cpdebug deploy``: YAML, TOML and AWML's Python, in shapes that parsers and readers do not expect."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

from fuzz_base import ANYTHING_NEW, TEXTS, Case, damage, mutated
from fuzz_files import odd_place
from fuzz_world import DEPLOY, World

FULL: dict[str, Any] = {
    **DEPLOY,
    "checkpoint": None,
    "export": {**DEPLOY["export"], "fold": True, "simplify": False, "onnx_dir": None},
    "components": {
        "Net": {
            "onnx_file": "net.onnx",
            "engine_file": "net.engine",
            "inputs": ["x"],
            "outputs": ["output"],
            "dynamic_axes": {"x": {"0": "batch"}},
            "profile": {"x": {"min": [1, 3, 8, 8], "opt": [1, 3, 8, 8], "max": [4, 3, 8, 8]}},
        }
    },
    "tensorrt": {"precision": "auto", "workspace_mib": 64, "python": None, "timing_cache": None, "keep_fp32": []},
    "data": {"path": None, "root": None, "sweeps": 0, "skip_missing": False, "first": 0},
    "verify": {"enabled": False, "samples": 1, "tolerances": {"fp32": 0.5}, "max_abs": 0.5, "scenarios": None},
}

YAML = (
    "",
    "# nothing\n",
    "null",
    "- a\n- b\n",
    "text",
    "42",
    "2026-01-01",
    "a: &a\n  b: *a\n",
    "&a [*a]",
    "model: &m {a: *m}\nwork_dir: work\n",
    "a: &a [x,x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b,*b,*b]\n"
    "d: &d [*c,*c,*c,*c,*c,*c,*c,*c,*c]\ne: &e [*d,*d,*d,*d,*d,*d,*d,*d,*d]\nf: &f [*e,*e,*e,*e,*e,*e,*e,*e,*e]\n"
    "g: &g [*f,*f,*f,*f,*f,*f,*f,*f,*f]\nmodel: *g\nwork_dir: work\n",
    "work_dir: !!python/object/apply:os.system ['touch ../outside/ran']",
    "work_dir: !!binary aGVsbG8=",
    "work_dir: !!set {a, b}",
    "work_dir: !!omap [a: 1]",
    "? {a: b}\n: c\n",
    "? [a, b]\n: c\n",
    "1: 2\nnull: 3\ntrue: 4\n",
    "work_dir: work\n2026-01-01: x\n",
    "work_dir: 2026-01-01T00:00:00Z\n",
    "work_dir: " + "9" * 10_000,
    "work_dir: 0x" + "f" * 10_000,
    "work_dir: 1:30:45:99:12\n",
    "work_dir: .inf\nmodel: .nan\n",
    "work_dir: work\nverify: {samples: " + "9" * 5000 + "}\n",
    "work_dir: work\nverify: {max_abs: 1" + "0" * 5000 + "}\n",
    "[" * 3000,
    "{a: " * 2000 + "1" + "}" * 2000,
    "- " * 2000 + "x",
    "a:\n" + "".join(" " * i + "a:\n" for i in range(1, 600)),
    "work_dir: a\x00b",
    "work_dir: \ufeffx\ufffe",
    'work_dir: "\\0"\nmodel: net.py:make\n',
    'work_dir: "\\e[31m"\nmodel: "\\e[31m"\n',
    "<<: *undefined",
    "<<: {<<: 3}",
    "--- a\n--- b\n",
    "%YAML 9.9\n---\na: b\n",
    "a: b: c: d",
    "\tx: 1",
    "a: 'unclosed",
    "work_dir: |\n  a\n  b\n",
)

TOML = (
    "",
    "work_dir = 2026-01-01",
    "work_dir = 2026-01-01T00:00:00Z",
    "work_dir = 12:00:00",
    "work_dir = " + "9" * 10_000,
    "work_dir = inf",
    "a = " + "[" * 3000,
    "a = " + "{a=" * 3000,
    "a." * 3000 + "b = 1",
    "[" + ".".join("a" * 3000) + "]",
    "work_dir = 'a\x00b'",
    'work_dir = "\\u0000"\nmodel = "net.py:make"\n',
    "work_dir = 'x'\nwork_dir = 'y'",
    "[[a]]\n[a]\n",
    "[verify]\nsamples = 1e400\n",
)

AWML = (
    "",
    "export = dict(mode='onnx', work_dir='work')",
    "a = 'x' * 10**12",
    "a = [0] * 10**12",
    "a = 1 << 64 << 64 << 64 << 64 << 64",
    "a = 10**10**10",
    "a = 9 * 9\n" + "a = a * a\n" * 60,
    "a = 1 << 64\n" + "a = a * a\n" * 40 + "b = f'{a}'\n",
    "a = 'xxxxxxxx'\n" + "a = f'{a}{a}'\n" * 40,
    "a = [1]\n" + "a = [a, a, a, a]\n" * 40 + "b = f'{a}'\n",
    "a = [1]\n" + "a = [a, a, a, a]\n" * 40 + "export = a\n",
    "a = dict(a=1)\n" + "a = dict(a=a, b=a, c=a)\n" * 40 + "model_io = a\n",
    "a = " + "-" * 5000 + "1",
    "a = " + "(" * 150 + "1" + ")" * 150,
    "a = " + "[" * 5000 + "]" * 5000,
    "a = " + "1+" * 20_000 + "1",
    "a = b" + ".c" * 5000,
    "a = 1" * 1 + "\nb = a[a[a[a]]]",
    "import os\nos.system('touch ../outside/ran')",
    "a = __import__('os').system('touch ../outside/ran')",
    "a = {[]: 1}",
    "a = {{}: 1}",
    "a = {{_base_.x}}",
    "_base_ = './awml.py'",
    "_base_ = ['../outside/x', '/etc/passwd']",
    "_base_ = '/dev/zero'",
    "_base_ = 'fifo'",
    "_base_ = 'a\\x00b'",
    "_base_ = " + repr("x" * 5000),
    "_base_ = ''",
    "_base_ = '.'",
    "_base_ = 5",
    "a = -'x'",
    "a = 1 / 0",
    "a = 1e308 * 1e308",
    "a = True + True",
    "a = 'x'.strip(5)",
    "a = b'x'",
    "a = ...",
    "a = 1j",
    "a = str(" + "9" * 5000 + ")",
    "a = f'{1:>1000000000}'",
    "a = f'{1!r:{2}}'",
    "a = lambda: 0",
    "a = [x for x in y]",
    "a = dict(**b)",
    "a = dict(a=1, a=2)",
    "a: int = 5",
    "a, b = 1, 2",
    "a = b = 1",
    "def f(): pass",
    "while True: pass",
    "a = 'x\x00y'",
    "\x00",
    "# -*- coding: nothing -*-\na = 1",
    "a = '\\ud800'",
    "a = '\\x1b[31m'\nexport = dict(mode=a)",
    "export = dict(mode='onnx', work_dir='../outside')",
    "export = dict(mode='onnx', work_dir='\\x00')",
    "checkpoint_path = 2 ** 70",
    "a = {'x': 1}['y']",
    "a = [1][5]",
    "a = [1]['x']",
    "a = [1, 2][0:1]",
    "a = (1).real",
    "print('hello')",
    "\tx = 1",
    "a = 0x" + "f" * 20_000,
    "a = " + "9" * 6000,
)


DEPLOYED = ("work", "engines", "report.html")
"""What ``deploy`` writes anew in every run, also one in which nothing is left to do: in the work folder that the
configuration names."""


def configuration(rng: random.Random, world: World, folder: Path) -> Case:
    """A deployment's configuration, for each command that takes one."""
    shutil.copyfile(world.files / "net.py", folder / "net.py")
    shutil.copyfile(world.files / "x.npz", folder / "x.npz")
    (folder / "fifo").unlink(missing_ok=True)
    os.mkfifo(folder / "fifo")
    kind = rng.randrange(10)
    name = rng.choice(("deploy.yaml", "deploy.yaml", "deploy.toml", "awml.py", "deploy.yml", "deploy.json"))
    path = folder / name
    if kind == 0:
        odd_place(path, rng)
    elif name.endswith("toml"):
        text = _toml(mutated(FULL, rng)) if kind < 6 else rng.choice(TOML)
        path.write_bytes(_text(text, rng))
    elif name.endswith("py"):
        text = rng.choice(AWML) if kind < 7 else _awml(world, rng)
        path.write_bytes(_text(text, rng))
    else:
        text = json.dumps(_configured(rng)) if kind < 7 else rng.choice(YAML)
        path.write_bytes(_text(text, rng))
    commands = (
        ["deploy", name],
        ["deploy", name, "--model", "net.py:make"],
        ["deploy", name, "--json", "-"],
        ["verify", name, "--samples", "1"],
        ["build", name, "-o", "engines"],
        ["bench", name, "-b", "torch", "-n", "1"],
        ["verify", name, "--model", "net.py:make", "--samples", "1"],
    )
    argv = list(rng.choice(commands[:3] if rng.random() < 0.7 else commands))
    return Case("deploy", [argv], [*DEPLOYED, ANYTHING_NEW])


def _configured(rng: random.Random) -> Any:
    document = mutated(FULL if rng.random() < 0.7 else DEPLOY, rng)
    if rng.random() < 0.25 and isinstance(document, dict):
        where = rng.choice(
            (
                ["work_dir"],
                ["components", "Net", "onnx_file"],
                ["export", "onnx_dir"],
                ["checkpoint"],
                ["tensorrt", "timing_cache"],
                ["tensorrt", "python"],
                ["data", "path"],
                ["model"],
                ["components", "Net", "engine_file"],
            )
        )
        text = rng.choice(
            (
                "../outside",
                "/etc/passwd",
                "/dev/full",
                "/dev/zero",
                "fifo",
                "a\x00b",
                "x" * 300,
                "",
                "net.py",
                "../outside/x",
                "net.py/x",
                "/proc/1/mem",
                "net.py:nothing",
                "nothing.py:make",
                "json:loads",
                *TEXTS,
            )
        )
        if where == ["work_dir"] and text.startswith("/") and "outside" in text:
            text = "elsewhere"  # an absolute path is asked for
        holder = document
        for key in where[:-1]:
            holder = holder.get(key, {}) if isinstance(holder, dict) else {}
        if isinstance(holder, dict):
            holder[where[-1]] = text
    return document


def _toml(document: Any) -> str:
    """Good enough for dictionaries of plain values: a table inline."""

    def value(item: Any) -> str:
        if isinstance(item, dict):
            return "{" + ", ".join(f"{json.dumps(str(k))} = {value(v)}" for k, v in item.items() if v is not None) + "}"
        if isinstance(item, list):
            return "[" + ", ".join(value(each) for each in item) + "]"
        if isinstance(item, (bool, str)):
            return json.dumps(item)
        return str(item)

    if not isinstance(document, dict):
        return value(document)
    return "\n".join(f"{json.dumps(str(key))} = {value(item)}" for key, item in document.items() if item is not None)


def _awml(world: World, rng: random.Random) -> str:
    """AWML's own settings, changed."""
    settings: dict[str, Any] = {
        "task_type": "detection3d",
        "checkpoint_path": None,
        "devices": {"cpu": "cpu", "cuda": "cuda:0"},
        "export": {"mode": "onnx", "work_dir": "work", "onnx_path": None},
        "components": {
            "net": {
                "name": "Net",
                "onnx_file": "net.onnx",
                "io": {"inputs": [{"name": "x"}], "outputs": [{"name": "output"}], "dynamic_axes": {"x": {0: "n"}}},
                "tensorrt_profile": {"x": {"min_shape": [1], "opt_shape": [1], "max_shape": [2]}},
            }
        },
        "runtime_io": {"info_file": None, "sample_idx": 0},
        "onnx_config": {"opset_version": 17, "do_constant_folding": True, "simplify": False},
        "tensorrt_config": {"precision_policy": "auto", "max_workspace_size": 1 << 30},
        "evaluation": {"enabled": False, "num_samples": 1},
        "verification": {"enabled": False, "num_verify_samples": 1, "tolerance": 0.1},
        "quantization": {"enabled": False, "skip_backbone_stages": [0]},
    }
    changed = mutated(settings, rng)
    if not isinstance(changed, dict):
        return f"export = {changed!r}"
    return "\n".join(f"{key} = {value!r}" for key, value in changed.items())


def _text(text: str, rng: random.Random) -> bytes:
    data = text.encode("utf-8", "surrogatepass")
    kind = rng.randrange(25)
    if kind == 0:
        return damage(data, rng)
    if kind == 1:
        return text.encode("utf-16", "surrogatepass")
    if kind == 2:
        return b"\xff" + data
    return data
