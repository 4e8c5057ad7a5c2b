"""CenterPoint's files: point clouds and checkpoints, good and bad."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from cp_debug.errors import InputError
from cp_debug.recipes.centerpoint.config import AWML_BASE, TINY
from cp_debug.recipes.centerpoint.model import build_model
from cp_debug.recipes.checkpoint import load_checkpoint, read_torch
from cp_debug.recipes.data.points import read_points

TINY_FEATURES = TINY.point_features


def test_a_nuscenes_file_gets_time_zero_instead_of_its_ring(tmp_path: Path) -> None:
    raw = np.arange(15, dtype=np.float32).reshape(3, 5)
    raw.tofile(tmp_path / "a.pcd.bin")
    np.testing.assert_array_equal(read_points(tmp_path / "a.pcd.bin", TINY_FEATURES), np.c_[raw[:, :4], np.zeros(3)])
    np.testing.assert_array_equal(
        read_points(tmp_path / "a.pcd.bin", AWML_BASE.point_features), np.c_[raw[:, :3], np.zeros(3)]
    )


def test_a_kitti_file_has_four_columns(tmp_path: Path) -> None:
    raw = np.arange(8, dtype=np.float32).reshape(2, 4)
    raw.tofile(tmp_path / "a.bin")
    np.testing.assert_array_equal(read_points(tmp_path / "a.bin", TINY_FEATURES), np.c_[raw, np.zeros(2)])


def test_numpy_files_hold_the_columns_of_the_model(tmp_path: Path) -> None:
    points = np.arange(10, dtype=np.float32).reshape(2, 5)
    np.save(tmp_path / "a.npy", points)
    np.savez(tmp_path / "a.npz", points=points)
    for name in ("a.npy", "a.npz"):
        np.testing.assert_array_equal(read_points(tmp_path / name, TINY_FEATURES), points)


def test_an_empty_file_is_an_empty_cloud(tmp_path: Path) -> None:
    (tmp_path / "a.bin").touch()
    assert read_points(tmp_path / "a.bin", TINY_FEATURES).shape == (0, 5)


@pytest.mark.parametrize(
    ("name", "floats", "message"),
    [
        ("a.pcd.bin", 7, r"a\.pcd\.bin: 28 bytes is not a multiple of 5 float32 columns"),
        ("a.bin", 15, r"a\.bin: 60 bytes .* 4 float32 columns .*fits the 5 columns of \*\.pcd\.bin"),
        ("a.ply", 4, r"a\.ply: not a point file"),
        ("a.npy", 4, r"a\.npy: not a readable \.npy file"),
        ("a.npz", 4, r"a\.npz: not a readable \.npz file"),
    ],
)
def test_a_bad_point_file_is_refused(tmp_path: Path, name: str, floats: int, message: str) -> None:
    np.ones(floats, dtype=np.float32).tofile(tmp_path / name)
    with pytest.raises(InputError, match=message):
        read_points(tmp_path / name, TINY_FEATURES)


def test_arrays_of_another_name_shape_or_type_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"gone\.bin: no such"):
        read_points(tmp_path / "gone.bin", TINY_FEATURES)
    np.savez(tmp_path / "a.npz", cloud=np.zeros((2, 5)))
    with pytest.raises(InputError, match="array 'points'; it has cloud"):
        read_points(tmp_path / "a.npz", TINY_FEATURES)
    for array, found in ((np.zeros((2, 4)), r"shape \[2, 4\]"), (np.full((2, 5), "x"), "<U1")):
        np.save(tmp_path / "a.npy", array)
        with pytest.raises(InputError, match=found):
            read_points(tmp_path / "a.npy", TINY_FEATURES)


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    return build_model(TINY, seed=5).state_dict()


@pytest.mark.parametrize("kind", ["plain.pt", "mmengine.pth", "plain.safetensors"])
def test_a_checkpoint_fills_every_tensor(tmp_path: Path, state: dict[str, torch.Tensor], kind: str) -> None:
    path = tmp_path / kind
    if kind.endswith("safetensors"):
        save_file(state, path)
    else:
        torch.save({"meta": {"epoch": 3}, "state_dict": state} if kind.startswith("mmengine") else state, path)
    model = build_model(TINY, seed=0)
    load_checkpoint(model, path)
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())


def test_a_misfit_names_five_keys_counts_the_rest_and_leaves_the_model_alone(
    tmp_path: Path, state: dict[str, torch.Tensor]
) -> None:
    kept = {key: tensor for key, tensor in state.items() if not key.startswith("pts_neck.deblocks")}
    kept |= {"backbone.weight": torch.zeros(1), "pts_bbox_head.task_heads.0.reg.1.weight": torch.zeros(2, 2)}
    torch.save(kept, tmp_path / "a.pt")
    model = build_model(TINY, seed=0)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(InputError) as caught:
        load_checkpoint(model, tmp_path / "a.pt")
    message = str(caught.value)
    assert "missing keys: pts_neck.deblocks.0.0.weight, " in message
    assert "and 13 more" in message
    assert message.count("pts_neck.deblocks") == 5
    assert "the model does not have: backbone.weight" in message
    assert "pts_bbox_head.task_heads.0.reg.1.weight [2, 2] (expected [2, 32, 3, 3])" in message
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


class Marker:
    """Not a tensor: needs this module's code to be unpickled."""


def test_a_checkpoint_that_needs_pickled_code_is_refused(tmp_path: Path) -> None:
    torch.save({"state_dict": {}, "meta": Marker()}, tmp_path / "a.pth")
    with pytest.raises(InputError, match=r"a\.pth: refused, because loading it would run code"):
        load_checkpoint(build_model(TINY), tmp_path / "a.pth")


def test_what_torch_warns_of_its_reader_is_not_told(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "a.pth", pickle_protocol=4)
    with pytest.raises(InputError, match="refused"):  # the protocol is another, of which torch warns, too
        read_torch(tmp_path / "a.pth")
    assert not recwarn.list


@pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
def test_a_truncated_checkpoint_is_refused(tmp_path: Path, state: dict[str, torch.Tensor], name: str) -> None:
    path = tmp_path / name
    if name.endswith("safetensors"):
        save_file(state, path)
    else:
        torch.save(state, path)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(InputError, match=rf"{name}: not a readable"):
        load_checkpoint(build_model(TINY), path)


def test_a_missing_checkpoint_and_one_without_tensors_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such checkpoint"):
        load_checkpoint(build_model(TINY), tmp_path / "gone.pt")
    torch.save([1, 2], tmp_path / "a.pt")
    with pytest.raises(InputError, match="expected a dictionary of tensors"):
        load_checkpoint(build_model(TINY), tmp_path / "a.pt")
