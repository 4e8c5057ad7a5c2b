"""Exported files and engines that are scored by a description of them."""

from __future__ import annotations

import json
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
from test_cli import run

from cp_debug.errors import InputError
from cp_debug.recipes.centerpoint.config import TINY
from cp_debug.recipes.centerpoint.scenes import generate_scene


@pytest.fixture(scope="module")
def description(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    code, text = run("export", "centerpoint:tiny", "-o", folder / "onnx")
    assert code == 0, text
    (folder / "files.yaml").write_text("model: centerpoint:tiny\nfolder: onnx\n")
    return folder / "files.yaml"


@pytest.mark.slow
def test_files_score_as_the_model_does(description: Path, tmp_path: Path) -> None:
    out = tmp_path / "files.json"
    code, text = run("eval", description, "-b", "torch,ort,ort-all", "-n", "2", "--json", out)
    assert code == 0, text
    code, text = run("eval", "centerpoint:tiny", "-b", "torch,ort", "-n", "2", "--json", tmp_path / "model.json")
    assert code == 0, text
    files, model = (json.loads(path.read_text()) for path in (out, tmp_path / "model.json"))
    of_model, *of_files = (
        backend["summary"]["mAP"]["value"] for document in (model, files) for backend in document["backends"][-3:]
    )
    assert of_files[-3:] == pytest.approx([of_model] * 3, abs=1e-6)


RUNNER = """#!/bin/sh
[ "$1" = -c ] && exec {python} "$@"
exec {python} {body} "$@"
"""
BODY = """import importlib.util, sys
from pathlib import Path

sys.path.insert(0, {tests!r})
import fake_tensorrt

spec = importlib.util.spec_from_file_location("trt_runner", sys.argv[1])
runner = importlib.util.module_from_spec(spec)
spec.loader.exec_module(runner)
runner.Cuda = fake_tensorrt.FakeCuda
sys.modules["tensorrt"] = fake_tensorrt.fake_tensorrt("10.3.0")
sys.exit(runner.main(Path(sys.argv[2]), "--stay" in sys.argv))
"""


@pytest.fixture(scope="module")
def trt_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("interpreter")
    (folder / "body.py").write_text(BODY.format(tests=str(Path(__file__).parent)))
    (folder / "python").write_text(RUNNER.format(python=sys.executable, body=folder / "body.py"))
    (folder / "python").chmod(0o755)
    return folder / "python"


@pytest.mark.slow
def test_engines_score_in_the_runners_interpreter(description: Path, trt_python: Path, tmp_path: Path) -> None:
    folder = description.parent
    common = ["--trt-python", trt_python]
    profiles = ["--profile", "input_features:1x20x11:3000x20x11:10000x20x11"]
    profiles += ["--profile", "spatial_features:1x32x128x128:1x32x128x128:1x32x128x128"]
    code, text = run(
        "build", "centerpoint:tiny", "-o", folder / "fp16", "--precision", "fp16", "--onnx-dir", folder / "onnx",
        *profiles, *common,
    )  # fmt: skip
    assert code == 0, text
    files = folder / "engines.yaml"
    files.write_text("model: centerpoint:tiny\nfolder: onnx\nengines: {trt-fp16: fp16}\n")
    out = tmp_path / "engines.json"
    code, text = run("eval", files, "-b", "ort,trt-fp16", "-n", "2", "--json", out, *common)
    assert code == 0, text
    reference, engine = json.loads(out.read_text())["backends"]
    assert engine["versions"]["tensorrt"] == "10.3.0"
    encoder = engine["settings"]["components"]["pts_voxel_encoder"]
    assert encoder["engine"].endswith("fp16/pts_voxel_encoder.engine")
    assert engine["summary"]["mAP"]["value"] == pytest.approx(reference["summary"]["mAP"]["value"], abs=0.02)
    assert engine["summary"] != reference["summary"], "FP16 rounds"
    for text, spec, says in (
        ("engines: fp16", "trt-fp32", "these are engines of trt-fp16; expected those of trt-fp32"),
        ("engines: {trt-fp16: fp16}", "trt-fp32", "names no engines of trt-fp32"),
        ("engines: gone", "trt-fp16", "there is no folder"),
        ("engines: [fp16]", "trt-fp16", "expected a valid dictionary"),
        ("engines: onnx", "trt-fp16", "not the manifest of `cpdebug build`"),
        ("glue: {voxel_size: [0.2, 0.2, 8]}\nengines: fp16", "trt-fp16", "the engine was built for"),
    ):
        files.write_text(f"model: centerpoint:tiny\nfolder: onnx\n{text}\n")
        code, printed = run("eval", files, "-b", f"ort,{spec}", "-n", "1", *common)
        assert code == 2, printed
        assert says in " ".join(printed.split())


@pytest.mark.slow
def test_strange_clouds_are_named_for_files_too(description: Path, tmp_path: Path) -> None:
    infos = tmp_path / "infos.pkl"
    points = generate_scene(3).points
    clouds = {"nan": points.copy(), "empty": points[:0], "far": points + 900}
    clouds["nan"][5, 3] = np.nan
    instance = {"bbox_3d": [5.0, 5.0, 0.0, 4.0, 2.0, 1.5, 0.0], "bbox_label_3d": 0, "num_lidar_pts": 9}
    listed = []
    for name, cloud in clouds.items():
        cloud.astype(np.float32).tofile(tmp_path / f"{name}.pcd.bin")
        listed.append({"lidar_points": {"lidar_path": f"{name}.pcd.bin", "num_pts_feats": 5}, "instances": [instance]})
    categories = {name: index for index, name in enumerate(TINY.class_names)}
    infos.write_bytes(pickle.dumps({"metainfo": {"categories": categories}, "data_list": listed}))
    code, text = run("eval", description, "-b", "ort,ort-all", "--data", infos, "--data-root", tmp_path, "--sweeps", 0)
    assert code == 0, text
    words = " ".join(text.split())
    for says in (
        f"nan.pcd.bin: 1 of {len(points)} points hold NaN or Inf",
        "empty.pcd.bin: the cloud is empty",
        "is in the model's range",
        "ort-all: the outputs hold NaN or Inf on 1 of 3 samples",
        "as good as ort; but its outputs hold NaN or Inf on 1 of 3 samples, those of ort on 1",
    ):
        assert says in words, text


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [("export", "centerpoint:tiny", "-o", "out"), ("bench", "-b", "ort", "-n", "1", "--warmup", "0")],
    ids=lambda command: command[0],
)
def test_export_and_bench_remark_on_their_cloud(
    command: tuple[str, ...], description: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    points = generate_scene(3).points
    points[5, 3] = np.nan
    points.tofile("nan.pcd.bin")
    folder = ["--onnx-dir", description.parent / "onnx"] if command[0] == "bench" else []
    code, text = run(*command, "--inputs", "nan.pcd.bin", *folder)
    assert code == 0, text
    assert f"note: nan.pcd.bin: 1 of {len(points)} points hold NaN or Inf" in " ".join(text.split())


@pytest.mark.slow
def test_descriptions_that_do_not_fit_are_refused(description: Path, tmp_path: Path) -> None:
    folder = description.parent / "onnx"
    for text, says in (
        (
            "model: centerpoint:tiny\nfolder: gone\n",
            "there is no pts_voxel_encoder.onnx, no pts_backbone_neck_head.onnx",
        ),
        (f"model: centerpoint:awml-base\nfolder: {folder}\n", "pts_backbone_neck_head.onnx: its outputs are ["),
        (
            f"model: tiny\nfolder: {folder}\nglue: {{point_features: [x, y, z, dt]}}\n",
            "shape [3159, 20, 10]; expected input_features",
        ),
        ("model: tiny\nglue: {score_treshold: 0.2}\n", "glue.score_treshold: there is no such setting"),
        ("model: tiny\nglue: {max_num: many}\n", 'glue: max_num is "many"; expected a valid integer'),
        (
            f"model: tiny\nfolder: {folder}\nrot_y_axis_reference: perhaps\n",
            'rot_y_axis_reference is "perhaps"; expected a valid boolean',
        ),
        ("modell: tiny\n", "unknown key 'modell'"),
        ("[1, 2", "not YAML"),
        ("- a\n", "expected settings by name"),
    ):
        path = tmp_path / "files.yaml"
        path.write_text(text)
        code, printed = run("eval", path, "-b", "ort,ort-all", "-n", "1")
        assert code == 2, printed
        assert says in " ".join(printed.split())
    for options, says in ((["-b", "ort,ort-all", "--unfolded"], "it would do nothing"),):
        code, printed = run("eval", description, "-n", "1", *options)
        assert code == 2, printed
        assert says in " ".join(printed.split())


def test_a_description_names_its_file_in_every_message(tmp_path: Path) -> None:
    from cp_debug.deploy.file_evaluation import read_description

    with pytest.raises(InputError, match="no such"):
        read_description(tmp_path / "gone.yaml")
