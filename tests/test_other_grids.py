"""Checkpoints of other CenterPoints are refused with the sizes that differ and the recipe that has them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cp_debug.errors import InputError
from cp_debug.recipes.centerpoint.config import CONFIGS, TINY
from cp_debug.recipes.centerpoint.model import build_model
from cp_debug.recipes.centerpoint.recipe import load_weights

CFG = """
voxel_size = {size}
model = dict(
    data_preprocessor=dict(
        type='Det3DDataPreprocessor',
        voxel_layer=dict(max_num_points=20, voxel_size={size}, point_cloud_range={limits}, max_voxels=(1, 2))))
"""


def saved(folder: Path, name: str, size: object = None, limits: object = None) -> Path:
    document = {"state_dict": build_model(CONFIGS[name], seed=0).state_dict()}
    if size is not None:
        document["meta"] = {"cfg": CFG.format(size=size, limits=limits), "epoch": 3}
    torch.save(document, folder / "epoch.pth")
    return folder / "epoch.pth"


def test_the_sizes_that_differ_are_named_with_the_recipe_that_has_them(tmp_path: Path) -> None:
    path = saved(tmp_path, "awml-base")
    network = build_model(TINY, seed=0)
    before = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    with pytest.raises(InputError, match="does not fit the model") as caught:
        load_weights(network, path, TINY)
    last = str(caught.value).splitlines()[-1]
    assert "belongs to another CenterPoint than centerpoint:tiny" in last
    assert "features a point 4 (it has 5)" in last
    assert "backbone channels [64, 128, 256] (it has [32, 64, 128])" in last
    assert "classes of each task [5] (it has [2, 2])" in last
    assert "expected centerpoint:awml-base" in last
    assert "which say nothing about voxel size and range" in last
    assert all(torch.equal(tensor, before[key]) for key, tensor in network.state_dict().items())


def test_weights_of_another_grid_are_refused_though_every_shape_fits(tmp_path: Path) -> None:
    config = CONFIGS["awml-base"]
    network = build_model(config, seed=1)
    path = saved(tmp_path, "awml-base", list(config.voxel_size), list(config.point_cloud_range))
    load_weights(network, path, config)
    near = CONFIGS["awml-base-1020"]
    path = saved(tmp_path, "awml-base", list(near.voxel_size), list(near.point_cloud_range))
    with pytest.raises(InputError, match="trained on another grid than that of centerpoint:awml-base: ") as caught:
        load_weights(network, path, config)
    assert f"voxel_size {list(near.voxel_size)} (it has {list(config.voxel_size)})" in str(caught.value)
    assert "expected centerpoint:awml-base-1020" in str(caught.value)
    path = saved(tmp_path, "awml-base", [0.5, 0.5, 8], list(config.point_cloud_range))
    with pytest.raises(InputError, match=r"no recipe has these; expected mmdet3d:CONFIG\.py"):
        load_weights(network, path, config)


@pytest.mark.parametrize("text", ["model = dict(", "x = 1", "model = dict(voxel_layer=dict(voxel_size=f()))", "\0", 7])
def test_configurations_that_say_nothing_are_passed_over(text: object, tmp_path: Path) -> None:
    network = build_model(TINY, seed=0)
    torch.save({"state_dict": network.state_dict(), "meta": {"cfg": text}}, tmp_path / "epoch.pth")
    load_weights(network, tmp_path / "epoch.pth", TINY)


def test_weights_of_another_kind_of_network_are_told_as_before(tmp_path: Path) -> None:
    torch.save({"a.weight": torch.ones(2)}, tmp_path / "other.pt")
    with pytest.raises(InputError, match="does not fit the model") as caught:
        load_weights(build_model(TINY, seed=0), tmp_path / "other.pt", TINY)
    assert "another CenterPoint" not in str(caught.value)
