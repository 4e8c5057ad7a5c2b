"""Cases that cross what is valid: ONNX's own node tests, pieces of two graphs put together, leaves of what commands
wrote exchanged one by one, a file of another kind in any option, and outputs that are what is read."""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from fuzz_arguments import BASES, _commands
from fuzz_base import ANYTHING_NEW, TEXTS, Case, damage, places
from fuzz_deploy import DEPLOYED
from fuzz_more import deep, reflect
from fuzz_onnx import EDITS
from fuzz_world import World
from onnx import helper, numpy_helper

PAIRS = ("ort,emu-fp16", "ort,emu-fp32", "emu-fp32,ort", "ort,ort-all", "ort,emu-bf16", "ort,ort-int8", "ort,emu-int8")
ODD: tuple[Any, ...] = (
    *(None, "", "text", [], {}, 0, -1, 2**63, 10**400, 1e308, float("nan"), float("inf"), True, False, -(2**63), 0.5),
    *("\x1b[31m", "Zq7[b]Zq7", "a\nb", "../../outside/x", [[]], [None], {"": None}, "x" * 5000, [1] * 1000, "1", "nan"),
    *(["x", "x"], {"a": {"b": 1}}, "\ud800", 1e-320),
)


@functools.cache
def node_tests() -> list[tuple[bytes, list[bytes], list[bytes]]]:
    """ONNX's own tests of operators: the model, its inputs and its outputs as protobufs."""
    from onnx.backend.test.case.node import collect_testcases

    found = []
    for test in collect_testcases(None):
        data = test.model.SerializeToString()
        if len(data) > 200_000 or not test.data_sets:
            continue
        given, expected = test.data_sets[0]
        with contextlib.suppress(Exception):  # a few hold what this version of the package cannot write
            inputs = [_protobuf(v, i.name) for v, i in zip(given, test.model.graph.input, strict=False)]
            outputs = [_protobuf(v, o.name) for v, o in zip(expected, test.model.graph.output, strict=False)]
            found.append((data, inputs, outputs))
    return found


def _protobuf(value: Any, name: str) -> bytes:
    if hasattr(value, "SerializeToString"):
        return value.SerializeToString()
    made = numpy_helper.from_list(value, name) if isinstance(value, list) else numpy_helper.from_array(value, name)
    return made.SerializeToString()


def _model(rng: random.Random, world: World) -> onnx.ModelProto:
    source = rng.choice(node_tests())[0] if rng.random() < 0.6 else rng.choice((world.net, deep(rng)))
    model = onnx.ModelProto()
    model.ParseFromString(source if isinstance(source, bytes) else source.SerializeToString())
    return model


def _lay(rng: random.Random, folder: Path) -> onnx.ModelProto:
    """Write one of the node tests as ``m.onnx`` and ``m2.onnx``, with its data in ``set``."""
    data, inputs, outputs = rng.choice(node_tests())
    place = folder / "set" / "test_data_set_0"
    place.mkdir(parents=True)
    for kind, tensors in (("input", inputs), ("output", outputs)):
        for index, tensor in enumerate(tensors):
            (place / f"{kind}_{index}.pb").write_bytes(tensor)
    for name in ("m.onnx", "m2.onnx"):
        (folder / name).write_bytes(data)
    model = onnx.ModelProto()
    model.ParseFromString(data)
    return model


