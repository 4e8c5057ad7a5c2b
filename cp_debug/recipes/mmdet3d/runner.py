"""Builds mmdet3d's detectors for cpdebug: ``python runner.py JOB_FOLDER --stay``, wherever mmdet3d is.

One file, Python 3.8, only the standard library, numpy, torch, mmengine and mmdet3d: the detector lives in one
environment and the debugger in another. ``JOB_FOLDER/job.json`` holds ``{"steps": [{"command": "open" | …}]}``;
``JOB_FOLDER/result.json`` takes ``{"results": [...]}`` and, if a step failed, ``"error"``. A step's arrays come in the
``.npz`` file ``arrays`` and leave in ``made``, never pickled. Events go to stdout, one JSON object a line.
"""

from __future__ import annotations

import importlib
import json
import sys
import traceback
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

if TYPE_CHECKING:  # evaluated by no interpreter, so newer than Python 3.8
    from collections.abc import Callable, Iterator

    Step = dict[str, Any]
    Arrays = dict[str, np.ndarray]
    Emit = Callable[[dict[str, Any]], None]

OUTPUT_ORDER = ("heatmap", "reg", "height", "dim", "rot", "vel")
"""Order of the outputs of a CenterHead's task in cpdebug and AWML."""
PREFIXES = ("pts_", "img_", "")
PARTS = ("backbone", "neck", "bbox_head", "rpn_head")


