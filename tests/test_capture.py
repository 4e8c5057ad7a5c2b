"""A capture is whole or absent, says what it holds, and gives back every bit."""

from __future__ import annotations

import errno
import json
import mmap
import os
import shutil
import subprocess
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import hypothesis.extra.numpy as arrays
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cp_debug.bisect.recording import compare_captures
from cp_debug.errors import InputError
from cp_debug.probes.capture import Capture, CaptureWriter, array_hash
from cp_debug.probes.statistics import compare
from cp_debug.programs.scene import FOLDER, keep_scene
from cp_debug.recipes.base import Sample
from cp_debug.reports.tables import render

HEADER = {"backend": "torch@cpu", "model": {"name": "m", "sha256": "1"}, "inputs": [{"x": "a"}], "samples": ["seed 0"]}
DTYPES = ["?", "i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f2", "f4", "f8", ">f4", ">i8"]
EXTENSIONS = [ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2]


def write(folder: Path, tensors: Mapping[str, Any] | Iterable[tuple[str, Any]], **header: Any) -> Capture:
    with CaptureWriter(folder, {**HEADER, **header}) as writer:
        for name, tensor in tensors.items() if isinstance(tensors, Mapping) else tensors:
            writer.put(name, tensor)
    return Capture.open(folder)


def names() -> st.SearchStrategy[str]:
    awkward = ["a/b", "A/B", "../x", "", "CON", "ü/Ü", "x" * 300, "x" * 299 + "y", "a\nb", "a b", "\U0001f600"]
    return st.one_of(st.sampled_from(awkward), st.text(st.characters(exclude_categories=["Cs"]), max_size=20))


@st.composite
def tensors(draw: st.DrawFn) -> np.ndarray:
    shape = draw(arrays.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5))
    dtype = np.dtype(draw(st.sampled_from(DTYPES + EXTENSIONS)))
    count = int(np.prod(shape)) * dtype.itemsize
    raw = np.random.default_rng(draw(st.integers(0, 2**32 - 1))).integers(
        0, 2 if dtype.kind == "b" else 256, count, np.uint8
    )
    array = raw.view(dtype).reshape(shape)
    return array[..., ::-1].T if shape and draw(st.booleans()) else array


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(names(), tensors(), max_size=6))
def test_every_bit_comes_back_whatever_the_name(tmp_path: Path, given: dict[str, np.ndarray]) -> None:
    folder = tmp_path / "capture"
    shutil.rmtree(folder, ignore_errors=True)
    capture = write(folder, given)
    assert capture.names() == list(given)
    for name, array in given.items():
        loaded = capture.load_checked(name)
        assert (loaded.shape, loaded.dtype.name) == (array.shape, array.dtype.name)
        assert loaded.tobytes() == array.astype(loaded.dtype, copy=False).tobytes()
    files = [path.name for path in folder.iterdir()]
    assert len({file.lower() for file in files}) == len(files) == len(given) + 1
    assert max(map(len, files)) < 128


def test_safetensors_reads_what_is_written_and_the_other_way_round(tmp_path: Path) -> None:
    given = {
        "f": torch.randn(3, 4).t(),
        "b": torch.randn(5).bfloat16(),
        "8": torch.randn(2, 2).to(torch.float8_e4m3fn),
        "0": torch.tensor(7),
        "e": torch.zeros(0, 3),
    }
    capture = write(tmp_path / "capture", given)
    for entry in capture.entries:
        path = capture.folder / entry.file
        theirs = safetensors.torch.load_file(path)["tensor"]
        assert theirs.dtype == given[entry.name].dtype
        assert theirs.shape == given[entry.name].shape
        assert torch.equal(theirs.float(), given[entry.name].float())
        safetensors.torch.save_file({"tensor": theirs}, path, metadata={"rewritten": "by the package"})
        assert compare(capture.load(entry.name), given[entry.name]).equal


def test_large_tensors_are_mapped_not_read(tmp_path: Path) -> None:
    loaded = write(tmp_path / "capture", {"x": np.arange(6.0).reshape(2, 3)}).load("x")
    assert isinstance(loaded.base.base.obj, mmap.mmap)
    assert not loaded.flags.writeable
    assert loaded.flags.aligned


def test_samples_and_components_keep_their_own_order(tmp_path: Path) -> None:
    with CaptureWriter(tmp_path / "capture", HEADER | {"samples": ["first", "second"]}) as writer:
        for sample in (0, 1):
            for component in ("encoder", "head"):
                for name in ("relu", "conv"):
                    writer.put(name, np.array(len(component) + sample), sample, component)
    capture = Capture.open(tmp_path / "capture")
    assert capture.samples == [0, 1]
    assert capture.names(1, "head") == ["relu", "conv"]
    assert capture.load("conv", 1, "head") == 5
    assert [entry.index for entry in capture.entries] == [0, 1, 2, 3] * 2