def _told(rng: random.Random) -> list[list[str]]:
    pair = rng.choice(PAIRS)
    fed = rng.choice(([], [], ["--inputs", "set/test_data_set_0"]))
    form = rng.choice(("markdown", "junit", "github", "html", "onnx"))
    report = ["report", "o", "-f", form, *([] if form == "github" else ["-o", "r.x"])]
    commands: tuple[list[list[str]], ...] = (
        [["bisect", "m.onnx", "-b", pair, *fed, "--save", "o", "--html", "o.html", "--csv", "o.csv"], report],
        [["bisect", "m.onnx", "-b", pair, *fed, "--save", "o", "--html", "o.html"], ["diff", "o", "o"]],
        [["bisect", "m.onnx", "m2.onnx", "-b", "ort", *fed, "--save", "o"], report],
        [["bisect", "m2.onnx", "m.onnx", *fed, "--json", "o.json"]],
        [["check", "m.onnx", *fed]],
        [["predict", "m.onnx", *fed, *rng.choice(([], ["--precision", "bf16"], ["--target", "trt-8.6"]))]],
        [["capture", "m.onnx", "-b", pair.split(",")[1], *fed, "-o", "o"], ["compare", "o", "o", "--csv", "o.csv"]],
        [["import", "set/test_data_set_0", "--model", "m.onnx", "-o", "o"]],
        [["search", "m.onnx", "-b", "ort,emu-fp16", "--goal", "rel_l2<1e-5", *fed, "--log", "l.jsonl"]],
        [["verify", "m.onnx", "-s", pair, "--samples", "1", *fed]],
        [["bench", "m.onnx", "-b", "ort", "-n", "1", "--warmup", "0", *fed]],
        [["quantize", "ptq", "m.onnx", "-o", "o", "--batches", "1"]],
        [["diff", "m.onnx", "m2.onnx"]],
        [["bisect", "m.onnx", "-b", pair, "--shape", rng.choice(("x=1", "x=2x2", "x=1x3x8x8", "data=1x1"))]],
    )
    return rng.choice(commands)


WRITES = [ANYTHING_NEW, "o", "o.csv", "o.html", "o.json", "r.x", "l.jsonl"]


def node_test(rng: random.Random, world: World, folder: Path) -> Case:
    """One of ONNX's own node tests, as it is or changed, with its data, in any command that reads a graph."""
    model = _lay(rng, folder)
    for _ in range(rng.choice((0, 0, 1, 1, 2, 3))):
        # These edits are written for one network, and each of them supposes something that others lack.
        with contextlib.suppress(IndexError, ValueError, KeyError, TypeError, AttributeError, OverflowError):
            rng.choice((reflect, rng.choice(EDITS), _ends))(model, rng)
    (folder / "m.onnx").write_bytes(model.SerializeToString())
    if rng.random() < 0.1:
        file = rng.choice(sorted((folder / "set" / "test_data_set_0").iterdir()))
        file.write_bytes(damage(file.read_bytes(), rng))
    return Case("node tests", _told(rng), WRITES, environment={"CPDEBUG_LOOP_SECONDS": "5"})


def _ends(model: onnx.ModelProto, rng: random.Random) -> None:
    """Inputs, outputs and operands that a graph declares otherwise than it uses them."""
    graph, node, kind = model.graph, rng.choice(model.graph.node), rng.randrange(9)
    if kind == 0:
        node.input[rng.randrange(len(node.input))] = ""
    elif kind == 1:
        del node.input[-1]
    elif kind == 2:
        node.input.append(rng.choice([output for each in graph.node for output in each.output]))
    elif kind == 3:
        node.output.append("extra")
    elif kind == 4:
        node.output[rng.randrange(len(node.output))] = ""
    elif kind == 5:
        rng.choice(rng.choice(graph.input).type.tensor_type.shape.dim).dim_param = rng.choice(("n", "", *TEXTS[:6]))
    elif kind == 6:
        rng.choice(graph.input).type.tensor_type.elem_type = rng.choice((1, 2, 3, 6, 7, 8, 9, 10, 11, 14, 16, 17, 22))
    elif kind == 7:
        del graph.output[:]
        graph.output.extend(onnx.ValueInfoProto(name=o) for each in graph.node for o in each.output)
    else:
        value = rng.choice(graph.input)
        shape = [dim.dim_value or 1 for dim in value.type.tensor_type.shape.dim]
        dtype = helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
        graph.initializer.append(numpy_helper.from_array(np.zeros(shape, dtype), value.name))
        if rng.random() < 0.5:
            graph.input.remove(value)