class DetectorFailure(Exception):
    """A failure with a message for people. ``kind`` is one of import, config, program, internal."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind, self.message = kind, message


class _Reached(Exception):
    """Every branch has its input: the rest of the forward is not needed."""


# ---------------------------------------------------------------- the detector's parts


class Encoder(nn.Module):
    """The pillar encoder behind the decoration, as AWML exports it."""

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        self.pfn_layers = encoder.pfn_layers

    def forward(self, input_features: torch.Tensor) -> torch.Tensor:
        """[N, P, C] to [N, 1, out]."""
        for layer in self.pfn_layers:
            input_features = layer(input_features)
        return input_features


class DenseBranch(nn.Module):
    """Backbone, neck and head one after the other, under the detector's own names."""

    def __init__(self, detector: nn.Module, prefix: str) -> None:
        super().__init__()
        for part in PARTS:
            if isinstance(module := getattr(detector, prefix + part, None), nn.Module):
                self.add_module(prefix + part, module)
        self.prefix = prefix

    @property
    def name(self) -> str:
        """Name made of its parts, such as ``pts_backbone_neck_head``."""
        return self.prefix + "_".join(n[len(self.prefix) :].rpartition("_")[2] for n, _ in self.named_children())

    def forward(self, features: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """One tensor to all that the head returns, flat."""
        return tuple(self.outputs(features).values())

    def outputs(self, features: Any) -> dict[str, torch.Tensor]:
        """Tensors that the head returns for ``features``, by name."""
        for module in self.children():
            features = module(features)
        return dict(_named(features))


def _named(structure: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors in a structure; a mapping's known keys come in ``OUTPUT_ORDER``."""
    if isinstance(structure, torch.Tensor):
        yield ".".join(path) or "output", structure
    elif isinstance(structure, dict):
        ordered = [key for key in OUTPUT_ORDER if key in structure]
        for key in [*ordered, *(key for key in structure if key not in ordered)]:
            yield from _named(structure[key], (*path, str(key)))
    elif isinstance(structure, (list, tuple)):
        for index, item in enumerate(structure):
            yield from _named(item, (*path, str(index) if path else f"output_{index}"))


class BuiltDetector:
    """A detector built from a config file, in eval mode on the CPU, with random weights from a seed."""

    def __init__(self, path: str, seed: int) -> None:
        config_type, registry, models = (
            _import("mmengine.config").Config,
            _import("mmengine.registry"),
            _import("mmdet3d.registry").MODELS,
        )
        try:
            self.config = config_type.fromfile(path)
            registry.init_default_scope(self.config.get("default_scope", "mmdet3d"))
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                self.model = models.build(self.config.model)
        except Exception as error:  # a config is a program: it and the constructors raise whatever they like
            raise DetectorFailure(
                "config", f"{path}: mmdet3d cannot build it: {type(error).__name__}: {error}"
            ) from error
        self.model.eval().requires_grad_(False)
        self.branches = {}
        for prefix in PREFIXES:
            if hasattr(self.model, prefix + "backbone"):
                branch = DenseBranch(self.model, prefix).eval()
                self.branches[branch.name] = branch

    def about(self) -> dict[str, Any]:
        """Facts of the detector: its resolved model config, columns of its points, shapes of its weights, versions."""
        packages = {name: _import(name).__version__ for name in ("mmdet3d", "mmengine")}
        shapes = {name: list(tensor.shape) for name, tensor in self.model.state_dict().items()}
        return {
            "model": json.loads(json.dumps(self.config.model.to_dict(), default=str)),
            "columns": self._columns(),
            "shapes": shapes,
            "left_out": self._left_out(),
            "versions": {"torch": str(torch.__version__), **packages},
        }

    def _left_out(self) -> list[str]:
        """Parts with weights that refine what the heads give: in no branch, and nothing in front of one."""
        taken = {name for branch in self.branches.values() for name, _ in branch.named_children()}
        parts = {name: part for name, part in self.model.named_children() if name not in taken}
        if not any(name.endswith("roi_head") for name in parts):
            return []
        behind = [name for name in parts if name.endswith(("roi_head", "points_encoder"))]
        return [f"{name} ({type(parts[name]).__name__})" for name in behind]

    def _columns(self) -> list[int] | None:
        """Columns of a stored cloud that the detector is fed, as its test pipeline says; None where it does not."""
        loading = {step["type"]: step for step in self.config.get("test_pipeline") or ()}
        columns = None
        if step := loading.get("LoadPointsFromFile"):
            columns = step.get("use_dim", [0, 1, 2])
        if step := loading.get("LoadPointsFromMultiSweeps"):
            columns = step.get("use_dim", [0, 1, 2, 4])
        return list(range(columns)) if isinstance(columns, int) else columns

    def predict(self, points: np.ndarray) -> tuple[Any, Any]:
        """One cloud [N, C] through the detector: (what the data preprocessor made of it, the predicted data sample)."""
        structures = _import("mmdet3d.structures")
        meta = {"box_type_3d": structures.LiDARInstance3DBoxes, "box_mode_3d": structures.Box3DMode.LIDAR}
        data = {
            "inputs": {"points": [torch.from_numpy(points)]},
            "data_samples": [structures.Det3DDataSample(metainfo=meta)],
        }
        with torch.no_grad():
            data = self.model.data_preprocessor(data, False)
            return data["inputs"], self.model(data["inputs"], data["data_samples"], mode="predict")[0]

    def inputs(self, points: np.ndarray) -> tuple[Arrays, str]:
        """Tensors that the branches are fed for one cloud, by branch; and why the others are fed none."""
        inputs_by_branch: Arrays = {}

        def keep(name: str, args: Any) -> None:
            inputs_by_branch[name] = args[0].numpy().copy()
            if len(inputs_by_branch) == len(self.branches):
                raise _Reached

        firsts = {name: next(branch.children()) for name, branch in self.branches.items()}
        handles = [m.register_forward_pre_hook(lambda _, a, n=n: keep(n, a)) for n, m in firsts.items()]
        try:
            self.predict(points)
        except _Reached:
            return inputs_by_branch, ""
        except Exception as error:  # the parts before a branch may need what this machine or this cloud has not
            return inputs_by_branch, f"{type(error).__name__}: {error}"
        finally:
            for handle in handles:
                handle.remove()
        return inputs_by_branch, "the detector did not call it"

    def stages(self, points: np.ndarray) -> Arrays:
        """Every stage of a pillar CenterPoint for one cloud, by cpdebug's names, with the final boxes."""
        outputs: dict[str, Any] = {}
        model = self.model
        handles = [
            getattr(model, name).register_forward_hook(lambda _, __, out, name=name: outputs.__setitem__(name, out))
            for name in ("pts_voxel_encoder", "pts_middle_encoder", "pts_backbone", "pts_neck", "pts_bbox_head")
        ]
        first = model.pts_voxel_encoder.pfn_layers[0]
        handles.append(first.register_forward_pre_hook(lambda _, args: outputs.setdefault("features", args[0].clone())))
        try:
            inputs, prediction = self.predict(points)
        finally:
            for handle in handles:
                handle.remove()
        heads = [task[0] for task in outputs["pts_bbox_head"]]
        prefixes = [f"task{index}." if len(heads) > 1 else "" for index in range(len(heads))]
        tensors = {
            **{name: inputs["voxels"][name] for name in ("voxels", "num_points", "coors")},
            "input_features": outputs["features"],
            "pillar_features": outputs["pts_voxel_encoder"].unsqueeze(1),
            "spatial_features": outputs["pts_middle_encoder"],
            **{f"backbone.{index}": out for index, out in enumerate(outputs["pts_backbone"])},
            "neck": outputs["pts_neck"][0],
            **{p + name: head[name] for p, head in zip(prefixes, heads) for name in OUTPUT_ORDER},  # noqa: B905
            "boxes": prediction.pred_instances_3d.bboxes_3d.tensor,
            "scores": prediction.pred_instances_3d.scores_3d,
            "labels": prediction.pred_instances_3d.labels_3d,
        }
        return {name: tensor.numpy() for name, tensor in tensors.items()}


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except Exception as error:  # mmdet3d checks its dependencies' versions with assert
        raise DetectorFailure("import", f"{sys.executable} cannot import {name}: {error}") from error


# ---------------------------------------------------------------- commands


def _image_channels(branch: DenseBranch) -> int | None:
    convolutions = [m for m in next(branch.children()).modules() if isinstance(m, nn.Conv2d)]
    return convolutions[0].in_channels if convolutions else None


class Commands:
    """What steps may ask for, by name: each takes its step and arrays, and gives its result and arrays."""

    detector: BuiltDetector
    """The open one."""

    def configs(self, step: Step, arrays: Arrays) -> tuple[dict[str, Any], Arrays]:
        """The configurations that mmdet3d ships, name → file."""
        package = Path(_import("mmdet3d").__file__).parent
        folders = [package / ".mim" / "configs", package.parent / "configs"]  # installed; a checkout
        paths = [
            path for folder in folders if folder.is_dir() for path in folder.rglob("*.py") if "_base_" not in path.parts
        ]
        return {"configs": {path.stem: str(path) for path in reversed(paths)}}, {}

    def open(self, step: Step, arrays: Arrays) -> tuple[dict[str, Any], Arrays]:
        """Build ``config`` with random weights from ``seed``. The other commands work on it."""
        self.detector = BuiltDetector(step["config"], step["seed"])
        return self.detector.about(), {}

    def load(self, step: Step, arrays: Arrays) -> tuple[dict[str, Any], Arrays]:
        """Take the weights in ``file``, a plain dictionary of tensors that fits."""
        self.detector.model.load_state_dict(torch.load(step["file"], map_location="cpu"))
        return {}, {}

    def save(self, step: Step, arrays: Arrays) -> tuple[dict[str, Any], Arrays]:
        """Write the weights to ``file``."""
        torch.save(dict(self.detector.model.state_dict()), step["file"])
        return {}, {}

    def stages(self, step: Step, arrays: Arrays) -> tuple[dict[str, Any], Arrays]:
        """``BuiltDetector.stages`` of ``points``."""
        return {}, self.detector.stages(arrays["points"])

    def inputs(self, step: Step, arrays: Arrays) -> tuple[dict[str, Any], Arrays]:
        """``BuiltDetector.inputs`` of ``points``; for each branch, the channels of the images that it may take."""
        tensors, reason = self.detector.inputs(arrays["points"])
        channels = {name: _image_channels(branch) for name, branch in self.detector.branches.items()}
        return {"reason": reason, "channels": channels}, tensors

    def run(self, step: Step, arrays: Arrays) -> tuple[dict[str, Any], Arrays]:
        """The outputs of ``branch`` for ``features``, in the order of their names."""
        with torch.no_grad():
            outputs = self.detector.branches[step["branch"]].outputs(torch.from_numpy(arrays["features"]))
        return {"outputs": list(outputs)}, {name: tensor.numpy() for name, tensor in outputs.items()}

    def program(self, step: Step, arrays: Arrays) -> tuple[dict[str, Any], Arrays]:
        """Write ``branch`` as it computes ``features``, an exported program of torch, to ``file``.

        What cannot be exported is cut off the branch, from its end; the result says why.
        """
        branch = self.detector.branches[step["branch"]]
        dropped: dict[str, str] = {}
        while True:
            try:
                exported = torch.export.export(branch, (torch.from_numpy(arrays["features"]),))
                torch.export.save(exported, step["file"])
                return {"name": branch.name, "dropped": dropped}, {}
            except Exception as error:  # nearly everything; a torch before 2.1 has no such module
                last = [name for name, _ in branch.named_children()][-1]
                dropped[last] = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
                if not list(branch.children())[1:]:
                    raise DetectorFailure("program", dropped[last]) from error
                delattr(branch, last)


def execute(job: dict[str, Any], emit: Emit, commands: Commands) -> dict[str, Any]:
    """Run a job's steps in order, up to the first that fails. Returns the content of ``result.json``.

    ``commands`` keeps the open detector from job to job.
    """
    results: list[dict[str, Any]] = []
    error = {}
    try:
        for step in job["steps"]:
            emit({"event": "step", "command": step["command"]})
            arrays = dict(np.load(step["arrays"], allow_pickle=False)) if "arrays" in step else {}
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # mmdet3d's own code and that of the packages it needs
                result, output_arrays = getattr(commands, step["command"])(step, arrays)
            if "made" in step:
                np.savez(step["made"], **output_arrays)
            results.append(result)
    except DetectorFailure as failure:
        error = {"kind": failure.kind, "message": failure.message}
    except Exception as failure:
        message = f"{type(failure).__name__}: {failure}"
        error = {"kind": "internal", "message": message, "traceback": traceback.format_exc()}
    return {"results": results, **({"error": error} if error else {})}


def main(folder: Path) -> int:
    """Work on ``folder``, then on those named on stdin, one a line. Returns the process's exit status."""

    def emit(event: dict[str, Any]) -> None:
        print("\n" + json.dumps(event), flush=True)  # a library may have left its line open

    commands = Commands()
    while True:
        result = execute(json.loads((folder / "job.json").read_text(encoding="utf-8")), emit, commands)
        (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")
        emit({"event": "done"})
        following = sys.stdin.readline().rstrip("\n")
        if not following:
            return 0
        folder = Path(following)


if __name__ == "__main__":
    sys.path.pop(0)  # this file's folder, whose modules must not hide others
    sys.exit(main(Path(sys.argv[1])))
