"""mmdet3d's info files of version 1.1 ("v2"): nuScenes, TIER IV's T4 and KITTI.

Changes of coordinate frames are computed as in mmdet3d 1.4, bit for bit. Reading a file's pickle runs no code of its
choice, and every entry that is used has the type that it must have.
"""

from __future__ import annotations

import io
import pickle
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import AfterValidator, BeforeValidator, Field
from typing_extensions import TypedDict

from cp_debug.errors import InputError
from cp_debug.files import resolved
from cp_debug.reading import read_bytes, readable, typed
from cp_debug.recipes.base import Sample
from cp_debug.recipes.data.base import NAMES, DataOptions, Truth
from cp_debug.recipes.data.points import Points, read_points
from cp_debug.safe_text import some

LARGEST = 1 << 32
"""Largest size of a file in bytes."""

_NUMPY_MODULES = {"numpy.core.multiarray", "numpy._core.multiarray", "numpy.core.numeric", "numpy._core.numeric"}
_NUMPY_FUNCTIONS = {"_reconstruct", "scalar", "_frombuffer"}


def _encode(text: str, encoding: str) -> bytes:
    """Bytes from text, as protocol 2 stores them."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"bytes in the encoding {encoding!r}; expected latin1")
    return text.encode("latin1")


_PLAIN: dict[tuple[str, str], Callable[..., Any]] = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("collections", "OrderedDict"): OrderedDict,
    ("_codecs", "encode"): _encode,
    **{(module, kind.__name__): kind for module in ("builtins", "__builtin__") for kind in (set, frozenset, complex)},
}


class _Refused(Exception):
    """A name that the file asks for and does not get."""


class _PlainUnpickler(pickle.Unpickler):
    """Unpickler that builds plain containers and numpy arrays, and refuses every other name."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _PLAIN:
            return _PLAIN[module, name]
        if module in _NUMPY_MODULES and name in _NUMPY_FUNCTIONS:
            return super().find_class(module, name)
        raise _Refused(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        raise _Refused("a persistent object")


def load_plain_pickle(path: Path) -> Any:
    """The object pickled in ``path``.

    Raises InputError for a missing or broken file, and for a name that is refused, which the message tells.
    """
    data = read_bytes(path, what="file", most=LARGEST)
    with readable(path, "a readable pickle"):
        try:
            return _PlainUnpickler(io.BytesIO(data)).load()
        except _Refused as refused:
            raise InputError(
                f"{path}: refused, because it asks for {refused}; expected numpy arrays and plain containers only"
            ) from None


def _plain(value: Any) -> Any:
    """numpy's numbers and arrays as Python's own; what takes too much room stays, and is then refused."""
    if isinstance(value, np.generic) or (isinstance(value, np.ndarray) and value.size < 1000):
        return value.tolist()
    return value


def _invertible(matrix: list[list[float]]) -> list[list[float]]:
    array = np.array(matrix)
    if not np.isfinite(array).all() or abs(np.linalg.det(array)) < 1e-9:
        raise ValueError("expected a matrix that can be inverted")
    return matrix


def _without_null(text: str) -> str:
    if "\0" in text:
        raise ValueError("a null byte")
    return text


Number = Annotated[float, BeforeValidator(_plain)]
Whole = Annotated[int, BeforeValidator(_plain), Field(ge=-(1 << 31), lt=1 << 31)]
Box = Annotated[list[float], BeforeValidator(_plain), Field(min_length=7, max_length=7)]
_Row = Annotated[list[float], BeforeValidator(_plain), Field(min_length=4, max_length=4)]
Matrix = Annotated[list[_Row], BeforeValidator(_plain), Field(min_length=4, max_length=4), AfterValidator(_invertible)]
Velocity = Annotated[list[float], BeforeValidator(_plain), Field(min_length=2, max_length=2)]


class Cloud(TypedDict, total=False):
    """Entry ``lidar_points`` of an info: the file of the cloud, and its place on the vehicle."""

    lidar_path: Annotated[str, AfterValidator(_without_null)]
    num_pts_feats: Whole | None
    lidar2sensor: Matrix


class Sweep(TypedDict, total=False):
    """An earlier sweep: an entry of ``lidar_sweeps``."""

    timestamp: Number
    lidar_points: Cloud


class Instance(TypedDict, total=False):
    """An object: an entry of ``instances``."""

    bbox_3d: Box
    bbox_label_3d: Annotated[Whole, Field(ge=-1)]
    velocity: Velocity
    num_lidar_pts: Whole
    num_radar_pts: Whole | None


class Camera(TypedDict, total=False):
    """A camera: an entry of ``images``."""

    lidar2cam: Matrix


class CameraObject(TypedDict, total=False):
    """An object in a camera's frame: an entry of ``cam_instances``."""

    bbox_3d: Annotated[list[float], BeforeValidator(_plain), Field(min_length=3, max_length=9)]
    attr_label: Annotated[Whole, Field(ge=0, lt=len(NAMES))]


class Info(TypedDict, total=False):
    """Entry of ``data_list``: one sample."""

    token: Any
    sample_idx: Any
    sample_id: Any
    timestamp: Number
    lidar_points: Cloud
    lidar_sweeps: list[Sweep] | None
    instances: list[Instance] | None
    images: dict[str, Any]
    """Camera → ``Camera``; KITTI's infos have matrices among them."""
    cam_instances: dict[str, list[CameraObject]] | None


class Meta(TypedDict, total=False):
    """Entry ``metainfo``: what holds for all samples, class names first of all."""

    dataset: Any
    DATASET: Any
    categories: dict[str, Whole] | list[str] | None
    classes: list[str] | None


KITTI_CLASSES = ("Pedestrian", "Cyclist", "Car", "Van", "Truck", "Person_sitting", "Tram", "Misc")
"""KITTI's classes in label order, which its infos do not tell."""
PREFIXES = ("", "samples/LIDAR_TOP", "sweeps/LIDAR_TOP", "training/velodyne_reduced", "training/velodyne")
"""Folders below the data root where mmdet3d's configurations look for the files that an info names."""
COLUMNS = ("x", "y", "z", "intensity", "ring")
LISTED = 5
"""Largest number of names in a message; the others are counted."""

Entry = Mapping[str, Any]
"""An entry of ``data_list``, one of its sweeps, or ``metainfo``."""


class InfoData:
    """The first ``count`` samples of an info file, with classes mapped by name to those of the model.

    Boxes are in the LiDAR's frame with z of the gravity centre (nuScenes, T4), or in KITTI's camera's with the
    bottom's. Raises InputError for another kind of file, a missing field, and missing clouds.
    """

    def __init__(
        self, path: Path, features: Sequence[str], class_names: Sequence[str], count: int, options: DataOptions
    ) -> None:
        self.name, self._path, self._features, self._options = str(path), path, list(features), options
        content = load_plain_pickle(path)
        if not isinstance(content, dict) or not isinstance(content.get("data_list"), list):
            older = isinstance(content, dict) and "infos" in content
            old = "; mmdet3d's update_infos_to_v2.py converts older files" if older else ""
            raise InputError(f"{path}: expected a dictionary with metainfo and data_list (mmdet3d 1.1 or newer){old}")
        meta: Meta = typed(Meta, content.get("metainfo", {}), f"{path}: metainfo")
        self._kitti = "kitti" in str(meta.get("dataset", meta.get("DATASET"))).lower()
        self._data_classes = self._class_names(meta)
        self._labels = _mapping(self._data_classes, class_names)
        self._files = _FileFinder(
            (options.root,) if options.root else (path.parent, *resolved(path.parent).parents[:3])
        )
        self.notes: list[str] = []
        self._infos = self._present(content["data_list"], count)
        self.notes += self._class_notes(class_names)

    def __len__(self) -> int:
        return len(self._infos)

    def sample(self, index: int) -> Sample:
        """The merged cloud and the truth of sample ``index``. Raises InputError for an unusable cloud or field."""
        info = self._infos[index]
        clouds = [self._read(info)]
        for sweep in self._sweeps(info):
            cloud = self._read(sweep)
            cloud = cloud[(np.abs(cloud[:, :2]) >= CLOSE).any(axis=1)]
            cloud[:, :3] = to_reference(cloud[:, :3], self._field(sweep, "lidar_points", "lidar2sensor"))
            cloud[:, self._features.index("dt")] = self._field(info, "timestamp") - self._field(sweep, "timestamp")
            clouds.append(cloud)
        truth = self._truth(info) if info.get("instances") is not None else None
        return Sample({"points": np.concatenate(clouds)}, f"{self._path.name} {_identity(info)}", truth)

    def _sweeps(self, info: Entry) -> list[Entry]:
        """The latest first, as the file has them; none for a model that cannot tell them apart."""
        return list(info.get("lidar_sweeps") or [])[: self._options.sweeps] if "dt" in self._features else []

    def _read(self, record: Entry) -> Points:
        path = self._files.find(self._field(record, "lidar_points", "lidar_path"))
        assert path is not None, "looked for when the data set was opened"
        width = record["lidar_points"].get("num_pts_feats")
        return read_points(path, self._features, COLUMNS[:width] if width in (4, 5) else None)

    def _truth(self, info: Entry) -> Truth:
        instances = info["instances"]
        boxes = np.array([self._field(instance, "bbox_3d") for instance in instances], dtype=np.float64).reshape(-1, 7)
        if self._kitti and len(boxes):
            images = self._field(info, "images")
            camera = "CAM2" if "CAM2" in images else next(iter(images), "CAM2")
            camera_entry: Camera = typed(Camera, self._field(info, "images", camera), f"{self._path}: images.{camera}")
            boxes = bottom_to_centre(camera_boxes_to_lidar(boxes, self._field(camera_entry, "lidar2cam")))
        labels = self._labels[
            np.array([self._field(instance, "bbox_label_3d") for instance in instances], dtype=np.int64)
        ]
        counts = [instance.get("num_lidar_pts", -1) + (instance.get("num_radar_pts") or 0) for instance in instances]
        velocities = np.array(
            [instance.get("velocity", (np.nan, np.nan)) for instance in instances], np.float32
        ).reshape(-1, 2)
        attributes, has_label = _attributes(info, boxes), labels >= 0
        return Truth(
            boxes.astype(np.float32)[has_label],
            labels[has_label],
            velocities[has_label],
            np.array(counts, dtype=np.int64)[has_label],
            attributes[has_label],
        )

    def _present(self, infos: Sequence[Any], count: int) -> list[Info]:
        """Entries of samples whose clouds all exist; notes the others, or raises InputError."""
        present: list[Info] = []
        missing: list[str] = []
        without = 0
        for index, entry in enumerate(infos if self._options.skip_missing else islice(infos, count)):
            if len(present) == count:
                break
            info: Info = typed(Info, entry, f"{self._path}: data_list[{index}]")
            names = [self._field(record, "lidar_points", "lidar_path") for record in (info, *self._sweeps(info))]
            absent = [name for name in names if self._files.find(name) is None]
            missing += absent
            without += bool(absent)
            if not absent:
                present.append(info)
        if missing:
            text = f"{without} of {without + len(present)} samples lack point clouds: {some(missing, LISTED)}"
            if not present or not self._options.skip_missing:
                skip = ", or leave them out with --skip-missing (data.skip_missing in a configuration)"
                hint = "give the data root" + ("" if self._options.skip_missing else skip)
                raise InputError(f"{self._path}: {text} (looked below {self._files.roots}); {hint}")
            self.notes.append(f"left out, {text}")
        if not present:
            raise InputError(f"{self._path}: data_list is empty")
        return present

    def _class_names(self, meta: Entry) -> Sequence[str]:
        """Classes in label order: ``categories`` of mmdet3d, ``classes`` of AWML, or KITTI's."""
        categories = meta.get("categories")
        if isinstance(categories, Mapping):
            return sorted(categories, key=categories.__getitem__)
        names = categories or meta.get("classes") or (KITTI_CLASSES if self._kitti else None)
        if not names:
            raise InputError(f"{self._path}: metainfo has neither categories nor classes")
        return list(names)

    def _class_notes(self, class_names: Sequence[str]) -> Iterable[str]:
        labels = [instance.get("bbox_label_3d", -1) for info in self._infos for instance in info.get("instances") or ()]
        if max(labels, default=-1) >= len(self._data_classes):
            classes = ", ".join(self._data_classes)
            raise InputError(f"{self._path}: bbox_label_3d {max(labels)} is none of metainfo's classes ({classes})")
        counted = Counter(self._data_classes[label] for label in labels if label >= 0 and self._labels[label] < 0)
        if counted:
            left_out = [f"{name} ({number})" for name, number in counted.most_common()]
            yield f"classes in the data that the model lacks, left out: {', '.join(left_out)}"
        lacking = [name for index, name in enumerate(class_names) if index not in self._labels]
        if lacking:
            yield f"classes of the model that the data lacks: {', '.join(lacking)}"

    def _field(self, record: Entry, *keys: str) -> Any:
        value: Any = record
        for key in keys:
            if not isinstance(value, Mapping) or key not in value:
                raise InputError(f"{self._path}: an entry of data_list has no {'.'.join(keys)}")
            value = value[key]
        return value


class _FileFinder:
    """Finds the files that an info names, looking first where the last one was."""

    def __init__(self, roots: Sequence[Path]) -> None:
        self.roots = ", ".join(str(root) for root in roots)
        self._places = [root / prefix for root in roots for prefix in PREFIXES]

    def find(self, name: str) -> Path | None:
        """The file of that name in the first folder that has it, or None."""
        for index, place in enumerate(self._places):
            if (place / name).is_file():
                self._places.insert(0, self._places.pop(index))
                return place / name
        return None


def _mapping(data: Sequence[str], model: Sequence[str]) -> NDArray[np.int64]:
    """Data label → model label, -1 for none; the last entry is that of the label -1."""
    model_labels = {_word(name): label for label, name in enumerate(model)}
    return np.array([*(model_labels.get(_word(name), -1) for name in data), -1])


def _word(name: str) -> str:
    return name.lower().replace("-", "_").replace(" ", "_")


def _attributes(info: Entry, boxes: NDArray[np.float64]) -> NDArray[np.str_]:
    """Attribute [M] of each box [M, 7]; nuScenes' infos have them with the boxes in the cameras' frames."""
    names = np.full(len(boxes), "", dtype="<U32")
    corners = np.concatenate((boxes[:, :3], np.ones((len(boxes), 1))), axis=1)
    for camera, instances in (info.get("cam_instances") or {}).items():
        labelled = [instance for instance in instances if "attr_label" in instance]
        if labelled and len(boxes):
            camera_entry: Camera = typed(Camera, info.get("images", {}).get(camera, {}), f"images.{camera}")
            if (matrix := camera_entry.get("lidar2cam")) is None:
                continue
            centres = (corners @ np.transpose(matrix))[:, :3]
            for instance in (instance for instance in labelled if "bbox_3d" in instance):
                distance = np.linalg.norm(centres - instance["bbox_3d"][:3], axis=1)
                if distance.min() < 1e-3:
                    names[distance.argmin()] = NAMES[instance["attr_label"]]
    return names


def _identity(info: Entry) -> str:
    """Name of a sample: its token or index, else its cloud's file."""
    names = (info[key] for key in ("token", "sample_idx", "sample_id") if key in info)
    lidar = info.get("lidar_points")
    return str(next(names, lidar.get("lidar_path", "?") if isinstance(lidar, dict) else "?"))


CLOSE = 1.0
"""Points of an earlier sweep nearer than this to the sensor, in both x and y, are the car itself (m)."""


def camera_boxes_to_lidar(boxes: ArrayLike, lidar2cam: ArrayLike) -> NDArray[np.float64]:
    """Boxes of a camera's frame [M, 7] in the LiDAR's frame [M, 7], z of the *bottom* centre in both.

    In: x, y, z (right, down, forward), length, height, width, rotation about y; out: x, y, z (forward, left, up),
    length, width, height, yaw; metres and radians. Formula of mmdet3d's ``Box3DMode.convert``: the sensors' small
    relative tilt does not enter the yaw.
    """
    camera = np.array(boxes, dtype=np.float64).reshape(-1, 7)
    centres = np.concatenate((camera[:, :3], np.ones((len(camera), 1))), axis=1)
    lidar = np.empty_like(camera)
    lidar[:, :3] = (centres @ np.linalg.inv(np.asarray(lidar2cam, dtype=np.float64)).T)[:, :3]
    lidar[:, 3:6] = camera[:, [3, 5, 4]]
    lidar[:, 6] = (-camera[:, 6] - np.pi / 2 + np.pi) % (2 * np.pi) - np.pi
    return lidar


def bottom_to_centre(boxes: NDArray[np.float64]) -> NDArray[np.float64]:
    """Boxes [M, ≥ 7] with z moved from the bottom centre to the gravity centre."""
    moved = boxes.copy()
    moved[:, 2] += moved[:, 5] / 2
    return moved


def to_reference(xyz: NDArray[np.float32], lidar2sensor: ArrayLike) -> NDArray[np.float32]:
    """Points [N, 3] of an earlier sweep in the frame of the reference sweep.

    ``lidar2sensor`` [4, 4] takes the reference LiDAR's frame to that of the sweep. mmdet3d's loader subtracts the
    stored translation without turning it; its converter stores it turned, so that in bends the sweep is off by
    2 sin(θ/2) |t|. Models are trained on such clouds, and so they are fed here.
    """
    matrix = np.asarray(lidar2sensor, dtype=np.float64)
    turned: NDArray[np.float32] = (xyz @ matrix[:3, :3]).astype(np.float32)
    turned -= matrix[:3, 3]
    return turned