def crossed(rng: random.Random, world: World, folder: Path) -> Case:
    """Pieces of one graph in another."""
    _lay(rng, folder)
    model, other = _model(rng, world), _model(rng, world)
    (folder / "m2.onnx").write_bytes(model.SerializeToString())
    ours, theirs = model.graph, other.graph
    for _ in range(rng.choice((1, 1, 2, 3))):
        kind = rng.randrange(9)
        if kind == 0:
            ours.node.extend(theirs.node)
            ours.initializer.extend(theirs.initializer)
        elif kind == 1:
            ours.node.append(rng.choice(theirs.node))
        elif kind == 2:
            one, two = rng.choice(ours.node), rng.choice(theirs.node)
            one.op_type, one.domain = two.op_type, two.domain
        elif kind == 3:
            one = rng.choice(ours.node)
            del one.attribute[:]
            one.attribute.extend(rng.choice(theirs.node).attribute)
        elif kind == 4:
            rng.choice((ours.input, ours.output)).extend(theirs.input if rng.random() < 0.5 else theirs.output)
        elif kind == 5:
            _join(ours, theirs)
        elif kind == 6:
            del model.opset_import[:]
            model.opset_import.extend(other.opset_import)
        elif kind == 7:
            model.functions.extend(other.functions)
            ours.node.append(rng.choice(theirs.node))
        else:
            rng.choice([*ours.input, *ours.output]).type.CopyFrom(rng.choice([*theirs.input, *theirs.output]).type)
    known = {entry.domain for entry in model.opset_import}
    model.opset_import.extend(entry for entry in other.opset_import if entry.domain not in known)
    (folder / "m.onnx").write_bytes(model.SerializeToString())
    return Case("crossed", _told(rng), WRITES, environment={"CPDEBUG_LOOP_SECONDS": "5"})


def _join(ours: onnx.GraphProto, theirs: onnx.GraphProto) -> None:
    """One graph behind the other: its inputs are the first one's outputs."""
    names = {i.name: o.name for i, o in zip(theirs.input, ours.output, strict=False)}
    new = lambda name: names.setdefault(name, f"b_{name}") if name else ""  # noqa: E731
    for node in theirs.node:
        node.input[:], node.output[:] = map(new, node.input), map(new, node.output)
    inputs = [value for value in theirs.input if value.name not in names]
    for value in (*theirs.initializer, *theirs.output, *inputs):
        value.name = new(value.name)
    ours.node.extend(theirs.node)
    ours.initializer.extend(theirs.initializer)
    ours.input.extend(inputs)
    del ours.output[:]
    ours.output.extend(theirs.output)


def leaves(rng: random.Random, world: World, folder: Path) -> Case:
    """What a command wrote with one entry exchanged: every key as often as any other, however long its list is."""
    name = rng.choice(("result", "capture-a", *sorted(world.documents)))
    sources = {"result": world.result / "result.json", "capture-a": world.captures[0] / "manifest.json"}
    source = sources.get(name) or world.documents[name]
    document = json.loads(source.read_text())
    by_shape: dict[tuple[Any, ...], list[tuple[Any, ...]]] = {}
    for path in places(document):
        by_shape.setdefault(tuple("*" if isinstance(key, int) else key for key in path), []).append(path)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        path = rng.choice(by_shape[rng.choice(sorted(by_shape, key=str))])
        with contextlib.suppress(LookupError, TypeError):  # gone with an earlier one
            holder = document
            for key in path[:-1]:
                holder = holder[key]
            if rng.random() < 0.15:
                del holder[path[-1]]
            else:
                holder[path[-1]] = copy.deepcopy(rng.choice(ODD))
    for folder_ in (world.result, *world.captures):
        world.copy(folder_, folder)
    shutil.copyfile(world.files / "net.onnx", folder / "net.onnx")
    file = folder / name / source.name if name in sources else folder / f"{name}.json"
    file.write_text(json.dumps(document))
    what = name if name in sources else f"{name}.json"
    form = rng.choice(("markdown", "html", "junit", "github", "csv", "onnx"))
    commands = (
        ["report", what, "-f", form, *([] if form == "github" else ["-o", "r.x"])],
        ["diff", what, "result"],
        ["diff", what, what, "--html", "o.html"],
        ["bundle", what, "-o", "o", "--seconds", "1"],
    )
    if name == "capture-a":
        commands = (
            ["compare", what, "capture-b", "--force"],
            ["compare", "capture-b", what, "--csv", "o.csv", "--all"],
            ["compare", what, what, "--json", "-"],
            ["bisect", "net.onnx", "--test-tensors", what],
        )
    return Case("leaves", [list(rng.choice(commands))], WRITES)


