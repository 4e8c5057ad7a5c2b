"""Cases beyond single broken files: any field of an ONNX file by reflection, functions and nested graphs, logs whose
checksums are right, files beside a model, numbers and small languages of options, clouds that are not finite."""

from __future__ import annotations

import json
import random
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from fuzz_arguments import BASES, _commands, _kind, _place, _writes
from fuzz_base import NUMBERS, SPECIAL, TEXTS, Case, damage, json_bytes, mutated
from fuzz_files import odd_place
from fuzz_onnx import commands
from fuzz_world import World
from onnx import TensorProto, helper, numpy_helper

HOSTILE_NUMBERS = (
    "nan",
    "inf",
    "-inf",
    "1e400",
    "-1",
    "-1e-300",
    "0",
    "1e308",
    "1e-320",
    str(2**31),
    str(2**63),
    "9" * 30,
)


def numeric_options() -> list[tuple[tuple[str, ...], str]]:
    """(words of a command, option) of every option that takes a number."""
    found = []
    for words, command in sorted(_commands().items()):
        for option in command.params:
            if option.param_type_name == "option" and _is_number(option):
                found.append((words, max(option.opts, key=len)))
    return found


def _is_number(option: Any) -> bool:
    if hasattr(option, "type_descriptor"):
        return any(kind in str(option.type_descriptor.annotation) for kind in ("int", "float"))
    return _kind(option).startswith(("int", "float"))


def numbers(rng: random.Random, world: World, folder: Path) -> Case:
    """Every option that takes a number, with numbers that are none, negative, huge or nearly nothing."""
    words, option = rng.choice(numeric_options())
    _place(world, folder, words)
    argv = [*words, *BASES.get(words, []), option, rng.choice(HOSTILE_NUMBERS)]
    if option == "--max-abs" or option == "--tolerance":
        argv.append("--no-explain")
    return Case("numbers", [argv], _writes(argv, words))


GRAMMAR: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "--map": (("bisect",), ("y=y", "=", "y=", "=y", "y=z=y", "net/y=y", "y==y", "z=y", "y=nothing", "a/b/c=d")),
    "--goal": (
        ("search",),
        (
            "rel_l2<",
            "<1",
            "rel_l2",
            "rel_l2<1e999",
            "rel_l2<-1",
            "rel_l2<nan",
            "boxes_lost==0.5",
            "boxes_lost==0",
            "rel_l2<1 and",
            "and and and",
            "rel_l2 < 0x10",
            "rel_l2<1,max_abs<1",
            "map_drop<0.1",
            "rel_l2>1",
            "rel_l2=<1",
        ),
    ),
    "--budget": (
        ("search",),
        ("1", "1s", "0", "-1s", "1h2m", "1e3s", "inf", "nan", "1d", "9" * 400 + "s", "0.0000001s", "٣s"),
    ),
    "--tolerance": (
        ("verify",),
        ("y=1e-3", "y=", "=1", "y=nan", "y=inf", "y=-1", "y=0", "y@fp16=1", "fp16=1", "y@=1", "nothing=1", "y@x=1"),
    ),
    "--scenario": (
        ("verify",),
        ("ort,ort", "ort", "", ",", "ort,ort-all", "ort,,ort-all", "ort@,ort", "ort@cpu:1,ort-all", "ort@cuda:-1,ort"),
    ),
    "--range": (
        ("eval",),
        ("model", "nuscenes", "5", "0", "-5", "nan", "inf", "car=1", "car=", "car=1,car=2", "x=1", ","),
    ),
    "--profile": (
        ("build",),
        (
            "x:1x3x8x8:1x3x8x8:1x3x8x8",
            "x:0x0:1x1:2x2",
            "x:1:1:1",
            ":::",
            "x:ax:b:c",
            "x:9x3:1x3:1x3",
            "x:" + "9" * 30 + ":1:1",
        ),
    ),
    "--keep-fp32": (("bisect",), ("conv1", "conv", "*", "", "net/conv1", "c1", "nothing")),
    "--skip-layers": (("bisect",), ("*", "conv1", "[", "[!", "**", "", "nothing*", "c[o")),
    "--backends": (
        ("bisect",),
        (
            "ort,",
            ",ort",
            "ort;ort",
            "ort,ort",
            "ort-fp16,ort",
            "ORT,ort",
            "ort@cpu@cpu,ort",
            "emu-,ort",
            "trt,ort",
            "torch,ort",
            "-b",
            "ort ,ort-all",
            "ort\n,ort-all",
            "emu-fp16,emu-bf16,emu-int8,ort-all",
            "emu-fp99,ort",
            "ort@gpu,ort-all",
        ),
    ),
}


