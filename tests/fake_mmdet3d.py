"""mmengine and mmdet3d as far as the runner asks for them: the detectors are this project's own CenterPoint, and a
VoxelNet with a custom operator in its head. Config files are Python files that define ``model``.
"""

from __future__ import annotations

import sys
from pathlib import Path

FILES = {
    "mmengine/__init__.py": "__version__ = '0.0'",
    "mmengine/config.py": """
import runpy

class Settings(dict):
    __getattr__ = dict.__getitem__
    def to_dict(self):
        return dict(self)

class Config(Settings):
    @staticmethod
    def fromfile(path):
        found = Config(runpy.run_path(path))
        found["model"] = Settings(found["model"])
        return found
""",
    "mmengine/registry.py": "def init_default_scope(scope): assert scope == 'mmdet3d'",
    "mmdet3d/__init__.py": "__version__ = '0.1'\nprint('what a library prints')",
    "mmdet3d/structures.py": """
from types import SimpleNamespace

LiDARInstance3DBoxes = lambda tensor: SimpleNamespace(tensor=tensor)
Box3DMode = SimpleNamespace(LIDAR=0)
Det3DDataSample = SimpleNamespace
""",
    "mmdet3d/registry.py": """
from types import SimpleNamespace
import torch
from torch import nn
from cp_debug.recipes.centerpoint import model as built_in
from cp_debug.recipes.centerpoint.config import TINY
from cp_debug.recipes.centerpoint.decode import decode
from cp_debug.recipes.centerpoint.model import PillarFeatureNet, decorate
from cp_debug.recipes.centerpoint.model import scatter
from cp_debug.recipes.centerpoint.model import Voxels, voxelize

def preprocessor(data, training):
    (points,) = data["inputs"]["points"]
    return {"inputs": {"voxels": voxelize(points, TINY)._asdict()}, "data_samples": data["data_samples"]}

class Encoder(PillarFeatureNet):
    def forward(self, voxels, num_points, coors):
        return super().forward(decorate(Voxels(voxels, num_points, coors), TINY)).squeeze(1)

class Scatter(nn.Module):
    def forward(self, features, coors):
        return scatter(features.unsqueeze(1), coors, TINY.grid)

class Neck(built_in.SECONDFPN):
    def forward(self, x):
        return [super().forward(x)]

class Head(built_in.CenterHead):
    def forward(self, feats):
        x = self.shared_conv(feats[0])
        return tuple([dict(reversed(head(x).items()))] for head in self.task_heads)

class CenterPoint(nn.Module):
    def __init__(self, settings):
        super().__init__()
        self.data_preprocessor = preprocessor
        self.pts_voxel_encoder, self.pts_middle_encoder = Encoder(TINY), Scatter()
        self.pts_backbone, self.pts_neck, self.pts_bbox_head = built_in.SECOND(TINY), Neck(TINY), Head(TINY)
        for norm in (m for m in self.modules() if isinstance(m, nn.BatchNorm2d) and settings.get("eps")):
            norm.eps = settings["eps"]

    def forward(self, inputs, samples, mode):
        pillars = inputs["voxels"]
        canvas = self.pts_middle_encoder(self.pts_voxel_encoder(**pillars), pillars["coors"])
        tasks = self.pts_bbox_head(self.pts_neck(self.pts_backbone(canvas)))
        named = {f"task{i}.{k}": v for i, (maps,) in enumerate(tasks) for k, v in maps.items()}
        (found,) = decode(named, TINY)
        boxes, scores, labels = map(torch.from_numpy, (found.boxes, found.scores, found.labels))
        predicted = {"bboxes_3d": SimpleNamespace(tensor=boxes), "scores_3d": scores, "labels_3d": labels}
        return [SimpleNamespace(pred_instances_3d=SimpleNamespace(**predicted))]

class Custom(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return torch.from_numpy(x.numpy() * 2)

class CustomHead(nn.Conv2d):
    def forward(self, x):
        return [Custom.apply(super().forward(x))]

class VoxelNet(nn.Module):
    def __init__(self, settings):
        super().__init__()
        self.data_preprocessor = preprocessor
        self.backbone = nn.Sequential(nn.Conv2d(settings["channels"], 4, 3), nn.ReLU(inplace=True))
        self.bbox_head = CustomHead(4, 2, 1) if settings.get("custom") else nn.Conv2d(4, 2, 1)
        if settings.get("roi"):
            self.roi_head = nn.Linear(2, 2)

    def forward(self, inputs, samples, mode):
        voxels = inputs["voxels"]
        if settings_need_cuda(self):
            raise RuntimeError("not implemented on CPU")
        return self.bbox_head(self.backbone(voxels["voxels"].mean((0, 1)).expand(1, 8, 8, -1).permute(0, 3, 1, 2)))

def settings_need_cuda(model):
    return model.backbone[0].in_channels != 5

class MODELS:
    @staticmethod
    def build(settings):
        return {"CenterPoint": CenterPoint, "VoxelNet": VoxelNet}[settings["type"]](settings)
""",
    "mmdet3d/.mim/configs/centerpoint/centerpoint_pillar_tiny.py": """
lengths = [-25.6, -25.6, -5.0, 25.6, 25.6, 3.0]
model = dict(
    type="CenterPoint",
    data_preprocessor=dict(
        voxel_layer=dict(
            voxel_size=[0.4, 0.4, 8.0], point_cloud_range=lengths, max_num_points=20, max_voxels=(9_000, 10_000)
        )
    ),
    pts_voxel_encoder=dict(type="PillarFeatureNet", in_channels=5, feat_channels=[32]),
    pts_middle_encoder=dict(type="PointPillarsScatter"),
    pts_backbone=dict(type="SECOND", out_channels=[32, 64, 128], layer_nums=[2, 2, 2], layer_strides=[1, 2, 2]),
    pts_neck=dict(type="SECONDFPN", out_channels=[64, 64, 64], upsample_strides=[0.5, 1, 2]),
    pts_bbox_head=dict(
        type="CenterHead",
        share_conv_channel=32,
        tasks=[dict(class_names=["car", "truck"]), dict(class_names=["pedestrian", "cyclist"])],
        common_heads=dict(reg=(2, 2), height=(1, 2), dim=(3, 2), rot=(2, 2), vel=(2, 2)),
        bbox_coder=dict(post_center_range=[-30.0, -30.0, -10.0, 30.0, 30.0, 10.0], max_num=500, score_threshold=0.1),
        separate_head=dict(type="SeparateHead", init_bias=-2.19, final_kernel=3),
    ),
    test_cfg=dict(pts=dict(nms_type="circle", min_radius=[4.0, 0.5], post_max_size=83)),
)
test_pipeline = [dict(type="LoadPointsFromMultiSweeps", use_dim=[0, 1, 2, 3, 4])]
""",
    "mmdet3d/.mim/configs/second/voxel_net.py": """
model = dict(type="VoxelNet", channels=5)
test_pipeline = [dict(type="LoadPointsFromFile", use_dim=5)]
""",
    "mmdet3d/.mim/configs/_base_/nothing.py": "",
}


def install(folder: Path) -> Path:
    """Write the packages to ``folder``; a Python that has them, as a command."""
    for name, text in FILES.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    python = folder / "python"
    repo = Path(__file__).resolve().parents[1]
    python.write_text(f'#!/bin/sh\nPYTHONPATH="{folder}:{repo}" exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    return python
