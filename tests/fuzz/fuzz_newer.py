"""Cases of newer commands and files: external data at odd places, huge attributes and weights, every key of a
deployment's schema, results of every command, ``diff``, ``import``, ``predict``, and the flags about inputs."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path
from typing import Any, get_args

import numpy as np
import onnx
from fuzz_base import ANYTHING_NEW, NUMBERS, TEXTS, Case, damage, json_bytes, mutated, odd_value
from fuzz_files import odd_place
from fuzz_world import World
from onnx import TensorProto, helper, numpy_helper

ENDS = (0, 1, 4, 63, 64, 4096, 1 << 31, (1 << 31) - 1, 1 << 32, 1 << 62, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)
SIZES = (0, 1, 3, 1 << 16, 1 << 31, 1 << 32, 1 << 40, (1 << 63) - 1, -1, -(1 << 63))


def external_data(rng: random.Random, world: World, folder: Path) -> Case:
    """Weights outside the file: offsets and lengths around its end, places that lead elsewhere, overlaps."""
    for name in ("net.onnx", "big.onnx", "big.bin", "x.npz"):
        shutil.copyfile(world.files / name, folder / name)
    data = (folder / "big.bin").read_bytes()
    model = onnx.load(str(folder / "big.onnx"), load_external_data=False)
    weights = [t for t in model.graph.initializer if t.external_data]
    for weight in rng.sample(weights, rng.choice((1, 1, 2, len(weights)))):
        entries = {entry.key: entry.value for entry in weight.external_data}
        for _ in range(rng.choice((1, 1, 2))):
            kind = rng.randrange(8)
            if kind == 0:
                around = rng.choice((*ENDS, len(data), len(data) - 1, len(data) + 1, -1, -len(data)))
                entries["offset"] = str(around)
            elif kind == 1:
                around = rng.choice((*ENDS, len(data) + 1, -1, 4 + rng.choice((len(data), 1 << 20))))
                entries["length"] = str(around)
            elif kind == 2:
                entries[rng.choice(("offset", "length"))] = rng.choice(
                    ("", "+4", "4.0", "0x10", "1_0", "٤", " 4", "4\n")
                )
            elif kind == 3:
                entries["location"] = rng.choice(_places(folder))
            elif kind == 4:
                entries.pop(rng.choice(("offset", "length", "location")), None)
            elif kind == 5:
                weight.dims[:] = [rng.choice(SIZES) for _ in range(rng.choice((1, 2, 4, 40)))]
            elif kind == 6:
                weight.data_type = rng.choice((0, 2, 8, 9, 11, 15, 16, 17, 21, 22, 23, 24, 99, -1))
            else:
                weight.raw_data = b"\0" * 16  # and external
        del weight.external_data[:]
        for key, value in entries.items():
            for _ in range(rng.choice((1, 1, 1, 1, 2))):
                weight.external_data.add(key=key, value=value)
    if rng.random() < 0.15:
        (folder / "big.bin").write_bytes(data[: rng.choice((0, 1, len(data) // 2))])
    (folder / "big.onnx").write_bytes(model.SerializeToString())
    return _read(rng, "big.onnx", "external data")


def _places(folder: Path) -> list[str]:
    """Names of places for data, some of which are made: links, folders, pipes."""
    outside = folder.parent / "outside"
    for name, target in (("link.bin", "../outside/x"), ("loop.bin", "loop.bin"), ("same.bin", "big.bin")):
        if not os.path.lexists(folder / name):
            (folder / name).symlink_to(target)
    (folder / "sub").mkdir(exist_ok=True)
    if not (folder / "pipe.bin").exists():
        os.mkfifo(folder / "pipe.bin")
    return ["link.bin", "loop.bin", "same.bin", "sub", "sub/../big.bin", "pipe.bin", str(outside / "x"), "big.onnx",
            "big.bin/", "BIG.BIN", "/dev/stdin", "/proc/self/environ", *TEXTS]  # fmt: skip


def huge(rng: random.Random, world: World, folder: Path) -> Case:
    """Attributes of a million entries, weights that claim to be endless, graphs with endless lists."""
    model = onnx.ModelProto()
    model.CopyFrom(world.net)
    graph = model.graph
    for _ in range(rng.choice((1, 1, 2))):
        node = rng.choice(graph.node)
        kind = rng.randrange(11)
        if kind == 0:
            node.attribute.append(helper.make_attribute("pads", [rng.choice((0, 1, 1 << 40))] * 300_000))
        elif kind == 1:
            node.attribute.append(helper.make_attribute(rng.choice(("auto_pad", "mode", "x")), "y" * 2_000_000))
        elif kind == 2:
            node.attribute.append(helper.make_attribute("x", [b"z" * 10] * 100_000))
        elif kind == 3:
            node.doc_string = "d" * 5_000_000
        elif kind == 4:
            dims = [rng.choice(SIZES) for _ in range(rng.choice((1, 2, 5)))]
            graph.initializer.append(TensorProto(name="w9", data_type=rng.choice((1, 7, 8, 9, 16, 22)), dims=dims))
            graph.node.append(helper.make_node("Identity", ["w9"], ["u9"], name="uses w9"))
        elif kind == 5:
            weight = rng.choice(graph.initializer)
            weight.dims[:] = [rng.choice(SIZES) for _ in range(rng.choice((1, 4, 2000)))]
        elif kind == 6:
            for name in ("kernel_shape", "strides", "dilations", "group", "output_shape", "epsilon"):
                if rng.random() < 0.5:
                    value: Any = rng.choice(((1 << 31, 1 << 31), (-1, -1), (0, 0), (1 << 62,), 1 << 62, 1e38, ()))
                    made = helper.make_attribute(name, value) if value != () else onnx.AttributeProto(name=name, type=7)
                    node.attribute.append(made)
        elif kind == 7:
            shape = graph.input[0].type.tensor_type.shape
            shape.dim[rng.randrange(4)].dim_value = rng.choice(SIZES)
        elif kind == 8:
            wanted = np.array([rng.choice(SIZES) for _ in range(rng.choice((1, 2, 3)))], np.int64)
            graph.initializer.append(numpy_helper.from_array(wanted, "wanted"))
            operator = rng.choice(("Expand", "Reshape", "Tile", "ConstantOfShape", "Resize", "Pad", "OneHot", "Range"))
            fed = ["wanted"] if operator == "ConstantOfShape" else ["y", "wanted"]
            graph.node.append(helper.make_node(operator, fed, ["large"], name="large"))
            graph.output.append(onnx.ValueInfoProto(name="large"))
        elif kind == 9:
            graph.node.extend([helper.make_node("Identity", ["x"], [f"v{i}"]) for i in range(3000)])
        else:
            for index in range(2000):
                graph.output.append(onnx.ValueInfoProto(name=rng.choice(("y", f"o{index}", "x"))))
    (folder / "big.onnx").write_bytes(model.SerializeToString())
    for name in ("net.onnx", "x.npz"):
        shutil.copyfile(world.files / name, folder / name)
    return _read(rng, "big.onnx", "huge")


def _read(rng: random.Random, name: str, kind: str) -> Case:
    """One of the commands that read a graph, the newer ones more often."""
    pair = rng.choice(("ort,emu-fp16", "emu-fp32,ort", "ort,ort-all"))
    commands = (
        (["bisect", name, "-b", pair, *_reading(rng)], ()),
        (["bisect", "net.onnx", name], ()),
        (["diff", name, "net.onnx", "--json", "o.json"], ("o.json",)),
        (["predict", name, "--target", rng.choice(("trt-8.6", "trt-10", "trt-11")), *_reading(rng)], ()),
        (["check", name, *_reading(rng)], ()),
        (["check", name, "--no-activations", "--json"], ()),
        (["import", "x.npz", "--model", name, "-o", "out"], ("out",)),
        (["quantize", "ptq", name, "-o", "out", "--batches", "1"], ("out",)),
        (["search", name, "-b", "ort,emu-fp16", "--goal", "rel_l2<1e-4", "--onnx", "o.onnx"], ("o.onnx",)),
        (["capture", name, "-b", "ort", "-o", "out", *_reading(rng)], ("out",)),
        (["verify", name, "-s", "ort,emu-fp16", "--samples", "1"], ()),
    )
    argv, writes = rng.choice(commands)
    return Case(kind, [list(argv)], writes)


def _reading(rng: random.Random) -> list[str]:
    """Flags about inputs: sizes of free axes, and how images are read."""
    sizes = ("1x3x8x8", "2x3x8x8", "0x3x8x8", "1x3x9x9", "1x3x8", "999999999x3x8x8", "1x3x8x8x8", "", "axb", "-1x3x8x8")
    flags: list[str] = []
    for _ in range(rng.choice((0, 0, 0, 1, 1, 2))):
        name = rng.choice(("x", "x", "x", "y", "", *TEXTS[:20]))
        flags += ["--shape", f"{name}={rng.choice(sizes)}"]
    if rng.random() < 0.15:
        flags += ["--inputs", rng.choice(("x.npz", "x.png", "no.npz", "."))]
    if rng.random() < 0.15:
        means = [f"mean={mean}" for mean in ("1,2,3", "1,2", "nan", "", "x")]
        flags += ["--image", rng.choice((*means, "std=0", "scale=1e-320", "order=bgr", "layout=nhwc"))]
    return flags


def schema(rng: random.Random, world: World, folder: Path) -> Case:
    """A deployment's file made from the schema itself, so that every key is there, with right, odd and wrong values."""
    import yaml

    from cp_debug.deploy.schema import DeployConfig

    for name in ("net.py", "net.onnx", "x.npz"):
        shutil.copyfile(world.files / name, folder / name)
    document = _section(DeployConfig, rng)
    document["model"] = rng.choice(("net.py:make", "net.onnx", "net.onnx", "centerpoint:tiny", *TEXTS[:10]))
    document["work_dir"] = rng.choice(("work", "work", "work", ".", "..", *TEXTS[:6]))
    document.setdefault("evaluate", {"enabled": False})
    if rng.random() < 0.3:
        document = mutated(document, rng)
    try:
        text = yaml.safe_dump(document, allow_unicode=True)
    except (yaml.YAMLError, ValueError, RecursionError):
        text = json.dumps(document)
    ways: tuple[tuple[str, str], ...] = (
        ("verify:", "verify: &v\n  <<: *v"),
        ("tensorrt:", "tensorrt: &t {a: *t}\nignored:"),
        ("model: ", "model: 2026-11-22 #"),
        ("work_dir: ", "work_dir: 12:30:45 #"),
        ("samples: ", "samples: 0o17 #"),
        ("enabled: ", "enabled: yes #"),
        ("work_dir: ", "work_dir: &w work\ncheckpoint: *w\nx_"),
        ("quantization:", "? quantization\n:"),
    )
    if rng.random() < 0.4:
        text = text.replace(*rng.choice(ways), 1)
    (folder / "deploy.yaml").write_bytes(text.encode("utf-8", "surrogatepass"))
    commands = (
        ["deploy", "deploy.yaml"],
        ["deploy", "deploy.yaml", "--fresh", "--json", "o.json", "--html", "o.html"],
        ["verify", "deploy.yaml", *rng.choice(([], ["--voxels", "x.npz"], ["--onnx-dir", "."], ["-s", "ort,ort"]))],
        ["build", "deploy.yaml", "-o", "engines"],
        ["bench", "deploy.yaml", "-b", "ort", "-n", "1", *_reading(rng)],
    )
    return Case("schema", [list(rng.choice(commands))], ["work", "engines", "o.json", "o.html", ANYTHING_NEW])