def grammar(rng: random.Random, world: World, folder: Path) -> Case:
    """Options that have a small language of their own."""
    option = rng.choice(list(GRAMMAR))
    words, texts = GRAMMAR[option]
    _place(world, folder, words)
    base = list(BASES[words])
    if option == "--skip-layers":
        base = ["net.onnx", "-b", "ort,ort-int8"]
    if option == "--keep-fp32":
        base = ["net.onnx", "-b", "ort,emu-fp16"]
    if option in ("--backends", "--scenario"):
        base = ["net.onnx"] + (["--samples", "1", "--no-explain"] if option == "--scenario" else [])
    text = rng.choice(texts)
    if rng.random() < 0.3:
        text = rng.choice((text + rng.choice(TEXTS), rng.choice(TEXTS) + text, text * 50)).replace("\x00", "")
    argv = [*words, *base, option, text]
    return Case("grammar", [argv], _writes(argv, words), ascii=rng.random() < 0.1)


def reflect(message: Any, rng: random.Random, room: list[Any] | None = None) -> None:
    """Change a random field of a protobuf message, or of one inside it, to what its type allows."""
    places: list[Any] = []
    collect(message, places, 0)
    holder = rng.choice(places)
    field = rng.choice(holder.DESCRIPTOR.fields)
    repeated = field.is_repeated if hasattr(field, "is_repeated") else field.label == field.LABEL_REPEATED
    kind = field.cpp_type
    if repeated:
        values = getattr(holder, field.name)
        what = rng.randrange(4)
        if what == 0 or not len(values):
            if kind == field.CPPTYPE_MESSAGE:
                added = values.add()
                others = [p for p in places if p.DESCRIPTOR is added.DESCRIPTOR and p is not added]
                if others and rng.random() < 0.7:
                    added.CopyFrom(_own(rng.choice(others)))
            else:
                values.append(_scalar(field, rng))
        elif what == 1:
            del values[rng.randrange(len(values))]
        elif what == 2 and kind != field.CPPTYPE_MESSAGE:
            values[rng.randrange(len(values))] = _scalar(field, rng)
        elif kind == field.CPPTYPE_MESSAGE:
            copied = _own(rng.choice(values))
            values.add().CopyFrom(copied)
        else:
            values.extend([_scalar(field, rng)] * rng.choice((1, 3, 100)))
    elif kind == field.CPPTYPE_MESSAGE:
        own = getattr(holder, field.name)
        others = [p for p in places if p.DESCRIPTOR is own.DESCRIPTOR and p is not holder]
        if rng.random() < 0.5 and holder.HasField(field.name):
            holder.ClearField(field.name)
        elif others:
            copied = _own(rng.choice(others))
            own.CopyFrom(copied)
        else:
            own.SetInParent()
    elif rng.random() < 0.15:
        holder.ClearField(field.name)
    else:
        setattr(holder, field.name, _scalar(field, rng))


def _own(message: Any) -> Any:
    """A copy: protobuf must not read a message while it writes into one inside it."""
    copied = type(message)()
    copied.CopyFrom(message)
    return copied


def collect(message: Any, places: list[Any], depth: int) -> None:
    """The message and all inside it."""
    places.append(message)
    if depth > 12:
        return
    for field, value in message.ListFields():
        if field.cpp_type == field.CPPTYPE_MESSAGE:
            repeated = field.is_repeated if hasattr(field, "is_repeated") else field.label == field.LABEL_REPEATED
            for each in list(value) if repeated else [value]:
                collect(each, places, depth + 1)


