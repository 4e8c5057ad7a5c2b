"""Exported files scored with ONNX Runtime and numpy, in a process that never imports torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from test_cli import run

from cp_debug.errors import InputError
from cp_debug.recipes.centerpoint.config import TINY
from cp_debug.recipes.centerpoint.decode import decode
from cp_debug.recipes.centerpoint.numpy_glue import boxes_of, canvas, decorated, gather_pillars, unturned
from cp_debug.recipes.centerpoint.pillar_encoder import decorate
from cp_debug.recipes.centerpoint.rotation import turn
from cp_debug.recipes.centerpoint.scatter import scatter
from cp_debug.recipes.centerpoint.scenes import generate_scene
from cp_debug.recipes.centerpoint.voxelize import voxelize


def test_the_glue_in_numpy_is_the_glue_in_torch() -> None:
    points = generate_scene(7).points
    points[:3, 0] = np.nan, np.inf, 1e9
    ours, theirs = gather_pillars(points, TINY), voxelize(torch.from_numpy(points), TINY)
    for name in ours._fields:
        np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name).numpy(), strict=True)
    features = decorate(theirs, TINY).numpy()
    ulp = 2**-18  # of a mean in 32 m: the two add a pillar's points in another order
    np.testing.assert_allclose(decorated(ours, TINY), features, rtol=0, atol=2 * ulp, strict=True)
    pillar_features = np.random.default_rng(0).standard_normal((len(ours.coors), 1, 4), np.float32)
    expected = scatter(torch.from_numpy(pillar_features), theirs.coors, TINY.grid).numpy()
    np.testing.assert_array_equal(canvas(pillar_features, ours.coors, TINY.grid), expected, strict=True)
    assert gather_pillars(points[:0], TINY).voxels.shape == (0, 20, 5)


def test_boxes_in_numpy_are_those_in_torch() -> None:
    rng = np.random.default_rng(1)
    channels = {"heatmap": 2, "reg": 2, "height": 1, "dim": 3, "rot": 2, "vel": 2}
    maps = {
        name: rng.standard_normal((1, channels[name.rpartition(".")[2]], 32, 32)).astype(np.float32)
        for name in TINY.output_names
    }
    (theirs,) = decode({name: torch.from_numpy(array) for name, array in maps.items()}, TINY)
    ours = boxes_of(maps, TINY)
    assert len(ours.scores) > 50
    np.testing.assert_array_equal(ours.labels, theirs.labels)
    np.testing.assert_allclose(ours.scores, theirs.scores, rtol=1e-6)
    np.testing.assert_allclose(ours.boxes, theirs.boxes, rtol=1e-5, atol=1e-5)
    turned = {name: tensor.numpy() for name, tensor in turn({n: torch.from_numpy(a) for n, a in maps.items()}).items()}
    for name, array in unturned(turned).items():
        np.testing.assert_array_equal(array, maps[name])


@pytest.fixture(scope="module")
def description(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    code, text = run("export", "centerpoint:tiny", "-o", folder / "onnx")
    assert code == 0, text
    (folder / "files.yaml").write_text("model: centerpoint:tiny\nfolder: onnx\n")
    return folder / "files.yaml"


@pytest.mark.slow
def test_files_score_as_the_model_does_without_torch(description: Path, tmp_path: Path) -> None:
    out = tmp_path / "files.json"
    script = (
        "import sys\nfrom cp_debug.cli.main import main\n"
        f"sys.argv = ['cpdebug', 'eval', {str(description)!r}, '-b', 'ort,ort-all', '-n', '2',"
        f" '--json', {str(out)!r}]\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        "assert 'torch' not in sys.modules, 'torch was imported'\nprint('no torch')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("no torch")
    code, text = run("eval", "centerpoint:tiny", "-b", "torch,ort", "-n", "2", "--json", tmp_path / "model.json")
    assert code == 0, text
    files, model = (json.loads(path.read_text()) for path in (out, tmp_path / "model.json"))
    ours, theirs = (document["backends"][0]["summary"]["mAP"]["value"] for document in (files, model))
    assert ours == pytest.approx(theirs, abs=1e-6)


@pytest.mark.slow
def test_descriptions_that_do_not_fit_are_refused(description: Path, tmp_path: Path) -> None:
    folder = description.parent / "onnx"
    for text, says in (
        ("model: centerpoint:tiny\nfolder: gone\n", "pts_voxel_encoder: there is no "),
        (f"model: centerpoint:awml-base\nfolder: {folder}\n", "awml-base has ["),
        (f"model: tiny\nfolder: {folder}\nglue: {{point_features: [x, y, z, dt]}}\n", "takes 11 features a point"),
        ("model: tiny\nglue: {score_treshold: 0.2}\n", "glue.score_treshold: there is no such setting"),
        ("model: tiny\nglue: {max_num: many}\n", "glue.max_num: "),
        ("modell: tiny\n", "unknown key 'modell'"),
        ("[1, 2", "not YAML that can be read"),
        ("- a\n", "expected a mapping"),
    ):
        path = tmp_path / "files.yaml"
        path.write_text(text)
        code, printed = run("eval", path, "-b", "ort,ort-all", "-n", "1")
        assert code == 2, printed
        assert says in " ".join(printed.split())
    for options, says in (
        (["-b", "torch,ort"], "torch needs torch"),
        (["-b", "ort,ort-all", "--unfolded"], "it would do nothing"),
    ):
        code, printed = run("eval", description, "-n", "1", *options)
        assert code == 2, printed
        assert says in " ".join(printed.split())


def test_a_description_names_its_file_in_every_message(tmp_path: Path) -> None:
    from cp_debug.detection.file_evaluation import read_description

    with pytest.raises(InputError, match="no such"):
        read_description(tmp_path / "gone.yaml")