def _section(model: Any, rng: random.Random) -> dict[str, Any]:
    """Some keys of a section, each with a value of its type, an odd one, or none."""
    made: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        if rng.random() < 0.45:
            continue
        made[name] = odd_value("x", rng) if rng.random() < 0.08 else _of_type(field.annotation, rng)
    return made


def _of_type(kind: Any, rng: random.Random, depth: int = 0) -> Any:
    options = get_args(kind)
    if hasattr(kind, "model_fields"):
        return _section(kind, rng)
    if kind is bool:
        return rng.choice((True, False))
    if kind in (int, float):
        return rng.choice((1, 2, 17, 0.5, *NUMBERS[:6]))
    if kind in (str, Path) or str(kind).endswith("Path"):
        return rng.choice(("x.npz", "net.onnx", "work/x", "a", "torch", "ort", "trt-fp16", "Net", *TEXTS[:20]))
    if "Literal" in str(kind) and options and not any(hasattr(o, "__origin__") for o in options):
        return rng.choice([o for o in options if o is not type(None)])
    if options and depth < 6:
        origin = getattr(kind, "__origin__", None)
        if origin is list:
            return [_of_type(options[0], rng, depth + 1) for _ in range(rng.choice((0, 1, 3)))]
        if origin is dict:
            return {str(_of_type(options[0], rng, depth + 1)): _of_type(options[1], rng, depth + 1)
                    for _ in range(rng.choice((0, 1, 2)))}  # fmt: skip
        return _of_type(rng.choice([o for o in options if o is not type(None)] or [str]), rng, depth + 1)
    return rng.choice((None, 1, "x", [1, 3, 8, 8]))