def collisions(rng: random.Random, world: World, folder: Path) -> Case:
    """Outputs that are what is read, or each other."""
    for name in ("net.onnx", "other.onnx", "x.npz", "net.py"):
        shutil.copyfile(world.files / name, folder / name)
    for source in (world.result, *world.captures):
        world.copy(source, folder)
    (folder / "hard").hardlink_to(folder / "net.onnx")
    (folder / "link").symlink_to("net.onnx")
    known = (
        "net.onnx",
        "./net.onnx",
        "x.npz",
        "other.onnx",
        "net.py",
        "hard",
        "link",
        "result/result.json",
        "o",
        "./o",
    )

    manifest = "capture-a/manifest.json"

    def place() -> str:
        return rng.choice((*known, manifest, "o.x", "."))

    bisect = ["bisect", "net.onnx", "-b", "ort,emu-fp32", "--test-model", "other.onnx", "--inputs", "x.npz"]
    commands = (
        [*bisect, "--json", place(), "--csv", place(), "--html", place()],
        [*bisect, "--save", place()],
        ["bisect", "net.py:make", "-b", "torch,ort", "--json", place()],
        ["capture", "net.onnx", "-b", "ort", "-o", place()],
        ["compare", "capture-a", "capture-b", "--json", place(), "--csv", place()],
        ["report", "result/result.json", "-f", rng.choice(("html", "csv", "junit", "markdown")), "-o", place()],
        ["search", "net.onnx", "-b", "ort,emu-fp16", "--goal", "rel_l2<1", "--onnx", place(), "--json", place()],
        ["quantize", "ptq", "net.onnx", "-o", place(), "--batches", "1"],
        ["predict", "net.onnx", "--inputs", "x.npz", "--json", place()],
        ["verify", "net.onnx", "-s", "ort,emu-fp16", "--samples", "1", "--junit", place(), "--json", place()],
    )
    argv = list(rng.choice(commands))
    spared = ["net.onnx", "./net.onnx", "hard", "link"] if argv[1] == "net.onnx" or argv[2] == "net.onnx" else []
    spared += ["result/result.json"] if argv[0] == "report" else []
    spared += [manifest] if argv[0] == "compare" else []
    spared += ["other.onnx"] if "--test-model" in argv else []
    spared += [name for name, read in (("x.npz", "--inputs"), ("net.py", "net.py:make")) if read in argv]
    return Case("collisions", [argv], [ANYTHING_NEW, *(a for a in argv if a in (*known, manifest) and a not in spared)])


def wrong_files(rng: random.Random, world: World, folder: Path) -> Case:
    """A valid file of another kind for any argument or option."""
    files = world.files
    sources = [files / name for name in ("net.onnx", "other.onnx", "big.bin", "x.npz", "net.py")]
    sources += [world.result, *world.captures, world.result / "result.json", world.search_log, *world.weights]
    sources += [*world.documents.values(), world.deployed, files / "deploy.yaml"]
    for source in sources:
        if not (folder / source.name).exists():
            world.copy(source, folder)
    (folder / "empty").write_bytes(b"")
    (folder / "mark.json").write_bytes(b"\xef\xbb\xbf{}\r\n")
    (folder / "wide.yaml").write_bytes("model: x\n".encode("utf-16"))
    names = sorted(entry.name for entry in folder.iterdir())
    words = rng.choice([w for w in _commands() if w[0] not in ("ui", "demo", "sweep", "eval")])
    argv = [*words, *BASES.get(words, [])]
    read = [p for p in _commands()[words].params if p.name != "help" and not getattr(p, "is_flag", False)]
    for option in rng.sample(read, min(len(read), rng.choice((1, 1, 2)))):
        name, value = max(option.opts, key=len), rng.choice(names)
        if option.param_type_name != "argument":
            argv += [name, value]
        elif len(argv) > len(words):
            argv[len(words)] = value
    return Case("wrong files", [argv], [ANYTHING_NEW, *argv, *(DEPLOYED if words == ("deploy",) else ())])
