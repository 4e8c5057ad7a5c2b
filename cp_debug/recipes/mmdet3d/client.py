"""The client of ``runner.py``: in this Python when mmdet3d imports here, else in that of ``CPDEBUG_MMDET3D_PYTHON``."""

from __future__ import annotations

import importlib
import importlib.util
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import nn

from cp_debug.errors import InputError, MissingPackage
from cp_debug.interpreter import Interpreter, InterpreterFailed
from cp_debug.optional import install
from cp_debug.reading import read_npz
from cp_debug.recipes.base import Arrays
from cp_debug.recipes.centerpoint.config import HEAD_CHANNELS, CenterPointConfig
from cp_debug.recipes.mmdet3d import runner

COLUMNS = ("x", "y", "z", "intensity", "dt")
PARTS = {
    "pts_voxel_encoder": "PillarFeatureNet",
    "pts_middle_encoder": "PointPillarsScatter",
    "pts_backbone": "SECOND",
    "pts_neck": "SECONDFPN",
    "pts_bbox_head": "CenterHead",
}


SEPARATE_HEADS = ("SeparateHead", "CustomSeparateHead")
"""Heads that compute the same: AWML's differs in the bias that training starts with."""
_KNOWN = {
    "BackwardPillarFeatureNet": "two offsets to the voxel's centre instead of three: one feature less",
    "ConvNeXt_PC": "ConvNeXt blocks: depthwise convolutions, LayerNorm and GELU, no BatchNorm to fold",
}


class Unlike(Exception):
    """The config is not a pillar CenterPoint as this project builds it; the message says where."""


def center_point_config(name: str, model: Mapping[str, Any], columns: Sequence[int] | None) -> CenterPointConfig:
    """The sizes in ``model``, a resolved config; ``columns`` of a stored cloud are fed to it.

    Whether the parts compute the same is not looked at here: weights and tensors tell. Raises Unlike for a config that
    is no such CenterPoint.
    """
    types = {part: model.get(part, {}).get("type") for part in PARTS}
    if missing := [part for part, part_type in types.items() if part_type is None]:
        raise Unlike(f"{model.get('type')} has no {missing[0]}")
    others = [
        f"{part} is {types[part]}{_why(types[part])}, not {kind}"
        for part, kind in PARTS.items()
        if types[part].rpartition(".")[2] != kind
    ]
    if others:
        raise Unlike("; ".join(others))
    try:
        return _converted(name, model, columns)
    except (KeyError, TypeError, IndexError) as error:
        raise Unlike(f"its config has no usable {error}") from None


def _why(part_type: str) -> str:
    """Words on how a part of AWML differs; empty for others."""
    about = _KNOWN.get(part_type.rpartition(".")[2])
    return f" ({about})" if about else ""


def _converted(name: str, model: Mapping[str, Any], columns: Sequence[int] | None) -> CenterPointConfig:
    encoder, backbone, neck, head = (model[part] for part in PARTS if part != "pts_middle_encoder")
    voxels, test = model["data_preprocessor"]["voxel_layer"], model["test_cfg"]["pts"]
    heads = {key: value[0] for key, value in head["common_heads"].items()}
    if heads != HEAD_CHANNELS:
        raise Unlike(f"pts_bbox_head.common_heads is {heads}, not {HEAD_CHANNELS}")
    if columns is None or len(columns) != encoder["in_channels"]:
        columns = range(encoder["in_channels"])
    separate, coder = head["separate_head"], head["bbox_coder"]
    if separate["type"].rpartition(".")[2] not in SEPARATE_HEADS:
        raise Unlike(f"pts_bbox_head.separate_head is {separate['type']}, not {SEPARATE_HEADS[0]}")
    max_voxels = voxels["max_voxels"]
    tasks = tuple(tuple(task["class_names"]) for task in head["tasks"])
    return CenterPointConfig(
        name=name,
        summary="from mmdet3d",
        voxel_size=tuple(voxels["voxel_size"]),
        point_cloud_range=tuple(voxels["point_cloud_range"]),
        max_num_points=voxels["max_num_points"],
        max_voxels=max_voxels if isinstance(max_voxels, int) else max_voxels[1],
        encoder_channels=tuple(encoder["feat_channels"]),
        backbone_channels=tuple(backbone["out_channels"]),
        backbone_layers=tuple(backbone["layer_nums"]),
        backbone_strides=tuple(backbone["layer_strides"]),
        neck_channels=tuple(neck["out_channels"]),
        neck_strides=tuple(neck["upsample_strides"]),
        tasks=tasks,
        nms_min_radius=_radii(test.get("min_radius"), len(tasks)),
        nms_overlap=test["nms_thr"] if test.get("nms_type") == "rotate" else None,
        nms_pre_max_size=test.get("pre_max_size") or 1000,
        post_center_range=tuple(coder["post_center_range"]),
        point_features=tuple(COLUMNS[column] for column in columns),
        head_channels=head.get("share_conv_channel", 64),
        head_kernel=separate.get("final_kernel", 1),
        heatmap_bias=separate.get("init_bias", -2.19),
        score_threshold=coder["score_threshold"],
        max_num=coder["max_num"],
        post_max_size=test["post_max_size"],
    )