def _scalar(field: Any, rng: random.Random) -> Any:
    kind = field.cpp_type
    if kind in (field.CPPTYPE_FLOAT, field.CPPTYPE_DOUBLE):
        return rng.choice((0.0, -1.0, 1e30, 1e-30, *SPECIAL))
    if kind == field.CPPTYPE_STRING:
        if field.type == field.TYPE_BYTES:
            return rng.choice((b"", b"\xff\xfe", rng.randbytes(rng.choice((1, 3, 4, 16, 1000)))))
        names = (
            "x",
            "y",
            "z",
            "c1",
            "r1",
            "w1",
            "w2",
            "flag",
            "shape",
            "b1",
            "n1",
            "Conv",
            "Relu",
            "If",
            "Add",
            "MatMul",
        )
        ops = (
            "Reshape",
            "Loop",
            "Scan",
            "Concat",
            "Slice",
            "Gather",
            "Resize",
            "TopK",
            "NonZero",
            "LSTM",
            "Einsum",
            "Cast",
        )
        more = (
            "Expand",
            "Tile",
            "Pad",
            "OneHot",
            "Range",
            "ConstantOfShape",
            "EyeLike",
            "Split",
            "QuantizeLinear",
            "Dropout",
        )
        return rng.choice((*names, *names, *ops, *more, *(t for t in TEXTS if "\x00" not in t and len(t) < 300)))
    if kind == field.CPPTYPE_BOOL:
        return rng.random() < 0.5
    if kind == field.CPPTYPE_ENUM:
        return rng.choice(field.enum_type.values).number
    limit = 31 if kind in (field.CPPTYPE_INT32, field.CPPTYPE_UINT32) else 63
    numbers = [n for n in NUMBERS if isinstance(n, int) and -(2**limit) <= n < 2**limit]
    small = (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 13, 16, 17, 64)
    value = rng.choice((*numbers, *small, *small, *([-1, -2, -3] * 3)))
    return max(value, 0) if kind in (field.CPPTYPE_UINT32, field.CPPTYPE_UINT64) else value


def onnx_reflected(rng: random.Random, world: World, folder: Path) -> Case:
    """A file of which any field holds anything that its type allows."""
    model = onnx.ModelProto()
    model.CopyFrom(world.net if rng.random() < 0.5 else deep(rng))
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        reflect(model, rng)
    (folder / "bad.onnx").write_bytes(model.SerializeToString())
    for name in ("net.onnx", "x.npz", "big.bin"):
        shutil.copyfile(world.files / name, folder / name)
    told, writes = commands(rng, "bad.onnx")
    return Case("onnx reflected", told, writes)


