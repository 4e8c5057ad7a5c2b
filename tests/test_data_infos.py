"""mmdet3d's info files: clouds, sweeps, frames, classes, and what is wrong with them."""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from draws import RNG

from cp_debug.errors import InputError
from cp_debug.recipes.data.base import DataOptions, DataSet, Truth
from cp_debug.recipes.data.infos import load_plain_pickle
from cp_debug.recipes.data.open_data import open_data

FEATURES = ("x", "y", "z", "intensity", "dt")
CLASSES = ("car", "pedestrian")


def cloud(count: int, columns: int = 5) -> np.ndarray:
    return RNG.uniform(-20, 20, (count, columns)).astype(np.float32)


def instance(label: int, box: Any = (1, 2, 3, 4, 5, 6, 0.5), **more: Any) -> dict[str, Any]:
    return {"bbox_3d": list(box), "bbox_label_3d": label, "num_lidar_pts": 4, "velocity": [1.0, 0.0], **more}


def write(folder: Path, infos: list[dict[str, Any]], **metainfo: Any) -> Path:
    path = folder / "infos.pkl"
    meta = metainfo or {"categories": {"pedestrian": 1, "car": 0, "tram": 2}, "dataset": "nuscenes"}
    path.write_bytes(pickle.dumps({"metainfo": meta, "data_list": infos}))
    return path


def info(name: str, **more: Any) -> dict[str, Any]:
    lidar = {"lidar_path": name, "num_pts_feats": 5}
    return {"token": name, "timestamp": 100.5, "lidar_points": lidar, "instances": [], **more}


def opened(path: Path, count: int = 9, classes: tuple[str, ...] = CLASSES, **options: Any) -> DataSet:
    return open_data(path, features=FEATURES, class_names=classes, count=count, options=DataOptions(**options))


def truth_of(data: DataSet, index: int = 0) -> Truth:
    truth = data.sample(index).truth
    assert isinstance(truth, Truth)
    return truth


def test_sweeps_are_merged_as_mmdet3d_merges_them(tmp_path: Path) -> None:
    key, earlier, earliest = cloud(50), cloud(40), cloud(30)
    earlier[:7, :2] = RNG.uniform(-0.99, 0.99, (7, 2))  # the car itself
    earlier[7:9, :2] = [[0.5, -1.0], [1.0, 0.5]]  # near in one direction alone
    (tmp_path / "samples/LIDAR_TOP").mkdir(parents=True)
    (tmp_path / "sweeps/LIDAR_TOP").mkdir(parents=True)
    key.tofile(tmp_path / "samples/LIDAR_TOP/a.pcd.bin")
    for name, points in (("b", earlier), ("c", earliest)):
        points.tofile(tmp_path / f"sweeps/LIDAR_TOP/{name}.pcd.bin")
    matrices = RNG.normal(size=(2, 4, 4)).astype(np.float32)
    sweeps = [
        {"timestamp": stamp, "lidar_points": {"lidar_path": f"{name}.pcd.bin", "lidar2sensor": matrix.tolist()}}
        for name, stamp, matrix in (("b", 100.45, matrices[0]), ("c", 100.4, matrices[1]))
    ]
    path = write(tmp_path, [info("a.pcd.bin", lidar_sweeps=sweeps)])

    expected = [np.c_[key[:, :4], np.zeros(50)]]
    for points, sweep, matrix in ((earlier, sweeps[0], matrices[0]), (earliest, sweeps[1], matrices[1])):
        kept = points[~((np.abs(points[:, 0]) < 1) & (np.abs(points[:, 1]) < 1))]
        kept[:, :3] = kept[:, :3] @ np.array(matrix.tolist())[:3, :3]
        kept[:, :3] -= np.array(matrix.tolist())[:3, 3]
        kept[:, 4] = 100.5 - sweep["timestamp"]
        expected.append(kept)
    points = opened(path).sample(0).arrays["points"]
    assert points.dtype == np.float32
    assert len(points) == 50 + 33 + 30
    np.testing.assert_array_equal(points, np.concatenate(expected).astype(np.float32))
    np.testing.assert_array_equal(opened(path, sweeps=1).sample(0).arrays["points"], points[:83])
    no_time = open_data(path, features=FEATURES[:4], class_names=CLASSES, count=1)
    np.testing.assert_array_equal(no_time.sample(0).arrays["points"], key[:, :4])