def _radii(given: Any, count: int) -> tuple[float, ...]:
    """Circle NMS's threshold of each task; configurations with rotated NMS may have none."""
    radii = tuple(given) if isinstance(given, Sequence) else (given or 0.0,)
    return (radii * count if len(radii) == 1 else radii)[:count]


ENVIRONMENT = "CPDEBUG_MMDET3D_PYTHON"
TIME_LIMIT = 3600.0
"""Seconds for one job: a forward of a large detector on a CPU is the longest."""


class Answer(NamedTuple):
    """A command's result and arrays."""

    result: Mapping[str, Any]
    arrays: Arrays


class ProgramFailed(InputError):
    """torch cannot export a part of the detector as a program."""


class DetectorClient:
    """Runs commands of ``runner.py``.

    Raises MissingPackage when there is no mmdet3d, with both ways to get it.
    """

    def __init__(self) -> None:
        self._commands = runner.Commands()
        self._interpreter: Interpreter | None = None
        python = os.environ.get(ENVIRONMENT)
        if (missing := _missing()) is None:
            return
        if not python:
            raise MissingPackage(f"{missing}; {_install()}")
        try:
            self._interpreter = Interpreter(python, runner.__file__, time_limit=TIME_LIMIT, on_event=lambda event: None)
        except InterpreterFailed as failure:
            raise MissingPackage(f"{ENVIRONMENT}: {failure}; {_install()}") from None

    @property
    def where(self) -> str:
        """The interpreter in which mmdet3d runs, for people."""
        return "this Python" if self._interpreter is None else self._interpreter.python

    def module(self, branch: str) -> nn.Module | None:
        """A branch of the open detector itself; None where it lives in another process."""
        return self._commands.detector.branches[branch] if self._interpreter is None else None

    @property
    def encoder(self) -> nn.Module | None:
        """The pillar encoder behind the decoration; None where it lives in another process."""
        if self._interpreter is not None:
            return None
        return runner.Encoder(self._commands.detector.model.pts_voxel_encoder).eval()

    def call(self, command: str, arrays: Arrays | None = None, **arguments: Any) -> Answer:
        """Run one command. Raises MissingPackage for what its interpreter lacks, InputError for every other failure."""
        with tempfile.TemporaryDirectory(prefix="cpdebug-mmdet3d-") as folder:
            sent, received = Path(folder) / "given.npz", Path(folder) / "made.npz"
            np.savez(sent, **(arrays or {}))  # type: ignore[arg-type]
            step = {"command": command, **arguments, "arrays": str(sent), "made": str(received)}
            result = self._execute({"steps": [step]})
            if error := result.get("error"):
                raise self._to_exception(command, error)
            return Answer(result["results"][0], read_npz(received))

    def _execute(self, job: dict[str, Any]) -> dict[str, Any]:
        if self._interpreter is None:
            return runner.execute(job, lambda event: None, self._commands)
        try:
            return self._interpreter.work(job)
        except InterpreterFailed as failure:
            raise MissingPackage(f"{ENVIRONMENT}: {failure}; {_install()}") from None

    def _to_exception(self, command: str, error: Mapping[str, str]) -> Exception:
        kind, message = error["kind"], error["message"]
        if kind == "import":
            return MissingPackage(f"{message}; {_install()}")
        if kind == "config":
            return InputError(message)
        if kind == "program":
            return ProgramFailed(message)
        return InputError(f"mmdet3d in {self.where} failed in {command}: {message}\n{error.get('traceback', '')}")


def _install() -> str:
    return (
        f"either set {ENVIRONMENT} to a Python >= 3.8 that has mmdet3d (`make mmdet3d-env` in a checkout of cpdebug "
        f"builds one for CPUs), or install mmdet3d into this one: {install('mmdet3d')}, then pip install --no-deps "
        "mmdet==3.3.0 mmdet3d==1.4.0"
    )


def _missing() -> str | None:
    """The reason why mmdet3d cannot be used in this Python; None where it can."""
    spec = importlib.util.find_spec("mmdet3d")
    if spec is None or spec.origin is None:  # a folder of that name is no package
        return "this Python has no mmdet3d"
    try:
        importlib.import_module("mmdet3d")
    except Exception as error:  # it checks its dependencies' versions with assert
        return f"this Python cannot import mmdet3d: {error}"
    return None
