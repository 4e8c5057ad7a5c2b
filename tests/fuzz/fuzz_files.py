"""Inputs, point clouds, info files and checkpoints: damaged, of other kinds, with claims that no memory could hold."""

from __future__ import annotations

import io
import os
import pickle
import random
import shutil
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from fuzz_base import TEXTS, Case, damage, mutated, nested
from fuzz_world import World, plain_pickle


class Runs:
    """Pickled, it would run a command when it is loaded."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch ../outside/ran",)


def npy(array: np.ndarray, header: bytes | None = None) -> bytes:
    """A ``.npy`` file, now and then with another header than its data have."""
    stream = io.BytesIO()
    np.lib.format.write_array(stream, array, allow_pickle=True)
    if header is None:
        return stream.getvalue()
    body = array.tobytes() if array.dtype.kind != "O" else b"x"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + body


HEADERS = (
    b"{'descr': '<f4', 'fortran_order': False, 'shape': (1099511627776,), }\n",
    b"{'descr': '<f4', 'fortran_order': False, 'shape': (1000000, 1000000, 3), }\n",
    b"{'descr': '<f4', 'fortran_order': False, 'shape': (-1,), }\n",
    b"{'descr': '<f4', 'fortran_order': False, 'shape': (9223372036854775808, 2), }\n",
    b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }\n",
    b"{'descr': '<U9999999999', 'fortran_order': False, 'shape': (1,), }\n",
    b"{'descr': '|V0', 'fortran_order': False, 'shape': (1000000000000,), }\n",
    b"{'descr': [('a', '<f4'), ('b', '|O')], 'fortran_order': False, 'shape': (1,), }\n",
    b"{'descr': '<f4', 'fortran_order': 'yes', 'shape': 3, }\n",
    b"{'descr': '<f4', 'shape': (3,)}\n",
    b"[" * 3000 + b"]" * 3000,
    b"{'descr': 'M8[ns]', 'fortran_order': False, 'shape': (1,), }\n",
    b"\xff\xfe\x00 not ascii",
    b"((((((((((((((((((((((((" * 400,
    b"1" * 6000,
)


def _arrays(rng: random.Random) -> dict[str, np.ndarray]:
    x = np.random.default_rng(rng.randrange(99)).standard_normal((1, 3, 8, 8)).astype(np.float32)
    kind = rng.randrange(14)
    if kind == 0:
        return {"x": x.astype(rng.choice((np.float64, np.int64, np.complex64, np.bool_, np.float16)))}
    if kind == 1:
        return {"x": np.array([{"a": 1}, Runs()], dtype=object)}
    if kind == 2:
        return {"x": np.array(["text", "\x1b[31m"])}
    if kind == 3:
        return {"x": x[..., : rng.choice((0, 1, 7))]}
    if kind == 4:
        return {"x": np.full_like(x, rng.choice((np.nan, np.inf, 3e38)))}
    if kind == 5:
        return {rng.choice(TEXTS).replace("\x00", "") or "n": x}
    if kind == 6:
        return {}
    if kind == 7:
        return {"x": x, "more": x}
    if kind == 8:
        return {"x": np.zeros((1,) * 30, np.float32)}
    if kind == 9:
        return {"x": np.zeros((0, 3, 8, 8), np.float32)}
    if kind == 10:
        return {"x": np.zeros(1, dtype=[("a", "f4"), ("b", "i8")])}
    if kind == 11:
        return {"x": np.array(1.0, np.float32)}
    if kind == 12:
        return {"x": np.asfortranarray(x).astype(">f4")}
    return {"x": np.array(["2020-01-01"], dtype="M8[D]")}


def npz_file(path: Path, rng: random.Random, world: World) -> None:
    """An ``.npz`` that is damaged, or holds what it should not."""
    kind = rng.randrange(8)
    if kind < 2:
        path.write_bytes(damage((world.files / "x.npz").read_bytes(), rng))
    elif kind < 5:
        arrays = _arrays(rng)
        with zipfile.ZipFile(path, "w") as archive:
            for name, array in arrays.items():
                archive.writestr(f"{name}.npy", npy(array))
    elif kind == 5:
        x = np.zeros((1, 3, 8, 8), np.float32)
        with zipfile.ZipFile(path, "w", rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))) as archive:
            archive.writestr("x.npy", npy(x, rng.choice(HEADERS)))
            if rng.random() < 0.3:
                archive.writestr(rng.choice(("x.npy", "../../outside/x", "plain.txt", "x")), b"not numpy")
    elif kind == 6:
        path.write_bytes(npy(np.zeros(3, np.float32), rng.choice((None, *HEADERS))))
    else:
        path.write_bytes(
            rng.choice((b"", b"PK\x03\x04", b"PK\x05\x06" + b"\0" * 18, pickle.dumps(Runs()), b"\0" * 100))
        )


def odd_place(path: Path, rng: random.Random) -> None:
    """A FIFO, a device, a folder, a loop of links, or nothing, in place of a file."""
    kind = rng.randrange(7)
    if kind == 0:
        os.mkfifo(path)
    elif kind == 1:
        path.symlink_to(path.name)
    elif kind == 2:
        path.symlink_to(rng.choice(("/dev/zero", "/dev/null", "/dev/full", "/dev/random")))
    elif kind == 3:
        path.mkdir()
    elif kind == 4:
        path.symlink_to("..")
    elif kind == 5:
        path.write_bytes(b"")


def inputs(rng: random.Random, world: World, folder: Path) -> Case:
    """``--inputs`` of an ONNX file or of a callable."""
    for name in ("net.onnx", "net.py"):
        shutil.copyfile(world.files / name, folder / name)
    place = rng.choice(("in.npz", "in.npz", "many", "in.npy", "in.bin"))
    if place == "many":
        (folder / "many").mkdir()
        for index in range(2):
            npz_file(folder / "many" / f"{index}.npz", rng, world)
    elif rng.random() < 0.15:
        odd_place(folder / place, rng)
    else:
        npz_file(folder / place, rng, world)
    commands = (
        ["bisect", "net.onnx", "-b", "ort,emu-tf32", "--inputs", place],
        ["bisect", "net.onnx", "-b", "ort,emu-tf32", "--inputs", place, "--samples", "3"],
        ["check", "net.onnx", "--inputs", place],
        ["capture", "net.onnx", "-b", "ort", "--inputs", place, "-o", "out"],
        ["bench", "net.onnx", "-b", "ort", "--inputs", place, "-n", "1"],
        ["verify", "net.onnx", "-s", "ort,emu-fp16", "--inputs", place],
        ["quantize", "ptq", "net.onnx", "-o", "out", "--calib-data", place],
        ["search", "net.onnx", "-b", "ort,emu-fp16", "--inputs", place],
        ["bisect", "net.onnx", "-b", "ort,ort-int8", "--calib-data", place],
        ["bisect", "net.py:make", "-b", "torch,torch-fp64", "--inputs", place],
        ["verify", "net.onnx", "-s", "ort,emu-fp16", "--voxels", place],
        ["export", "net.py:make", "-o", "out", "--inputs", place],
    )
    return Case("inputs", [list(rng.choice(commands))], ["out"])


def pcd(rng: random.Random) -> bytes:
    """A PCD file whose header and body disagree."""
    rows = np.random.default_rng(rng.randrange(99)).uniform(-20, 20, (50, 4)).astype("<f4")
    header = {
        "VERSION": "0.7",
        "FIELDS": "x y z intensity",
        "SIZE": "4 4 4 4",
        "TYPE": "F F F F",
        "COUNT": "1 1 1 1",
        "WIDTH": "50",
        "HEIGHT": "1",
        "VIEWPOINT": "0 0 0 1 0 0 0",
        "POINTS": "50",
        "DATA": rng.choice(("binary", "ascii", "binary_compressed")),
    }
    body = {
        "binary": rows.tobytes(),
        "ascii": "\n".join(" ".join(map(str, row)) for row in rows).encode(),
        "binary_compressed": struct.pack("<II", 200, 800) + bytes([31]) * 200,
    }[header["DATA"]]
    for _ in range(rng.choice((0, 1, 1, 2))):
        key = rng.choice(list(header))
        values = ("", "-1", "0", "1", "x", "1e9", "9" * 30, "4 4", "8 8 8 8", "U I F Q", "1 1 1 99999999999", "3 4 4 4")
        values = (*values, "x x x x", "_ _ _ _", "binary", "50000000000", *TEXTS)
        header[key] = rng.choice(values)
        if rng.random() < 0.15:
            del header[key]
    text = "".join(f"{key} {value}\n" for key, value in header.items())
    return text.encode("utf-8", "replace") + body


def clouds(rng: random.Random, world: World, folder: Path) -> Case:
    """Point files of every ending."""
    name = rng.choice(("c.pcd", "c.pcd", "c.bin", "c.pcd.bin", "c.npy", "c.npz"))
    path = folder / name
    if rng.random() < 0.12:
        odd_place(path, rng)
    elif name.endswith(".pcd"):
        path.write_bytes(pcd(rng) if rng.random() < 0.8 else damage(pcd(rng), rng))
    elif name.endswith(".bin"):
        cloud = np.random.default_rng(1).uniform(-20, 20, (99, 5)).astype(np.float32)
        if rng.random() < 0.5:
            cloud[rng.randrange(99), rng.randrange(5)] = rng.choice((np.nan, np.inf, -3e38))
        if rng.random() < 0.2:
            cloud[:] = rng.choice((np.nan, np.inf, 3e38, 1e9))
        path.write_bytes(cloud.tobytes() if rng.random() < 0.6 else damage(cloud.tobytes(), rng))
    elif name.endswith(".npy"):
        shapes = ((50, 5), (50, 4), (0, 5), (5,), (2, 3, 5), ())
        array = np.zeros(rng.choice(shapes), rng.choice(("<f4", "<f8", "O", "<i4", "<c8", "<U3")))
        path.write_bytes(npy(array, rng.choice((None, None, *HEADERS))))
    else:
        npz_file(path, rng, world)
    commands = (
        ["check", "centerpoint:tiny", "--inputs", name],
        ["check", "centerpoint:tiny", "--inputs", name],
        ["check", "centerpoint:tiny", "--no-activations", "--inputs", name],
        ["capture", "centerpoint:tiny", "-b", "torch", "--inputs", name, "-o", "out"],
        ["quantize", "ptq", "centerpoint:tiny", "--calib-data", name, "-o", "out", "--batches", "1"],
        ["export", "centerpoint:tiny", "--inputs", name, "-o", "out"],
    )
    return Case("clouds", [list(rng.choice(commands))], ["out"])


def infos(rng: random.Random, world: World, folder: Path) -> Case:
    """mmdet3d's info files."""
    document = world.infos
    for name in ("a.bin", "b.bin", "sweep.bin"):
        shutil.copyfile(world.folder / name, folder / name)
    path = folder / "infos.pkl"
    kind = rng.randrange(12)
    if kind == 0:
        path.write_bytes(damage(plain_pickle(document, rng), rng))
    elif kind == 1:
        odd_place(path, rng)
    elif kind == 2:
        path.write_bytes(pickle.dumps(mutated(document, rng) if rng.random() < 0.5 else Runs()))
    elif kind == 3:
        path.write_bytes(pickle.dumps(nested(rng.choice((50, 200)), rng)))
    elif kind == 4:
        path.write_bytes(rng.choice(PICKLES))
    else:
        path.write_bytes(plain_pickle(_infos(document, rng), rng))
    commands = (
        ["eval", "centerpoint:tiny", "-b", "torch", "--data", "infos.pkl", "-n", "2", "--draws", "0"],
        ["eval", "centerpoint:tiny", "-b", "torch", "--data", "infos.pkl", "--skip-missing", "--data-root", "."],
        ["check", "centerpoint:tiny", "--inputs", "infos.pkl"],
        ["bench", "centerpoint:tiny", "-b", "torch", "-n", "1", "--inputs", "infos.pkl"],
        ["quantize", "ptq", "centerpoint:tiny", "--calib-data", "infos.pkl", "-o", "out", "--batches", "1"],
        ["verify", "centerpoint:tiny", "-s", "torch,ort", "--inputs", "infos.pkl", "--samples", "1"],
    )
    return Case("infos", [list(rng.choice(commands[:3] if rng.random() < 0.8 else commands))], ["out"])


