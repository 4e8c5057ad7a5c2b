"""Captures, saved results and logs: what cpdebug wrote, in other shapes."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

from fuzz_base import TEXTS, Case, damage, json_bytes, mutated
from fuzz_files import odd_place
from fuzz_world import World

PATHS = ("../outside/x", "/etc/passwd", "../../outside/x", "a\x00b", "x" * 300, "", ".", "/dev/zero", "manifest.json")


def captures(rng: random.Random, world: World, folder: Path) -> Case:
    """Two captures compared, one of them broken."""
    for source in world.captures:
        world.copy(source, folder)
    broken = folder / rng.choice(("capture-a", "capture-b"))
    manifest = broken / "manifest.json"
    kind = rng.randrange(8)
    if kind == 0:
        file = rng.choice(sorted(broken.glob("*.safetensors")))
        file.write_bytes(damage(file.read_bytes(), rng))
    elif kind == 1:
        file = rng.choice(sorted(broken.iterdir()))
        file.unlink()
        odd_place(file, rng)
    elif kind == 2:
        manifest.write_bytes(damage(manifest.read_bytes(), rng))
    else:
        document = json.loads(manifest.read_text())
        if rng.random() < 0.3:
            rng.choice(document["tensors"])["file"] = rng.choice(PATHS)
        else:
            document = mutated(document, rng)
        manifest.write_bytes(json_bytes(document, rng))
    if rng.random() < 0.1:
        shutil.rmtree(broken)
        odd_place(broken, rng)
    argv = ["compare", "capture-a", "capture-b", *rng.choice(([], ["--force"], ["--all"], ["--csv", "o.csv"]))]
    argv += rng.choice(([], [], ["--json", "-"], ["--rtol", "nan"], ["--json", "o.json"]))
    return Case("captures", [argv], ["o.csv", "o.json"])


def results(rng: random.Random, world: World, folder: Path) -> Case:
    """A saved result, shown and bundled."""
    world.copy(world.result, folder)
    file = folder / "result" / "result.json"
    kind = rng.randrange(10)
    if kind == 0:
        other = rng.choice([p for p in sorted((folder / "result").rglob("*")) if p.is_file()])
        other.write_bytes(damage(other.read_bytes(), rng))
    elif kind == 1:
        other = rng.choice([p for p in sorted((folder / "result").rglob("*")) if p.is_file()])
        other.unlink()
        odd_place(other, rng)
    else:
        document = json.loads(file.read_text())
        if kind in (2, 3):  # the layers' names and the findings' words
            test = document["tests"][0]
            for _ in range(3):
                row = rng.choice([*test["layers"], *test.get("findings", [])])
                text = [key for key, value in row.items() if isinstance(value, str)]
                row[rng.choice(text)] = rng.choice(TEXTS)
        elif kind == 4 and isinstance(document.get("programs"), dict):
            programs = document["programs"]
            programs[rng.choice(list(programs) or ["net"])] = rng.choice(PATHS)
            for test in document["tests"]:
                if isinstance(test.get("test_programs"), dict):
                    test["test_programs"][rng.choice(["net", "x"])] = rng.choice(PATHS)
        else:
            document = mutated(document, rng)
        file.write_bytes(json_bytes(document, rng) if kind != 2 else json.dumps(document).encode())
    report = rng.choice(("html", "markdown", "junit", "github", "onnx", "csv", "parquet"))
    ending = {"html": "html", "markdown": "md", "junit": "xml", "csv": "csv", "onnx": "onnx", "parquet": "parquet"}
    argv = ["report", rng.choice(("result", "result", "result/result.json")), "-f", report]
    if report != "github" and (rng.random() < 0.7 or report in ("html", "onnx", "parquet")):
        argv += ["-o", f"o.{ending[report]}"]
    if rng.random() < 0.25:
        argv = ["bundle", "result", "-o", rng.choice(("case", "case.zip"))]
        argv += rng.choice(([], ["--redact"], ["--layer", rng.choice(TEXTS)], ["--backend", rng.choice(TEXTS)]))
    writes = [*(f"o.{each}" for each in ending.values()), "case", "case.zip"]
    return Case("results", [argv], writes)


def logs(rng: random.Random, world: World, folder: Path) -> Case:
    """The logs of sweeps and searches that are gone on with, and the state of a deployment."""
    shutil.copyfile(world.files / "net.onnx", folder / "net.onnx")
    kind = rng.choice(("search", "search", "search", "sweep"))
    source = world.search_log if kind == "search" else world.sweep_log
    lines = source.read_bytes().splitlines()
    where = rng.randrange(5)
    if where == 0:
        data = damage(source.read_bytes(), rng)
    else:
        index = rng.randrange(len(lines))
        lines[index] = json_bytes(mutated(json.loads(lines[index]), rng), rng).replace(b"\n", b" ")
        data = b"\n".join(lines) + rng.choice((b"\n", b"\n", b"", b"\nx", b"\n\xff\n"))
    path = folder / source.name
    path.write_bytes(data)
    if rng.random() < 0.07:
        path.unlink()
        odd_place(path, rng)
    if kind == "search":
        argv = ["search", "net.onnx", "-b", "ort,emu-fp16", "--goal", "rel_l2<1e-5", "--log", source.name]
        return Case("logs", [argv], [source.name])
    argv = ["sweep", "bisect", "net.onnx", "-b", "ort,emu-fp16", "-n", "2", "--workers", "1", "--log", source.name]
    argv += ["--html", "o.html", "--csv", "o.csv"]
    return Case("logs", [argv], [source.name, "o.html", "o.csv", "dask-worker-space", "dask-scratch-space"])


def states(rng: random.Random, world: World, folder: Path) -> Case:
    """A deployment whose work folder was changed since."""
    world.copy(world.deployed, folder)
    for name in ("net.py", "deploy.yaml"):
        shutil.copyfile(world.files / name, folder / name)
    files = [p for p in sorted((folder / "work").rglob("*")) if p.is_file()]
    file = next(p for p in files if p.name == "deploy.json")
    if rng.random() < 0.7:
        file.write_bytes(json_bytes(mutated(json.loads(file.read_text()), rng), rng))
    else:
        other = rng.choice(files)
        other.write_bytes(damage(other.read_bytes(), rng))
        if rng.random() < 0.3:
            other.unlink()
            odd_place(other, rng)
    commands = (
        ["deploy", "deploy.yaml"],
        ["deploy", "deploy.yaml", "--json", "-"],
        ["verify", "net.py:make", "--onnx-dir", "work/onnx", "-s", "torch,ort", "--samples", "1"],
        ["bench", "net.py:make", "--onnx-dir", "work/onnx", "-b", "ort", "-n", "1"],
        ["build", "net.py:make", "--onnx-dir", "work/onnx", "-o", "work/engines"],
    )
    return Case("states", [list(rng.choice(commands))], ["work"])
