"""Samples that were given: all of them are looked at, or a note says how many."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper, parser
from test_cli import run

import cp_debug
from cp_debug.backends.dumped import DumpedBackend, inputs_digest
from cp_debug.probes.dumps import read_dumps, steps_left_out
from cp_debug.recipes.abilities import samples_left_out, with_samples
from cp_debug.recipes.base import Sample
from cp_debug.recipes.registry import load_model

WEIGHT = np.random.default_rng(0).standard_normal((8, 8)).astype(np.float32)
LAST = "1 of 3 samples of {} was used; --samples 3 uses all"


def save(path: Path, node: str) -> Path:
    text = f"""<ir_version: 8, opset_import: ["" : 17]>
net (float[2,8] x) => (float[2,8] o)
{{
    y = MatMul (x, w)
    {node}
}}"""
    model = parser.parse_model(text)
    arrays = {"w": WEIGHT, "lo": np.array(0, np.float32), "hi": np.array(6, np.float32)}
    model.graph.initializer.extend(
        numpy_helper.from_array(a, n) for n, a in arrays.items() if n == "w" or "Clip" in node
    )
    onnx.save(model, path)
    return path


@pytest.fixture
def nets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """ReLU, and one that is cut off at 6, which only the last of three samples in ``smp`` shows."""
    monkeypatch.chdir(tmp_path)
    Path("smp").mkdir()
    for name, value in (("a", 0.1), ("b", 0.2), ("c", 30.0)):
        np.savez(f"smp/{name}.npz", x=np.full((2, 8), value, np.float32))
    return save(Path("relu.onnx"), "o = Relu (y)"), save(Path("clip.onnx"), "o = Clip (y, lo, hi)")


def words(text: str) -> str:
    return " ".join(text.split())


def test_a_folder_of_which_one_sample_was_taken_is_told(nets: tuple[Path, Path]) -> None:
    code, text = run("bisect", *nets, "--inputs", "smp")
    assert (code, f"note: {LAST.format('smp')}" in words(text)) == (0, True)
    code, text = run("bisect", *nets, "--inputs", "smp", "--samples", "3")
    assert (code, "samples of smp were used" in words(text)) == (1, False)
    code, text = run("verify", nets[0], "--test-model", nets[1], "-b", "ort", "--inputs", "smp", "--samples", "2")
    assert (code, "note: 2 of 3 samples of smp were used; --samples 3" in words(text)) == (0, True)
    assert LAST.format("smp") in cp_debug.diagnose(nets[0], "ort,ort", test_model=nets[1], inputs="smp").tests[0].notes
    for command in (
        ("predict", nets[0], "--precision", "fp16", "--target", "trt-10"),
        ("search", nets[0], "-b", "ort,emu-fp16", "--goal", "rel_l2<1e-2"),
        ("capture", nets[0], "-b", "ort", "-o", "kept"),
    ):
        code, text = run(*command, "--inputs", "smp")
        assert (code, LAST.format("smp") in words(text)) == (0, True), text
    assert "the activations of the first of 3 samples" in words(run("check", nets[0], "--inputs", "smp")[1])


def test_all_samples_of_a_capture_are_looked_at(nets: tuple[Path, Path]) -> None:
    assert run("capture", nets[1], "-b", "ort", "--inputs", "smp", "--samples", "3", "-o", "cap")[0] == 0
    code, text = run("bisect", nets[0], "-b", "ort", "--test-tensors", "cap")
    assert (code, "guilty: o (Relu)" in words(text)) == (1, True)
    assert "3 samples, from cap, sample 0 to cap, sample 2" in words(text)
    assert run("bisect", nets[0], "-b", "ort", "--test-tensors", "cap", "--inputs", "smp")[0] == 1
    assert not cp_debug.diagnose(nets[0], test_tensors="cap").agrees
    assert len(cp_debug.diagnose(nets[1], test_tensors="cap").samples) == 3
    code, text = run("bisect", nets[0], "-b", "ort", "--test-tensors", "cap", "--inputs", "smp/a.npz")
    assert (code, "1 of 3 samples of cap compared: there are no more inputs" in words(text)) == (0, True)
    code, text = run("bisect", nets[0], "-b", "ort", "--test-tensors", "cap", "--samples", "3")
    assert (code, "all samples of --test-tensors are used" in words(text)) == (2, True)


def test_a_capture_of_fewer_samples_than_the_inputs_is_told(nets: tuple[Path, Path]) -> None:
    assert run("capture", nets[1], "-b", "ort", "--inputs", "smp", "-o", "cap")[0] == 0
    code, text = run("bisect", nets[0], "-b", "ort", "--test-tensors", "cap", "--inputs", "smp")
    assert (code, "1 of 3 samples of smp compared: the dump has no more" in words(text)) == (0, True)


def test_samples_of_the_same_inputs_count_once(nets: tuple[Path, Path]) -> None:
    np.savez("smp/b.npz", x=np.full((2, 8), 0.1, np.float32))
    assert run("capture", nets[1], "-b", "ort", "--inputs", "smp", "--samples", "3", "-o", "cap")[0] == 0
    code, text = run("bisect", nets[1], "-b", "ort", "--test-tensors", "cap")
    assert code == 0
    assert "2 of 3 samples of cap compared: others have the same inputs as one of them" in words(text)


def test_a_dump_of_several_samples_gives_those_of_the_inputs() -> None:
    x, other = np.zeros(2, np.float32), np.ones(2, np.float32)
    assert inputs_digest({"x": x, "y": other}) == inputs_digest({"y": other, "x": x.copy()})
    assert inputs_digest({"x": x}) != inputs_digest({"x": x.astype(np.float64)})
    assert DumpedBackend({}, "dump").versions() == {"dump": "dump"}


def test_iterations_of_polygraphy_are_read_and_imported_with_a_note(nets: tuple[Path, Path], tmp_path: Path) -> None:
    import base64
    import io

    def encoded(array: np.ndarray) -> dict[str, str]:
        data = io.BytesIO()
        np.save(data, array)
        return {"array": base64.b64encode(data.getvalue()).decode()}

    values = [{"x": np.full((2, 8), v, np.float32)} for v in (0.1, 30.0)]
    each = [v | {"y": v["x"] @ WEIGHT} for v in values]
    each = [v | {"o": v["y"].clip(0, 6)} for v in each]
    Path("dump.json").write_text(json.dumps([{n: encoded(a) for n, a in v.items()} for v in each]))
    assert [len(v) for v in read_dumps(Path("dump.json"))] == [3, 3]
    assert run("bisect", nets[0], "-b", "ort", "--test-tensors", "dump.json")[0] == 1
    code, text = run("import", "dump.json", "--model", nets[0], "-o", "kept")
    assert (code, "note: 1 of 2 samples of dump.json is imported, the first" in words(text)) == (0, True)


def test_steps_of_a_serving_runtime_that_were_not_read_are_counted(tmp_path: Path) -> None:
    for step in (0, 1, 2):
        folder = tmp_path / "tllm_debug" / "PP_1" / "TP_1" / f"iteration_{step}"
        folder.mkdir(parents=True)
        np.save(folder / "x.npy", np.ones(2, np.float32))
    assert steps_left_out(tmp_path) == 2
    assert steps_left_out(folder) == 0


def test_samples_are_counted_without_reading_them(nets: tuple[Path, Path], tmp_path: Path) -> None:
    model = load_model(str(nets[0]))
    assert samples_left_out(model, Path("smp"), 1, 1) == [LAST.format("smp")]
    assert samples_left_out(model, Path("smp"), 3, 3) == []
    assert samples_left_out(model, Path("smp"), 5, 3) == []
    assert samples_left_out(model, None, 1, 1) == []
    assert samples_left_out(with_samples(model, [Sample({}, "a")]), Path("smp"), 1, 1) == []
    clouds = tmp_path / "clouds"
    clouds.mkdir()
    for name in "ab":
        np.zeros((4, 5), np.float32).tofile(clouds / f"{name}.bin")
    info = tmp_path / "infos.pkl"
    info.write_bytes(pickle.dumps({"metainfo": {}, "data_list": [{}, {}, {}]}))
    centerpoint = load_model("centerpoint:tiny")
    assert [len(samples_left_out(centerpoint, path, 1, 1)) for path in (clouds, clouds / "a.bin", info)] == [1, 0, 1]