def deep(rng: random.Random) -> onnx.ModelProto:
    """``x`` [1, 3, 8, 8] to ``y`` through a function, a Loop with an If inside, a Scan and a sparse constant."""
    weight = numpy_helper.from_array(np.eye(8, dtype=np.float32) / 2, "w")
    values = helper.make_tensor("sparse", 1, [3], [1.0, -2.0, 3.0])
    where = helper.make_tensor("where", 7, [3], [0, 5, 63])
    sparse = helper.make_sparse_tensor(values, where, [8, 8])
    twice = helper.make_function(
        "own",
        "Twice",
        ["a"],
        ["b"],
        [helper.make_node("Add", ["a", "a"], ["s"]), helper.make_node("Tanh", ["s"], ["b"])],
        [helper.make_opsetid("", 17)],
    )
    then = helper.make_graph([helper.make_node("Relu", ["v"], ["t"])], "then", [], [onnx.ValueInfoProto(name="t")])
    other = helper.make_graph(
        [helper.make_node("MatMul", ["v", "w"], ["e"])], "else", [], [onnx.ValueInfoProto(name="e")]
    )
    body = helper.make_graph(
        [
            helper.make_node("If", ["go"], ["u"], name="inner", then_branch=then, else_branch=other),
            helper.make_node("Identity", ["go"], ["on"]),
            helper.make_node("Twice", ["u"], ["v2"], domain="own", name="call"),
        ],
        "body",
        [
            helper.make_tensor_value_info("i", 7, []),
            helper.make_tensor_value_info("go", 9, []),
            helper.make_tensor_value_info("v", 1, None),
        ],
        [onnx.ValueInfoProto(name="on"), onnx.ValueInfoProto(name="v2")],
    )
    step = helper.make_graph(
        [helper.make_node("Add", ["h", "row"], ["h2"]), helper.make_node("Identity", ["h2"], ["out"])],
        "step",
        [helper.make_tensor_value_info("h", 1, None), helper.make_tensor_value_info("row", 1, None)],
        [onnx.ValueInfoProto(name="h2"), onnx.ValueInfoProto(name="out")],
    )
    nodes = [
        helper.make_node("Twice", ["x"], ["c1"], domain="own", name="twice"),
        helper.make_node("Loop", ["times", "flag", "c1"], ["r1"], name="loop", body=body),
        helper.make_node("Constant", [], ["sparse"], name="constant", sparse_value=sparse),
        helper.make_node("MatMul", ["r1", "sparse"], ["c2"], name="product"),
        helper.make_node("ReduceMean", ["c2"], ["z"], name="mean", axes=[1], keepdims=0),
        helper.make_node("Scan", ["h0", "z"], ["y", "all"], name="scan", body=step, num_scan_inputs=1),
    ]
    weights = [
        weight,
        numpy_helper.from_array(np.array(rng.choice((0, 1, 2)), np.int64), "times"),
        numpy_helper.from_array(np.array(rng.random() < 0.5), "flag"),
        numpy_helper.from_array(np.zeros((8, 8), np.float32), "h0"),
    ]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 8, 8])]
    graph = helper.make_graph(nodes, "deep", inputs, [onnx.ValueInfoProto(name=n) for n in ("y", "all", "z")], weights)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("own", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=9, functions=[twice])


def test_models(rng: random.Random, world: World, folder: Path) -> Case:
    """A sound model whose test is another, broken, renamed, of other shapes, with other files beside it."""
    model = onnx.ModelProto()
    model.CopyFrom(world.other_net)
    kind = rng.randrange(5)
    if kind == 0:
        for _ in range(rng.choice((1, 2, 3))):
            reflect(model, rng)
    elif kind == 1:
        names = rng.sample([t for t in TEXTS if t and "\x00" not in t], 3)
        for old, new in zip(("y", "z", "r1"), names, strict=True):
            _rename(model.graph, old, new)
    elif kind == 2:
        del model.graph.output[rng.randrange(2)]
    elif kind == 3:
        model = deep(rng)
    (folder / "worse.onnx").write_bytes(model.SerializeToString())
    for name in ("net.onnx", "x.npz"):
        shutil.copyfile(world.files / name, folder / name)
    if rng.random() < 0.4:
        manifest = json.dumps({"format": "cpdebug.alignment/1", "links": [{"onnx": "y", "torch": rng.choice(TEXTS)}]})
        data = json_bytes(mutated(json.loads(manifest), rng), rng)
        (folder / "worse.alignment.json").write_bytes(data)
    if rng.random() < 0.1:
        (folder / "worse.onnx").unlink()
        odd_place(folder / "worse.onnx", rng)
    pair = rng.choice(("ort,ort", "ort,emu-fp16", "emu-fp32,ort-all"))
    argv = ["bisect", "net.onnx", "-b", pair, "--test-model", "worse.onnx"]
    argv += rng.choice(
        ([], ["--inputs", "x.npz"], ["--map", "y=z"], ["--map", f"y={rng.choice(TEXTS)}".replace("\x00", "")])
    )
    told = [argv]
    if rng.random() < 0.4:
        argv += ["--save", "out", "--html", "o.html", "--csv", "o.csv"]
        told.append(rng.choice((["bundle", "out", "-o", "case"], ["report", "out", "-f", "markdown", "-o", "o.md"])))
    elif rng.random() < 0.2:
        told = [["search", "net.onnx", "-b", "ort,emu-int8", "--test-model", "worse.onnx", "--goal", "rel_l2<0.1"]]
    return Case("test models", told, ["out", "o.html", "o.csv", "o.md", "case"])