def _infos(document: dict[str, Any], rng: random.Random) -> Any:
    changed = mutated(document, rng)
    if rng.random() < 0.3 and isinstance(changed, dict):
        data = changed.get("data_list")
        if isinstance(data, list) and data and isinstance(data[0], dict):
            path = rng.choice((["timestamp"], ["lidar_points", "lidar_path"], ["instances", 0, "bbox_3d"], ["images"]))
            path = rng.choice((path, ["lidar_sweeps", 0, "lidar_points", "lidar2sensor"], ["lidar_points"]))
            value: Any = rng.choice(
                (
                    np.array([1, 2]),
                    np.zeros((2, 2), dtype="M8[s]"),
                    "/dev/zero",
                    "fifo",
                    "../../../etc/passwd",
                    np.array(["a"]),
                    b"bytes",
                    1j,
                    {1, 2},
                    [[1, 2], [3]],
                    10**400,
                    np.float32(3),
                    2**70,
                )
            )
            with_suppress(data[0], path, value)
    if rng.random() < 0.1 and isinstance(changed, dict):
        changed["itself"] = changed
    return changed


def with_suppress(holder: Any, path: list[Any], value: Any) -> None:
    """Set the value at a path, where there still is one."""
    try:
        for key in path[:-1]:
            holder = holder[key]
        holder[path[-1]] = value
    except (LookupError, TypeError):
        pass