def test_a_standing_point_stays_where_it_is_while_the_car_drives_on(tmp_path: Path) -> None:
    """The car went 3 m ahead since the sweep, so that the sweep's points are 3 m nearer now."""
    cloud(1).tofile(tmp_path / "now.pcd.bin")
    np.array([[10, 5, 1, 0, 0]], np.float32).tofile(tmp_path / "before.pcd.bin")
    reference_to_sweep = np.eye(4)
    reference_to_sweep[0, 3] = 3
    sweep = {"timestamp": 100.0, "lidar_points": {"lidar_path": "before.pcd.bin", "lidar2sensor": reference_to_sweep}}
    points = opened(write(tmp_path, [info("now.pcd.bin", lidar_sweeps=[sweep])])).sample(0).arrays["points"]
    np.testing.assert_allclose(points[1], [7, 5, 1, 0, 0.5])


def test_classes_are_mapped_by_name_and_the_others_listed(tmp_path: Path) -> None:
    cloud(3).tofile(tmp_path / "a.pcd.bin")
    found = [instance(1), instance(2), instance(-1), instance(0, velocity=[np.nan, np.nan], num_radar_pts=2)]
    data = opened(write(tmp_path, [info("a.pcd.bin", instances=found)]), classes=("pedestrian", "Car", "bus"))
    assert truth_of(data).labels.tolist() == [0, 1]
    assert truth_of(data).num_points.tolist() == [4, 6]
    assert np.isnan(truth_of(data).velocities).tolist() == [[False, False], [True, True]]
    assert data.notes == [
        "classes in the data that the model lacks, left out: tram (1)",
        "classes of the model that the data lacks: bus",
    ]


def test_t4_lists_classes_and_names_paths_below_the_data_root(tmp_path: Path) -> None:
    (tmp_path / "root/db/scene/0/data/LIDAR_CONCAT").mkdir(parents=True)
    (tmp_path / "root/info").mkdir()
    name = "db/scene/0/data/LIDAR_CONCAT/0.pcd.bin"
    cloud(6).tofile(tmp_path / "root" / name)
    path = write(
        tmp_path / "root/info", [info(name, instances=[instance(1)])], classes=["car", "pedestrian"], version="x"
    )
    for options in ({}, {"root": tmp_path / "root"}):
        data = opened(path, **options)
        assert len(data.sample(0).arrays["points"]) == 6
        truth = truth_of(data)
        assert truth.labels.tolist() == [1]
        np.testing.assert_allclose(truth.boxes, [[1, 2, 3, 4, 5, 6, 0.5]])


def test_kitti_boxes_come_from_the_camera_with_their_bottom(tmp_path: Path) -> None:
    """Camera: right, down, forward; 8 m ahead of the LiDAR that sits 0.5 m above it, heading to the left."""
    cloud(3, 4).tofile(tmp_path / "000001.bin")
    lidar2cam = [[0, -1, 0, 0], [0, 0, -1, 0.5], [1, 0, 0, 0], [0, 0, 0, 1]]
    lidar = {"lidar_path": "000001.bin", "num_pts_feats": 4}
    entry = {
        "sample_id": 1,
        "lidar_points": lidar,
        "images": {"CAM2": {"lidar2cam": lidar2cam}},
        "instances": [instance(2, (2, 1.5, 8, 4, 1.4, 1.6, np.pi)), instance(-1, [-1000] * 7)],
    }
    data = open_data(
        write(tmp_path, [entry], DATASET="KITTI"), features=FEATURES[:4], class_names=("car", "cyclist"), count=1
    )
    truth = truth_of(data)
    assert truth.labels.tolist() == [0]
    np.testing.assert_allclose(truth.boxes, [[8, -2, -1 + 0.7, 4, 1.6, 1.4, np.pi / 2]], atol=1e-6)
    assert np.isnan(truth.velocities).sum() == 0