def _rename(graph: onnx.GraphProto, old: str, new: str) -> None:
    for node in graph.node:
        for values in (node.input, node.output):
            for index, value in enumerate(values):
                values[index] = new if value == old else value
    for info in (*graph.input, *graph.output):
        info.name = new if info.name == old else info.name


def sealed_logs(rng: random.Random, world: World, folder: Path) -> Case:
    """Logs whose lines were changed and whose checksums fit the change: what another version, or a person, wrote."""
    from cp_debug.reading import sealed

    shutil.copyfile(world.files / "net.onnx", folder / "net.onnx")
    search = rng.random() < 0.85
    source = world.search_log if search else world.sweep_log
    lines = source.read_text().splitlines()
    for _ in range(rng.choice((1, 1, 2))):
        index = rng.randrange(len(lines))
        document = json.loads(lines[index])
        document.pop("crc32", None)
        changed = mutated(document, rng)
        try:
            lines[index] = sealed(changed if isinstance(changed, dict) else {"x": changed})
        except (ValueError, TypeError, RecursionError):
            lines[index] = json.dumps(changed)
    if rng.random() < 0.2:
        rng.shuffle(lines)
    (folder / source.name).write_text("\n".join(lines) + "\n", errors="surrogatepass")
    if search:
        argv = ["search", "net.onnx", "-b", "ort,emu-fp16", "--goal", "rel_l2<1e-5", "--log", source.name]
        return Case("sealed logs", [argv], [source.name])
    argv = ["sweep", "bisect", "net.onnx", "-b", "ort,emu-fp16", "-n", "2", "--workers", "1", "--log", source.name]
    argv += ["--html", "o.html", "--csv", "o.csv", "--json", "o.json"]
    return Case("sealed logs", [argv], [source.name, "o.html", "o.csv", "o.json", "dask-scratch-space"])


def caches(rng: random.Random, world: World, folder: Path) -> Case:
    """What `quantize` and `export` leave behind, changed and used again."""
    for name in ("net.py", "net.onnx", "x.npz"):
        shutil.copyfile(world.files / name, folder / name)
    world.copy(world.quantized, folder)
    files = sorted(p for p in (folder / "int8").rglob("*") if p.is_file())
    file = rng.choice(files)
    text = file.suffix in (".json", ".cache", ".yaml", ".txt")
    if text and rng.random() < 0.6:
        try:
            file.write_bytes(json_bytes(mutated(json.loads(file.read_text()), rng), rng))
        except ValueError:
            lines = file.read_text(errors="replace").splitlines()
            index = rng.randrange(len(lines))
            name = lines[index].partition(":")[0]
            lines[index] = rng.choice(
                (f"{name}: {rng.choice(('zz', '7f800000', 'ffffffff', '0', ''))}", rng.choice(TEXTS))
            )
            file.write_text("\n".join(lines) + "\n", errors="surrogatepass")
    elif rng.random() < 0.8:
        file.write_bytes(damage(file.read_bytes(), rng))
    else:
        file.unlink()
        odd_place(file, rng)
    commands_ = (
        ["quantize", "ptq", "net.py:make", "-o", "out", "--cache", "int8"],
        ["quantize", "ptq", "net.py:make", "-o", "out", "--cache", f"int8/{file.relative_to(folder / 'int8')}"],
        ["quantize", "sensitivity", "net.py:make", "--from", "int8", "-n", "1"],
        ["bisect", "net.py:make", "-b", "torch,ort-int8", "--checkpoint", "int8"],
        ["eval", "net.py:make", "--checkpoint", "int8", "-n", "1"],
        ["verify", "net.py:make", "--onnx-dir", "int8", "-s", "torch,ort", "--samples", "1", "--no-explain"],
    )
    return Case("caches", [list(rng.choice(commands_))], ["out"])