def test_the_manifest_says_what_was_run(tmp_path: Path) -> None:
    capture = write(tmp_path / "capture", {"x": np.zeros(2, np.float32)}, settings={"tf32": False})
    assert capture.manifest["schema"] == "cpdebug.capture/1"
    assert (capture.manifest["settings"], capture.manifest["backend"]) == ({"tf32": False}, "torch@cpu")
    (tensor,) = capture.manifest["tensors"]
    assert (capture.folder / tensor.pop("file")).is_file()
    about = {"name": "x", "component": "", "sample": 0, "index": 0}
    assert tensor == about | {"shape": [2], "dtype": "float32", "crc32": f"{zlib.crc32(bytes(8)):08x}"}


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_crash_in_the_middle_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    def crash() -> Iterator[tuple[str, np.ndarray]]:
        yield "x", np.zeros(3)
        raise error

    with pytest.raises(error):
        write(tmp_path / "capture", crash())
    assert list(tmp_path.iterdir()) == []


def test_a_killed_writer_leaves_no_capture(tmp_path: Path) -> None:
    writer = CaptureWriter(tmp_path / "capture", HEADER).__enter__()
    writer.put("x", np.zeros(3))
    (leftover,) = tmp_path.iterdir()
    for folder in (tmp_path / "capture", leftover):
        with pytest.raises(InputError):
            Capture.open(folder)


@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """The disk is full at the first tensor, the second, the manifest."""
    opened, original = [], Path.open

    def full(self: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if "w" in mode:
            opened.append(self)
            if len(opened) == at:
                raise OSError(errno.ENOSPC, "No space left on device")
        return original(self, mode, *args, **kwargs)

    monkeypatch.setattr(Path, "open", full)
    refused = r"capture: cannot write the capture: no space left on device \(\d+ MiB free\)"
    with pytest.raises(InputError, match=refused):
        write(tmp_path / "capture", {"x": np.zeros(3), "y": np.zeros(3)})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root may mount")
def test_a_really_full_disk(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        with pytest.raises(InputError, match="no space left on device"):
            write(disk / "capture", {"x": np.zeros(1000), "y": np.zeros(100_000)})
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", disk], check=True)


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty", {"x": np.zeros(1)})
    with pytest.raises(InputError, match="expected a new or empty folder"):
        write(tmp_path / "empty", {"y": np.zeros(1)})
    assert Capture.open(tmp_path / "empty").names() == ["x"]


def test_what_cannot_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="'x' has dtype complex64"):
        write(tmp_path / "a", {"x": np.zeros(1, np.complex64)})
    with pytest.raises(InputError, match="'x' of sample 0 was written twice"):
        write(tmp_path / "b", [("x", np.zeros(1)), ("x", np.zeros(1))])
    with pytest.raises(ValueError, match="JSON"):
        write(tmp_path / "c", {}, settings={"x": float("nan")})
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_no_capture_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"absent: no such folder"):
        Capture.open(tmp_path / "absent")
    with pytest.raises(InputError, match=r"has no manifest\.json"):
        Capture.open(tmp_path)
    for text, message in (
        ("{", "not JSON"),
        ("[]", "schema is None"),
        ('{"schema": "cpdebug.capture/9"}', r"schema is 'cpdebug.capture/9'; this version reads 'cpdebug.capture/1'"),
        ('{"schema": "cpdebug.capture/1", "tensors": [{"name": "x"}]}', r"tensors\.0\.\w+ is missing"),
    ):
        (tmp_path / "manifest.json").write_text(text)
        with pytest.raises(InputError, match=message):
            Capture.open(tmp_path)


@pytest.mark.parametrize("sample", [-1, 1])
def test_a_tensor_of_no_sample_is_refused(tmp_path: Path, sample: int) -> None:
    manifest = write(tmp_path / "capture", {"x": np.arange(9.0)}, samples=["one"]).folder / "manifest.json"
    document = json.loads(manifest.read_text())
    document["tensors"][0]["sample"] = sample
    manifest.write_text(json.dumps(document))
    with pytest.raises(InputError, match=f"tensor 'x' is of sample {sample}, which is not listed"):
        Capture.open(manifest.parent)


def test_captures_whose_samples_have_no_names_are_shown(tmp_path: Path) -> None:
    about = {"precision": "fp32", "device": "cpu", "emulated": False, "versions": {}, "settings": {}, "outputs": []}
    ours, theirs = (write(tmp_path / name, {"x": np.arange(9.0)}, **about, samples=[]) for name in ("a", "b"))
    assert "a sample without a name" in str(next(iter(render(compare_captures(ours, theirs)))))