PICKLES = (
    b"",
    b".",
    b"\x80\x05]\x94(" + b"]" * 100_000 + b"e.",
    b"cos\nsystem\n(S'touch ../outside/ran'\ntR.",
    b"cnumpy\nndarray\n(I99999999999\ntR.",
    b"cnumpy\nndarray\n((I99999999999\nI999\nttR.",
    b"\x80\x04\x8a\xff" + b"\xff" * 255 + b".",
    b"\x80\x04B\xff\xff\xff\x7f.",
    b"\x80\x05\x8d\xff\xff\xff\xff\xff\xff\xff\x7f.",
    b"r\xff\xff\xff\x7f.",
    b"cbuiltins\nset\n(]]]]ttR.",
    b"(" * 200_000 + b".",
    b"I" + b"9" * 100_000 + b"\n.",
)


def checkpoints(rng: random.Random, world: World, folder: Path) -> Case:
    """Weights by torch and safetensors, and what ``quantize`` wrote."""
    import torch

    shutil.copyfile(world.files / "net.py", folder / "net.py")
    torch_file, safe_file = world.weights
    name = rng.choice(("w.pt", "w.pth", "w.safetensors", "w.safetensors", "w.pt"))
    path = folder / name
    kind = rng.randrange(9)
    if kind == 0:
        odd_place(path, rng)
    elif kind == 1 or (kind == 2 and name.endswith("safetensors")):
        path.write_bytes(damage((safe_file if name.endswith("safetensors") else torch_file).read_bytes(), rng))
    elif name.endswith("safetensors"):
        path.write_bytes(_safetensors(safe_file.read_bytes(), rng))
    elif kind == 2:
        path.write_bytes(rng.choice((*PICKLES, pickle.dumps(Runs()), pickle.dumps({"state_dict": Runs()}))))
    elif kind == 3:
        torch.save({"state_dict": Runs(), "x": 1}, path)
    elif kind == 4:
        shutil.copyfile(rng.choice(_quantized_files(world)), path)
        if rng.random() < 0.7:
            path.write_bytes(damage(path.read_bytes(), rng))
    else:
        state = torch.load(torch_file, weights_only=True)
        for _ in range(rng.choice((1, 1, 2))):
            key = rng.choice(list(state))
            odd = (
                torch.full_like(state[key].float(), rng.choice((float("nan"), float("inf"), 0.0))),
                state[key][..., None],
                torch.zeros(0),
                "text",
                None,
                5,
                state[key].to(torch.complex64),
                state[key].half(),
                torch.ones(state[key].shape, dtype=torch.bool),
                torch.empty(state[key].shape, device="meta"),
                torch.sparse_coo_tensor(size=tuple(state[key].shape)),
            )
            action = rng.randrange(4)
            if action == 0:
                del state[key]
            elif action == 1:
                state[rng.choice(TEXTS)] = state[key]
            elif action == 2:
                state[rng.randrange(9)] = state[key]
            else:
                state[key] = rng.choice(odd)
        format_ = rng.choice(("cpdebug quantized/1", 5, "\x1b[31m"))
        torch.save(rng.choice((state, {"state_dict": state}, [state], {"format": format_, **state})), path)
    if kind == 4 and rng.random() < 0.5:
        told = rng.choice(
            (
                ["quantize", "sensitivity", "net.py:make", "--from", name, "-n", "1"],
                ["export", "net.py:make", "-o", "out", "--quantized", name],
                ["bisect", "net.py:make", "-b", "torch,ort-int8", "--checkpoint", name],
                ["quantize", "ptq", "net.py:make", "-o", "out", "--cache", name],
                ["quantize", "qat", "--from", name, "-o", "out"],
            )
        )
    else:
        told = rng.choice(
            (
                ["check", "net.py:make", "--checkpoint", name],
                ["check", "net.py:make", "--checkpoint", name],
                ["capture", "net.py:make", "-b", "torch", "--checkpoint", name, "-o", "out"],
                ["bisect", "net.py:make", "-b", "torch,torch-fp16", "--checkpoint", name],
                ["bisect", "net.py:make", "-b", "torch,torch-fp16", "--test-checkpoint", name],
                ["eval", "centerpoint:tiny", "-b", "torch", "-n", "1", "--checkpoint", name],
                ["search", "net.py:make", "-b", "torch,emu-fp16", "--checkpoint", name],
                ["quantize", "ptq", "net.py:make", "-o", "out", "--checkpoint", name, "--batches", "1"],
                ["bench", "net.py:make", "-b", "torch", "-n", "1", "--checkpoint", name],
            )
        )
    return Case("checkpoints", [list(told)], ["out"])


def _quantized_files(world: World) -> list[Path]:
    return sorted(p for p in world.quantized.iterdir() if p.suffix in (".pt", ".pth", ".json", ".cache"))


def _safetensors(data: bytes, rng: random.Random) -> bytes:
    """With another header: offsets, shapes and types that do not fit."""
    import json

    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    text = json.dumps(mutated(header, rng)).encode()
    size = rng.choice((len(text), len(text), len(text), 0, 2**63, 2**40, len(text) + 5))
    return size.to_bytes(8, "little") + text + data[8 + length :]