def strange_values(rng: random.Random, world: World, folder: Path) -> Case:
    """Clouds and arrays that are empty, out of range, not finite or enormous: the files themselves are sound."""
    for name in ("net.onnx", "net.py"):
        shutil.copyfile(world.files / name, folder / name)
    value = rng.choice((np.nan, np.inf, -np.inf, 1e38, 1e30, -1e30, 1e-40, 0.0))
    if rng.random() < 0.6:
        x = np.random.default_rng(rng.randrange(100)).standard_normal((1, 3, 8, 8)).astype(np.float32)
        share = rng.choice((0.01, 0.5, 1.0))
        x[np.random.default_rng(0).random(x.shape) < share] = value
        np.savez(folder / "in.npz", x=x)
        model, source = rng.choice(("net.onnx", "net.py:make")), "in.npz"
    else:
        cloud = (
            np.random.default_rng(rng.randrange(100))
            .uniform(-20, 20, (rng.choice((0, 1, 2, 50)), 5))
            .astype(np.float32)
        )
        column = rng.randrange(5)
        cloud[: rng.choice((1, 3, 50)), column] = value
        if rng.random() < 0.3:
            cloud[:, :3] += rng.choice((1e3, 1e6, 1e38))
        name = rng.choice(("in.bin", "in.pcd.bin", "in.npy", "in.npz"))
        if name == "in.npy":
            np.save(folder / name, cloud)
        elif name == "in.npz":
            np.savez(folder / name, points=cloud)
        else:
            cloud.tofile(folder / name)
        model, source = "centerpoint:tiny", name
    reference = "ort" if model.endswith(".onnx") else "torch"
    test = (
        rng.choice(("ort", "emu-fp16", "emu-fp32", "ort-all"))
        if reference == "torch"
        else rng.choice(("emu-fp16", "emu-fp32"))
    )
    told = rng.choice(
        (
            ["bisect", model, "-b", f"{reference},{test}", "--inputs", source, "--json", "o.json", "--html", "o.html"],
            ["bisect", model, "-b", f"{reference},{test}", "--inputs", source],
            ["verify", model, "-s", f"{reference},{test}", "--inputs", source],
            ["capture", model, "-b", reference, "--inputs", source, "-o", "out"],
            ["search", model, "-b", f"{reference},emu-fp16", "--inputs", source, "--goal", "rel_l2<1e-4"],
            ["check", model, "--inputs", source],
            ["bench", model, "-b", reference, "--inputs", source, "-n", "1", "--warmup", "0"],
            ["quantize", "ptq", model, "--calib-data", source, "-o", "out"],
            ["bisect", model, "-b", f"{reference},ort-int8", "--inputs", source],
        )
    )
    return Case("strange values", [list(told)], ["o.json", "o.html", "out"])


def environments(rng: random.Random, world: World, folder: Path) -> Case:
    """Variables of the environment that commands read, with values that nobody expects."""
    shutil.copyfile(world.files / "net.onnx", folder / "net.onnx")
    name = rng.choice(
        ("CPDEBUG_TRT_PYTHON", "CPDEBUG_MMDET3D_PYTHON", "XDG_CACHE_HOME", "XDG_STATE_HOME", "COLUMNS", "TERM")
    )
    value = rng.choice(
        [t for t in TEXTS if "\x00" not in t] + ["/dev/full", "0", "1", "9" * 20, sys.executable, "net.onnx"]
    )
    told = rng.choice(
        (
            ["bisect", "net.onnx", "-b", "ort,emu-tf32"],
            ["bisect", "net.onnx", "-b", "ort,trt-fp16"],
            ["bisect", "mmdet3d:nothing"],
            ["doctor"],
            ["models"],
            ["bisect", "--help"],
        )
    )
    process = name in ("COLUMNS", "TERM")
    return Case("environments", [list(told)], environment={name: value}, subprocess=process and rng.random() < 0.3)
