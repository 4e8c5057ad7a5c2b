"""Folders of point files, and PCD in its three encodings."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cp_debug.errors import InputError
from cp_debug.recipes.centerpoint.config import AWML_BASE, TINY
from cp_debug.recipes.centerpoint.recipe import CenterPointModel
from cp_debug.recipes.centerpoint.scenes import CLASSES, HELD_OUT_SEED, generate_scene
from cp_debug.recipes.data.base import Truth
from cp_debug.recipes.data.open_data import open_data
from cp_debug.recipes.data.points import lzf_decompress, read_pcd, read_points

FEATURES = TINY.point_features


def pcd(encoding: str, body: bytes, count: int = 2, fields: str = "x y z i _ ring") -> bytes:
    header = f"""# .PCD v0.7
VERSION 0.7
FIELDS {fields}
SIZE 4 4 4 1 1 2
TYPE F F F U U U
COUNT 1 1 1 1 3 1
WIDTH {count}
HEIGHT 1
VIEWPOINT 0 0 0 1 0 0 0
POINTS {count}
DATA {encoding}
"""
    return header.encode() + body


ROWS = ((1.5, -2.0, 3.0, 200, 7), (4.0, 5.0, -6.0, 9, 8))
EXPECTED = [[1.5, -2, 3, 200, 0], [4, 5, -6, 9, 0]]
BINARY = b"".join(struct.pack("<fffB3xH", *row) for row in ROWS)
BY_FIELD = struct.pack("<6f2B6x2H", 1.5, 4, -2, 5, 3, -6, 200, 9, 7, 8)


def literal_lzf(plain: bytes) -> bytes:
    """LZF that only copies."""
    runs = [plain[start : start + 32] for start in range(0, len(plain), 32)]
    return b"".join(bytes([len(run) - 1]) + run for run in runs)


def compressed(plain: bytes) -> bytes:
    packed = literal_lzf(plain)
    return struct.pack("<II", len(packed), len(plain)) + packed


@pytest.mark.parametrize(
    ("encoding", "body"),
    [
        ("ascii", b"1.5 -2 3 200 0 0 0 7\n4 5 -6 9 0 0 0 8\n"),
        ("binary", BINARY),
        ("binary_compressed", compressed(BY_FIELD)),
    ],
)
def test_pcd_encodings(tmp_path: Path, encoding: str, body: bytes) -> None:
    path = tmp_path / "a.pcd"
    path.write_bytes(pcd(encoding, body))
    found = read_pcd(path)
    assert set(found) == {"x", "y", "z", "i", "ring"}
    assert found["ring"].tolist() == [7, 8]
    np.testing.assert_array_equal(read_points(path, FEATURES), EXPECTED)
    np.testing.assert_array_equal(read_points(path, AWML_BASE.point_features), np.delete(EXPECTED, 3, axis=1))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pcd("binary", BINARY[:-1]), "not a readable .pcd file"),
        (pcd("binary_lz4", BINARY), "DATA binary_lz4; expected ascii, binary or"),
        (pcd("binary_compressed", compressed(BY_FIELD[:-1])), "bytes for 2 rows"),
        (pcd("binary", BINARY, fields="x y w i _ ring"), "has no field z; it has x, y, w, i, ring"),
        (b"\x00\x01\x02\n", "not a readable .pcd file"),
        (b"", "not a readable .pcd file"),
    ],
)
def test_bad_pcd_files_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.pcd").write_bytes(content)
    with pytest.raises(InputError, match=rf"a\.pcd: .*{message}"):
        read_points(tmp_path / "a.pcd", FEATURES)


@given(st.binary(max_size=200))
def test_lzf_of_literals_comes_back(plain: bytes) -> None:
    assert lzf_decompress(literal_lzf(plain), len(plain)) == plain


def test_lzf_copies_from_before_and_into_itself() -> None:
    assert lzf_decompress(b"\x02abc" + b"\x20\x02", 6) == b"abcabc"
    assert lzf_decompress(b"\x00a" + b"\xe0\x05\x00", 15) == b"a" * 15
    assert lzf_decompress(b"\x01ab" + b"\x60\x01" + b"\x00c", 8) == b"abababac"
    with pytest.raises(ValueError, match="before the start"):
        lzf_decompress(b"\x00a\x20\x05", 4)
    with pytest.raises(ValueError, match="expected 9"):
        lzf_decompress(b"\x00a", 9)


def test_a_folder_is_read_by_name(tmp_path: Path) -> None:
    clouds = {name: np.random.default_rng(0).random((3, 5)).astype(np.float32) for name in ("b", "a", "c")}
    for name, cloud in clouds.items():
        cloud.tofile(tmp_path / f"{name}.pcd.bin")
    (tmp_path / "notes.txt").write_text("not a cloud")
    model = CenterPointModel("tiny")
    samples = list(model.samples(2, 0, tmp_path))
    assert [Path(sample.source).name for sample in samples] == ["a.pcd.bin", "b.pcd.bin"]
    np.testing.assert_array_equal(samples[0].arrays["points"][:, :4], clouds["a"][:, :4])
    assert samples[0].truth is None
    (single,) = model.samples(5, 0, tmp_path / "c.pcd.bin")
    assert single.source.endswith("c.pcd.bin")


def test_a_folder_without_clouds_and_a_path_to_nothing_are_refused(tmp_path: Path) -> None:
    for path, message in ((tmp_path, "holds no sample"), (tmp_path / "gone", "no such file or folder")):
        with pytest.raises(InputError, match=message):
            open_data(path, features=FEATURES, class_names=("car",), count=1)


def test_the_default_data_are_the_held_out_scenes() -> None:
    model = CenterPointModel("tiny")
    first, second = model.samples(2, 7, None)
    scene = generate_scene(HELD_OUT_SEED + 8)
    assert (first.source, second.source) == ("held-out synthetic scene 7", "held-out synthetic scene 8")
    np.testing.assert_array_equal(second.arrays["points"], scene.points)
    assert isinstance(second.truth, Truth)
    np.testing.assert_array_equal(second.truth.boxes, scene.boxes)
    moving = np.linalg.norm(scene.velocities, axis=1) > 0.2
    pedestrian = list(CLASSES).index("pedestrian")
    for label, attribute, moves in zip(scene.labels, second.truth.attributes, moving, strict=True):
        expected = "pedestrian.moving" if moves else "pedestrian.standing"
        assert (attribute == expected) == (label == pedestrian)
    (other,) = CenterPointModel("awml-base").samples(1, 8, None)
    assert other.truth is None
    assert other.arrays["points"].shape == (len(scene.points), 4)