def test_missing_clouds_are_listed_and_can_be_skipped(tmp_path: Path) -> None:
    cloud(3).tofile(tmp_path / "there.pcd.bin")
    names = ["gone1.pcd.bin", "there.pcd.bin", *(f"gone{index}.pcd.bin" for index in range(2, 9))]
    path = write(tmp_path, [info(name) for name in names])
    with pytest.raises(
        InputError, match=r"8 of 9 samples lack point clouds: gone1\.pcd\.bin, .* and 3 more .*--skip-m"
    ):
        opened(path)
    data = opened(path, skip_missing=True)
    assert len(data) == 1
    assert "there.pcd.bin" in data.sample(0).source
    assert any("8 of 9 samples lack point clouds: gone1.pcd.bin" in note for note in data.notes)
    with pytest.raises(InputError, match="1 of 1 samples lack"):
        opened(write(tmp_path, [info("gone.pcd.bin")]), skip_missing=True)


def test_an_empty_cloud_is_a_sample_without_points(tmp_path: Path) -> None:
    (tmp_path / "a.pcd.bin").touch()
    sample = opened(write(tmp_path, [info("a.pcd.bin")])).sample(0)
    assert sample.arrays["points"].shape == (0, 5)
    assert truth_of(opened(write(tmp_path, [info("a.pcd.bin")]))).boxes.shape == (0, 7)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"infos": [], "metadata": {}}, r"expected a dictionary with metainfo and data_list .* converts older files"),
        ([1, 2], "expected a dictionary with metainfo and data_list"),
        ({"metainfo": {}, "data_list": []}, "neither categories nor classes"),
        ({"metainfo": {"classes": ["car"]}, "data_list": []}, "data_list is empty"),
        (
            {"metainfo": {"classes": ["car"]}, "data_list": [{}]},
            r"an entry of data_list has no lidar_points\.lidar_path",
        ),
    ],
)
def test_other_content_is_refused(tmp_path: Path, content: object, message: str) -> None:
    path = tmp_path / "infos.pkl"
    path.write_bytes(pickle.dumps(content))
    with pytest.raises(InputError, match=message):
        opened(path)


def test_a_label_without_a_class_is_refused(tmp_path: Path) -> None:
    cloud(3).tofile(tmp_path / "a.pcd.bin")
    with pytest.raises(InputError, match=r"bbox_label_3d 7 is none of metainfo's classes \(car, pedestrian, tram\)"):
        opened(write(tmp_path, [info("a.pcd.bin", instances=[instance(7)])]))


