"""Samples for TensorRT's calibrator."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from cp_debug.backends.tensorrt.calibration import read_cache
from cp_debug.cli.main import app
from cp_debug.deploy.engines import write_calibration_data
from cp_debug.recipes.registry import load_model


def test_every_component_gets_its_own_inputs(tmp_path: Path) -> None:
    model = load_model("centerpoint:tiny")
    samples = list(islice(model.samples(2, 0, None), 2))
    assert write_calibration_data(model, samples, tmp_path) == tmp_path
    for component in model.components:
        files = sorted((tmp_path / component.name).glob("*.npz"))
        assert [file.name for file in files] == ["00000.npz", "00001.npz"]
        with np.load(files[1], allow_pickle=False) as arrays:
            assert set(arrays) == set(component.input_names)
    encoder = model.components[0]
    with np.load(tmp_path / encoder.name / "00001.npz", allow_pickle=False) as arrays:
        np.testing.assert_array_equal(arrays["input_features"], model.feed(encoder, samples[1], {})["input_features"])


def test_data_without_a_calibrator_is_refused(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["bisect", "-b", "torch,ort", "--trt-calib-data", str(tmp_path)])
    assert "expected --trt-calibrator" in str(done.exception)


@pytest.mark.parametrize("kind", ["entropy", "minmax"])
def test_the_command_calibrates_on_the_model_s_own_samples(
    kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from test_trt_runner import install, save_net

    install("8.6.0", monkeypatch)
    net, cache = save_net(tmp_path), tmp_path / "net.cache"
    arguments = ["capture", str(net), "-b", "trt-int8", "-o", str(tmp_path / "out"), "--trt-calibrator", kind]
    done = CliRunner().invoke(app, [*arguments, "--calibration-cache", str(cache)])
    assert done.exit_code == 0, done.output
    assert read_cache(cache).keys() == {"x", "c1", "r1", "c2", "y"}
    (settings,) = (json.loads(p.read_text())["settings"] for p in (tmp_path / "out").rglob("manifest.json"))
    assert settings["realised_precision"]["Int8"] > 0
