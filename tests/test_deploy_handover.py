"""Hand-overs between the parts of a hybrid CenterPoint: what is refused, and what the sentence says to feed instead."""

from __future__ import annotations

import inspect
from pathlib import Path

import numpy as np
import pytest
import torch

from cp_debug.backends.registry import create
from cp_debug.backends.spec import BackendSpec
from cp_debug.deploy.interface_checks import InterfaceChecks, check_logits, check_probabilities, checked
from cp_debug.errors import InputError
from cp_debug.programs.pipeline import Export, Pipeline, prepare
from cp_debug.recipes.base import Sample
from cp_debug.recipes.centerpoint.config import TINY
from cp_debug.recipes.centerpoint.recipe import BACKBONE_NECK_HEAD, CenterPointModel, turn

CHECKS = InterfaceChecks(TINY)


@pytest.fixture(scope="module")
def model() -> CenterPointModel:
    return CenterPointModel("tiny")


@pytest.fixture(scope="module")
def samples(model: CenterPointModel) -> list[Sample]:
    return list(model.samples(2, 0, None))


@pytest.fixture(scope="module")
def features(model: CenterPointModel, samples: list[Sample]) -> np.ndarray:
    return model.feed(model.components[0], samples[0], {})["input_features"]


def test_decorated_features_are_let_through(features: np.ndarray) -> None:
    CHECKS.input_features(features, len(features))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda f: f[:, :, :5], "raw points, which the encoder does not decorate; feed decorate"),
        (lambda f: np.zeros((len(f), 1, 32), np.float32), "the encoder's output, not its input"),
        (lambda f: np.resize(np.abs(f[:, :1, :3]) + 1, f.shape), "another tensor was reshaped into this one"),
        (lambda f: f.astype(np.float64), "is float64; expected float32"),
        (lambda f: np.asfortranarray(f), "not contiguous, .* feed np.ascontiguousarray"),
        (lambda f: torch.from_numpy(f).transpose(0, 1).contiguous().transpose(0, 1), r"feed input_features.contiguous"),
        (lambda f: torch.empty(f.shape, device="meta"), r"is on meta; expected cpu: feed input_features.to\('cpu'\)"),
        (lambda f: f[:-1], r"has shape \[\d+, 20, 11\]; expected"),
    ],
)
def test_wrong_features_are_refused_with_what_to_feed(features: np.ndarray, make, says: str) -> None:
    with pytest.raises(InputError, match=says):
        CHECKS.input_features(make(features), len(features))


def test_decorated_points_are_no_cloud() -> None:
    with pytest.raises(InputError, match="decorated already; feed the raw cloud, x, y, z, intensity, dt"):
        CHECKS.points(np.zeros((7, 11), np.float32))


def test_channels_last_canvas_is_refused() -> None:
    with pytest.raises(InputError, match=r"expected \[1, 32, 128, 128\]: feed scatter"):
        CHECKS.spatial_features(np.zeros((1, 128, 128, 32), np.float32), 1)


def test_probabilities_for_logits_and_the_reverse() -> None:
    logits = torch.linspace(-9, 3, 12)
    check_logits("heatmap", logits)
    check_probabilities("heatmap", logits.sigmoid())
    with pytest.raises(InputError, match="probabilities where logits are expected; leave the sigmoid out"):
        check_logits("heatmap", logits.sigmoid())
    with pytest.raises(InputError, match=r"logits where probabilities are expected; feed sigmoid\(heatmap\)"):
        check_probabilities("heatmap", logits)


@pytest.mark.slow
def test_a_batch_detects_what_its_clouds_detect_alone(
    model: CenterPointModel, samples: list[Sample], tmp_path: Path
) -> None:
    both = model.batch(samples)
    backend = create(BackendSpec("ort"))
    safe = checked(model)
    assert inspect.getattr_static(safe, "batch", None), "as Python 3.12 looks for abilities"
    found = []
    for alike in (samples, [both]):
        programs = prepare(model, alike[0], tmp_path, how=Export("torchscript"))
        with Pipeline(safe, programs, backend) as pipeline:
            found += [(sample, pipeline.run(sample)) for sample in alike]
    one, other, batch = (safe.decode(*each) for each in found)
    assert min(len(one.boxes), len(other.boxes)) > 0
    for alone, together in zip((one, other), batch, strict=True):
        np.testing.assert_allclose(together.boxes, alone.boxes, rtol=1e-4, atol=1e-4)
        np.testing.assert_array_equal(together.labels, alone.labels)

    sample, results = found[0]
    heatmaps = {n: a for n, a in results[BACKBONE_NECK_HEAD].items() if n.endswith("heatmap")}
    squeezed = {n: 1 / (1 + np.exp(-a)) for n, a in heatmaps.items()}
    changed = {**results, BACKBONE_NECK_HEAD: results[BACKBONE_NECK_HEAD] | squeezed}
    with pytest.raises(InputError, match=r"task0.heatmap lies between .*: these are probabilities"):
        safe.decode(sample, changed)


def test_turning_twice_changes_nothing() -> None:
    maps = {"task0.dim": torch.randn(2, 3, 4, 4), "rot": torch.randn(2, 2, 4, 4), "reg": torch.randn(2, 2, 4, 4)}
    turned = turn(maps)
    assert torch.equal(turned["rot"][:, 0], -maps["rot"][:, 1])  # −cos
    assert torch.equal(turned["task0.dim"][:, 0], maps["task0.dim"][:, 1])
    assert all(torch.equal(again, maps[name]) for name, again in turn(turned).items())