class Runs:
    """Would run a command when unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        import os

        return os.system, ("touch pwned",)


@pytest.mark.parametrize("content", [b"\x80\x04\x8c\x02\x8f\x8f.", b"(i", b"", b"}K\x01s."])
def test_a_broken_pickle_is_refused_without_words_about_python(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "i.pkl").write_bytes(content)
    with pytest.raises(InputError, match=r"i\.pkl: .*not a readable pickle") as refused:
        load_plain_pickle(tmp_path / "i.pkl")
    assert not re.search(r"Error|codec|NoneType|object", str(refused.value))


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_of_anything_but_numpy_is_refused_and_named(tmp_path: Path, protocol: int, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "a.pkl"
    path.write_bytes(pickle.dumps({"data_list": [Runs()]}, protocol))
    with pytest.raises(InputError, match=r"a\.pkl: refused, because it asks for posix\.system|nt\.system"):
        load_plain_pickle(path)
    assert not (tmp_path / "pwned").exists()
    for unwanted in (np.save, eval, Path("x"), getattr):
        path.write_bytes(pickle.dumps(unwanted, protocol))
        with pytest.raises(InputError, match="refused, because it asks for"):
            load_plain_pickle(path)


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_plain_content_is_read_in_every_protocol(tmp_path: Path, protocol: int) -> None:
    content = {
        "array": np.arange(6, dtype=np.float32).reshape(2, 3),
        "objects": np.array([{"a": 1}, None], dtype=object),
        "scalar": np.float64(0.5),
        "flag": np.True_,
        "plain": [1, 2.5, "x", b"y", None, (1,), {2}],
    }
    path = tmp_path / "a.pkl"
    path.write_bytes(pickle.dumps(content, protocol))
    read = load_plain_pickle(path)
    np.testing.assert_array_equal(read.pop("array"), content.pop("array"))
    assert read.pop("objects").tolist() == content.pop("objects").tolist()
    assert read == content
    assert read["scalar"].dtype == np.float64


def test_a_broken_pickle_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.pkl"
    path.write_bytes(pickle.dumps(list(range(1000)))[:100])
    with pytest.raises(InputError, match=r"a\.pkl: not a readable pickle"):
        load_plain_pickle(path)
    with pytest.raises(InputError, match=r"gone\.pkl: no such file"):
        load_plain_pickle(tmp_path / "gone.pkl")


@pytest.fixture
def nuscenes(shared: Path, tmp_path: Path) -> Path:
    """The shared frame as its info file names it."""
    content = load_plain_pickle(shared / "data/nuscenes_frame.pkl")
    (tmp_path / "samples/LIDAR_TOP").mkdir(parents=True)
    name = content["data_list"][0]["lidar_points"]["lidar_path"]
    (tmp_path / "samples/LIDAR_TOP" / name).symlink_to(shared / "data/nuscenes_frame.pcd.bin")
    path = tmp_path / "infos.pkl"
    path.symlink_to(shared / "data/nuscenes_frame.pkl")
    return path


def points_in_boxes(points: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """How many of ``points`` [N, ≥ 3] are in each box [M, 7] (gravity centre; the faces belong to it): [M]."""
    counts = np.zeros(len(boxes), dtype=np.int64)
    for index, (x, y, z, *size, yaw) in enumerate(boxes[:, :7].astype(np.float64)):
        offset = points[:, :3] - (x, y, z)
        cos, sin = np.cos(yaw), np.sin(yaw)
        along, across = offset[:, 0] * cos + offset[:, 1] * sin, offset[:, 1] * cos - offset[:, 0] * sin
        local = np.stack((along, across, offset[:, 2]), axis=1)
        counts[index] = (np.abs(local) <= np.divide(size, 2)).all(axis=1).sum()
    return counts


NUSCENES = (
    "car", "truck", "construction_vehicle", "bus", "trailer",
    "barrier", "motorcycle", "bicycle", "pedestrian", "traffic_cone",
)  # fmt: skip


def test_the_nuscenes_annotations_reproduce(nuscenes: Path) -> None:
    data = opened(nuscenes, classes=NUSCENES)
    sample, truth = data.sample(0), truth_of(data)
    assert sample.arrays["points"].shape == (34_688, 5)
    assert not data.notes
    assert len(truth.labels) == 68  # the 69th is to be ignored
    found = load_plain_pickle(nuscenes)["data_list"][0]["instances"]
    counted = points_in_boxes(sample.arrays["points"], np.array([each["bbox_3d"] for each in found]))
    assert (counted == [each["num_lidar_pts"] for each in found]).sum() >= 61
    names = np.array(NUSCENES)[truth.labels]
    assert {name for name, attribute in zip(names, truth.attributes, strict=True) if not attribute} <= {
        "barrier",
        "traffic_cone",
    }
    standing = truth.velocities[truth.attributes == "pedestrian.standing"]
    assert np.nanmax(np.linalg.norm(standing, axis=1)) < 0.5


def test_the_kitti_annotations_reproduce(shared: Path, tmp_path: Path) -> None:
    (tmp_path / "000008.bin").symlink_to(shared / "data/kitti_000008.bin")
    (tmp_path / "kitti.pkl").symlink_to(shared / "data/kitti_000008.pkl")
    data = open_data(tmp_path / "kitti.pkl", features=FEATURES[:4], class_names=("car",), count=1)
    truth = truth_of(data)
    assert len(truth.labels) == 6
    np.testing.assert_array_equal(points_in_boxes(data.sample(0).arrays["points"], truth.boxes), truth.num_points)