def saved(rng: random.Random, world: World, folder: Path) -> Case:
    """A result of any command, changed, before everything that reads results."""
    kinds = world.documents
    name = rng.choice(sorted(kinds))
    document = json.loads(kinds[name].read_text())
    if rng.random() < 0.9:
        document = mutated(document, rng)
    (folder / "a.json").write_bytes(json_bytes(document, rng))
    other = kinds[rng.choice((name, name, rng.choice(sorted(kinds))))]
    shutil.copyfile(other, folder / "b.json")
    if rng.random() < 0.04:
        (folder / "a.json").unlink()
        odd_place(folder / "a.json", rng)
    form = rng.choice(("html", "markdown", "junit", "github", "csv"))
    pair = ["a.json", "b.json"] if rng.random() < 0.6 else ["b.json", "a.json"]
    commands = (
        ["diff", *pair, *rng.choice(([], ["--html", "o.html"], ["--json", "-"], ["--factor", "1"]))],
        ["diff", *pair, "--html", "o.html", "--json", "o.json"],
        ["report", "a.json", "-f", form, "-o", "o.html"],
        ["report", "a.json", "-f", form],
        ["bundle", "a.json", "-o", "case", "--seconds", "1"],
    )
    return Case("saved", [list(rng.choice(commands))], ["o.html", "o.json", "case", "report.html", "layers.csv"])