def test_a_damaged_tensor_is_named(tmp_path: Path) -> None:
    capture = write(tmp_path / "capture", {"x": np.arange(9.0), "y": np.arange(9, dtype=np.int64)})
    x, y = (capture.folder / entry.file for entry in capture.entries)
    whole = x.read_bytes()
    for cut in (0, 5, 20, len(whole) - 1):
        x.write_bytes(whole[:cut])
        with pytest.raises(InputError, match=r"00000-x\.safetensors: tensor 'x' .*cut short"):
            capture.load("x")
    x.write_bytes(y.read_bytes())
    with pytest.raises(InputError, match=r"holds I64 \(9,\); the manifest says float64 \(9,\) for 'x'"):
        capture.load("x")
    x.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    capture.load("x")
    with pytest.raises(InputError, match="'x' changed since it was written"):
        capture.load_checked("x")
    x.unlink()
    with pytest.raises(InputError, match="tensor 'x' cannot be read: no such file"):
        capture.load("x")
    with pytest.raises(InputError, match="has no tensor 'z' of sample 0"):
        capture.load("z")


def test_a_comparison_refuses_a_tensor_that_changed_on_its_way(tmp_path: Path) -> None:
    about = {"precision": "fp32", "device": "cpu", "emulated": False, "versions": {}, "settings": {}, "outputs": []}
    ours, theirs = (write(tmp_path / name, {"x": np.arange(9.0)}, **about) for name in ("a", "b"))
    assert compare_captures(ours, theirs).tests[0].rows[0].stats.equal
    file = theirs.folder / theirs.entries[0].file
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(InputError, match=r"b/00000-x\.safetensors: tensor 'x' changed since it was written"):
        compare_captures(ours, theirs)


def test_captures_of_other_models_or_inputs_say_so(tmp_path: Path) -> None:
    same = write(tmp_path / "a", {}), write(tmp_path / "b", {})
    other = write(tmp_path / "c", {}, model={"sha256": "2"}, inputs=[{"x": "b"}, {}])
    assert same[0].differences(same[1]) == []
    model, count, inputs = same[0].differences(other)
    assert "model differs: sha256 1" in model
    assert "number of samples differs: 1" in count
    assert inputs == "sample 0: input x differs"
    both, one = (
        write(tmp_path / name, {}, inputs=[given]) for name, given in (("d", {"x": "a", "y": "b"}), ("e", {"x": "a"}))
    )
    assert both.differences(one) == one.differences(both) == ["sample 0: input y differs"]
    renamed = write(tmp_path / "f", {}, inputs=[{"z": "a", "y": "b"}])
    assert both.differences(renamed) == []  # the same inputs under other names


def test_the_hash_of_an_input_depends_on_values_shape_and_dtype_only() -> None:
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert array_hash(array) == array_hash(np.asfortranarray(array)) == array_hash(array.astype(">f4"))
    assert len({array_hash(a) for a in (array, array.T, array.astype(np.float64), array + 1, array.reshape(-1))}) == 5


def test_the_manifest_is_plain_json(tmp_path: Path) -> None:
    write(tmp_path / "capture", {"ü": np.float16(1)})
    text = (tmp_path / "capture" / "manifest.json").read_text(encoding="utf-8")
    assert json.loads(text)["tensors"][0]["name"] == "ü"


class Boxes:
    """Detections as a model decodes them."""

    class_names = ("car", "bus")

    def __init__(self, x: float) -> None:
        self.boxes = np.full((1, 7), x, np.float32)
        self.scores, self.labels = np.float32([0.5]), np.array([1])


def test_a_scene_keeps_points_and_the_boxes_of_each_backend(tmp_path: Path) -> None:
    from cp_debug.probes.capture import Capture

    sample = Sample({"points": np.ones((2, 4), np.float32)}, "cloud.bin")
    keep_scene(tmp_path, sample, {"torch": "no boxes"})
    assert not (tmp_path / FOLDER).exists()
    keep_scene(tmp_path, sample, {"torch": Boxes(1.0), "ort": Boxes(2.0), "other": "no boxes"})
    capture = Capture.open(tmp_path / FOLDER)
    assert capture.load("points").shape == (2, 4)
    assert [float(capture.load("boxes", component=spec)[0, 0]) for spec in ("torch", "ort")] == [1.0, 2.0]
    assert capture.manifest["class_names"] == ["car", "bus"]
    assert capture.manifest["samples"] == ["cloud.bin"]
