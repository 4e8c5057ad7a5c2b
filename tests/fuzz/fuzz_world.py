"""Valid files of every kind that cpdebug reads, made once by cpdebug itself; cases start from copies of them."""

from __future__ import annotations

import json
import pickle
import random
import shutil
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

CALLABLE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.out = nn.Conv2d(4, 2, 1)

    def forward(self, x):
        return self.out(torch.relu(self.norm(self.conv(x))))

def make():
    torch.manual_seed(0)
    return Net().eval(), (torch.randn(1, 3, 8, 8),)
"""


class World:
    """``run(argv, folder)`` calls cpdebug on a command line in a folder, and returns the exit code."""

    def __init__(self, folder: Path, run: Callable[[list[str], Path], int]) -> None:
        self.folder, self._run = folder, run
        folder.mkdir(parents=True, exist_ok=True)

    def _must(self, argv: list[str], codes: tuple[int, ...] = (0, 1)) -> None:
        code = self._run(argv, self.folder)
        assert code in codes, f"{argv} ended with {code}, but its input is valid"

    @cached_property
    def net(self) -> onnx.ModelProto:
        """Convolution, BatchNormalization, Relu, pooling, a shape computation, an ``If``: ``x`` to ``y`` and ``z``."""
        rng = np.random.default_rng(0)

        def weight(name: str, *shape: int) -> TensorProto:
            return numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32) / 3, name)

        then = helper.make_graph([helper.make_node("Relu", ["c2"], ["t"])], "then", [], [_value("t")])
        other = helper.make_graph([helper.make_node("Neg", ["c2"], ["e"])], "else", [], [_value("e")])
        nodes = [
            helper.make_node("Conv", ["x", "w1", "b1"], ["c1"], name="conv1", pads=[1, 1, 1, 1]),
            helper.make_node("BatchNormalization", ["c1", "s", "b1", "m", "v"], ["n1"], name="norm1"),
            helper.make_node("Relu", ["n1"], ["r1"], name="relu1"),
            helper.make_node("Conv", ["r1", "w2"], ["c2"], name="conv2", strides=[2, 2], pads=[1, 1, 1, 1]),
            helper.make_node("If", ["flag"], ["y"], name="if", then_branch=then, else_branch=other),
            helper.make_node("GlobalAveragePool", ["r1"], ["p"], name="pool"),
            helper.make_node("Reshape", ["p", "shape"], ["z"], name="reshape"),
        ]
        weights = [
            *(weight("w1", 4, 3, 3, 3), weight("b1", 4), weight("s", 4), weight("m", 4), weight("w2", 4, 4, 3, 3)),
            numpy_helper.from_array(np.ones(4, np.float32), "v"),
            numpy_helper.from_array(np.array(True), "flag"),
            numpy_helper.from_array(np.array([1, 4], np.int64), "shape"),
        ]
        inputs = [helper.make_tensor_value_info("x", 1, ["batch", 3, 8, 8])]
        outputs = [
            helper.make_tensor_value_info("y", 1, ["batch", 4, 4, 4]),
            helper.make_tensor_value_info("z", 1, [1, 4]),
        ]
        graph = helper.make_graph(nodes, "net", inputs, outputs, weights)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)

    @cached_property
    def other_net(self) -> onnx.ModelProto:
        """``net`` with other weights in its second convolution."""
        model = onnx.ModelProto()
        model.CopyFrom(self.net)
        weight = next(t for t in model.graph.initializer if t.name == "w2")
        weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * np.float32(1.1), "w2"))
        return model

    @cached_property
    def files(self) -> Path:
        """A folder with ``net.onnx``, ``other.onnx``, ``big.onnx`` (external data), ``x.npz`` and ``net.py``."""
        onnx.save(self.net, str(self.folder / "net.onnx"))
        onnx.save(self.other_net, str(self.folder / "other.onnx"))
        big = onnx.ModelProto()
        big.CopyFrom(self.net)
        onnx.save(big, str(self.folder / "big.onnx"), save_as_external_data=True, location="big.bin", size_threshold=16)
        x = np.random.default_rng(1).standard_normal((1, 3, 8, 8)).astype(np.float32)
        np.savez(self.folder / "x.npz", x=x)
        (self.folder / "net.py").write_text(CALLABLE)
        return self.folder

    @cached_property
    def captures(self) -> tuple[Path, Path]:
        """Two captures of ``net``."""
        _ = self.files
        for name, spec in (("capture-a", "ort"), ("capture-b", "emu-fp16")):
            self._must(["capture", "net.onnx", "-b", spec, "-o", name, "--inputs", "x.npz"])
        return self.folder / "capture-a", self.folder / "capture-b"

    @cached_property
    def result(self) -> Path:
        """The folder of a bisection that found a fault."""
        _ = self.files
        self._must(["bisect", "net.onnx", "-b", "ort,emu-fp32", "--test-model", "other.onnx", "--save", "result"], (1,))
        return self.folder / "result"

    @cached_property
    def documents(self) -> dict[str, Path]:
        """What each command writes with ``--json``, by the command."""
        _ = self.files, self.captures
        commands = {
            "predict": ["predict", "net.onnx", "--inputs", "x.npz"],
            "search": ["search", "net.onnx", "-b", "ort,emu-fp16", "--goal", "rel_l2<1e-5"],
            "verify": ["verify", "net.onnx", "-s", "ort,emu-fp16", "--samples", "1"],
            "compare": ["compare", "capture-a", "capture-b"],
            "bench": ["bench", "net.onnx", "-b", "ort", "-n", "1"],
            "diff": ["diff", "result", "result"],
        }
        found = {"bisect": self.result / "result.json"}
        for name, argv in commands.items():
            self._must([*argv, "--json", f"{name}.json"])
            found[name] = self.folder / f"{name}.json"
        return found

    @cached_property
    def search_log(self) -> Path:
        """The log of a search."""
        _ = self.files
        argv = ["search", "net.onnx", "-b", "ort,emu-fp16", "--goal", "rel_l2<1e-5", "--log", "search.jsonl"]
        self._must(argv)
        return self.folder / "search.jsonl"

    @cached_property
    def sweep_log(self) -> Path:
        """The log of a sweep."""
        _ = self.files
        argv = ["sweep", "bisect", "net.onnx", "-b", "ort,emu-fp16", "-n", "2", "--workers", "1"]
        self._must([*argv, "--log", "sweep.jsonl"])
        return self.folder / "sweep.jsonl"

    @cached_property
    def deployed(self) -> Path:
        """A deployment that has exported and verified."""
        _ = self.files
        (self.folder / "deploy.json").write_text(json.dumps(DEPLOY))
        (self.folder / "deploy.yaml").write_text(json.dumps(DEPLOY))  # JSON is YAML
        self._must(["deploy", "deploy.yaml"])
        return self.folder / "work"

    @cached_property
    def quantized(self) -> Path:
        """A checkpoint of ``quantize ptq``."""
        _ = self.files
        self._must(["quantize", "ptq", "net.py:make", "-o", "int8", "--batches", "2"])
        return self.folder / "int8"

    @cached_property
    def weights(self) -> tuple[Path, Path]:
        """A state dictionary of ``net.py:make`` by torch, and by safetensors."""
        import torch
        from safetensors.torch import save_file

        namespace: dict[str, Any] = {}
        exec(compile(CALLABLE, "net.py", "exec"), namespace)
        state = namespace["make"]()[0].state_dict()
        torch.save(state, self.folder / "weights.pt")
        save_file(state, self.folder / "weights.safetensors")
        return self.folder / "weights.pt", self.folder / "weights.safetensors"

    @cached_property
    def infos(self) -> dict[str, Any]:
        """An info file's content with two samples; its clouds are ``a.bin`` and ``b.bin`` in ``folder``."""
        rng = np.random.default_rng(2)
        for name in ("a.bin", "b.bin", "sweep.bin"):
            cloud = rng.uniform(-20, 20, (300, 5)).astype(np.float32)
            cloud.tofile(self.folder / name)
        box = [5.0, 3.0, 0.5, 4.0, 2.0, 1.5, 0.3]
        camera = np.eye(4).tolist()

        def info(index: int, cloud: str) -> dict[str, Any]:
            sweep = {
                "timestamp": 1.4,
                "lidar_points": {"lidar_path": "sweep.bin", "num_pts_feats": 5, "lidar2sensor": np.eye(4).tolist()},
            }
            return {
                "sample_idx": index,
                "token": f"t{index}",
                "timestamp": 1.5,
                "lidar_points": {"lidar_path": cloud, "num_pts_feats": 5},
                "images": {"CAM_FRONT": {"lidar2cam": camera}},
                "cam_instances": {"CAM_FRONT": [{"bbox_3d": box, "attr_label": 0}]},
                "lidar_sweeps": [sweep],
                "instances": [
                    {"bbox_3d": box, "bbox_label_3d": 0, "velocity": [1.0, 0.0], "num_lidar_pts": 5, "num_radar_pts": 0}
                ],
            }

        categories = {"car": 0, "truck": 1, "pedestrian": 2}
        return {
            "metainfo": {"dataset": "nuscenes", "categories": categories, "version": "v1"},
            "data_list": [info(0, "a.bin"), info(1, "b.bin")],
        }

    def copy(self, source: Path, folder: Path, name: str | None = None) -> Path:
        """A copy of a file or folder in a case's folder."""
        target = folder / (name or source.name)
        if source.is_dir():
            shutil.copytree(source, target)
        else:
            shutil.copyfile(source, target)
        return target


DEPLOY: dict[str, Any] = {
    "model": "net.py:make",
    "work_dir": "work",
    "export": {"mode": "onnx", "opset": 17, "exporter": "torchscript"},
    "components": {"Net": {"onnx_file": "net.onnx"}},
    "verify": {"enabled": True, "samples": 1, "tolerances": {"fp32": 0.5}},
    "evaluate": {"enabled": False},
}


def plain_pickle(document: Any, rng: random.Random) -> bytes:
    """Pickled by one of the protocols."""
    return pickle.dumps(document, protocol=rng.choice((0, 2, 4, 5)))


def _value(name: str) -> onnx.ValueInfoProto:
    return onnx.ValueInfoProto(name=name)