def imported(rng: random.Random, world: World, folder: Path) -> Case:
    """``import``: dumps of other runtimes with sidecars that lie, names that attack, pairs that are none."""
    for name in ("net.onnx", "other.onnx", "x.npz"):
        shutil.copyfile(world.files / name, folder / name)
    dump = folder / "dump"
    dump.mkdir()
    random_numbers = np.random.default_rng(rng.randrange(50))
    for name, shape in (("c1", (1, 4, 8, 8)), ("y", (1, 4, 4, 4)), ("z", (1, 4)), ("x", (1, 3, 8, 8))):
        array = random_numbers.standard_normal(shape).astype(rng.choice(("f4", "f4", "f2", "i1")))
        file = dump / f"{name}.{rng.choice(('bin', 'raw'))}"
        file.write_bytes(array.tobytes()[: rng.choice((None, None, None, 3, 0))])
        sidecar: Any = {"name": rng.choice((name, name, *TEXTS)), "dtype": array.dtype.name, "shape": list(shape)}
        if rng.random() < 0.3:
            sidecar[rng.choice(list(sidecar))] = rng.choice(
                ("float128", "object", "<f4", [1 << 40, 1 << 40], [-1], *ENDS)
            )
        if rng.random() < 0.2:
            sidecar = mutated(sidecar, rng)
        Path(f"{file}.json").write_bytes(json_bytes(sidecar, rng))
    if rng.random() < 0.2:
        victim = rng.choice(sorted(dump.iterdir()))
        victim.write_bytes(damage(victim.read_bytes(), rng))
    argv = ["import", "dump", "--model", "net.onnx", "-o", "out"]
    for _ in range(rng.choice((0, 0, 1, 2))):
        argv += ["--map", rng.choice(("y=z", "z=y", "y=y", "c1=x", "y=", "=y", "y", "a=b=c", f"y={rng.choice(TEXTS)}"))]
    argv += rng.choice(
        ([], ["--layout", "nhwc"], ["--precision", rng.choice(("fp16", "fp8", "int8", ""))], ["--json", "-"])
    )
    again = rng.choice(([], ["bisect", "net.onnx", "--test-tensors", "out"], ["compare", "out", "out"]))
    return Case("imported", [argv, again] if again else [argv], ["out"])
