"""The commands as functions: one calling shape, results that show themselves."""

from __future__ import annotations

import inspect
from pathlib import Path

import numpy as np
import pytest
from nets import NetBuilder

import cp_debug

JOBS = ("diagnose", "predict", "search", "evaluate", "verify", "quantize")


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Path:
    net = NetBuilder()
    x = net.op("Relu", net.conv("image", 3, 4))
    return net.save(tmp_path_factory.mktemp("net") / "net.onnx", {"image": (1, [1, 3, 8, 8])}, [net.conv(x, 4, 2)])


@pytest.fixture
def image() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(1, 3, 8, 8)).astype(np.float32)


def test_one_calling_shape_for_all() -> None:
    for name in JOBS:
        signature = inspect.signature(getattr(cp_debug, name))
        first, *_ = signature.parameters
        assert first == "model"
        for shared in ("inputs", "options", "progress", "on_step"):
            assert signature.parameters[shared].kind is inspect.Parameter.KEYWORD_ONLY, (name, shared)
        assert "Raises" in (getattr(cp_debug, name).__doc__ or "")


def test_verify_tells_a_good_file_from_a_bad_one(net: Path, image: np.ndarray) -> None:
    seen: list[str] = []
    result = cp_debug.verify(
        net, "ort,ort-all", inputs={"image": image}, on_step=lambda text, done, total: seen.append(text)
    )
    assert result.passed
    assert result.samples == ["inputs"]
    assert any("verifying ort" in text for text in seen)
    assert "output is within its limits" in str(result)
    failed = cp_debug.verify(net, "ort,emu-fp16", inputs=[{"image": image}] * 2, options=strict())
    assert not failed.passed
    assert len(failed.samples) == 2
    with pytest.raises(cp_debug.InputError, match="expected a reference and"):
        cp_debug.verify(net, [])


def strict() -> cp_debug.VerifyOptions:
    return cp_debug.VerifyOptions(tolerances={"fp16": 1e-9}, explain=False)


def test_verify_exports_a_module(image: np.ndarray) -> None:
    import torch

    module = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.ReLU()).train()
    result = cp_debug.verify(module, "torch,ort", inputs=torch.from_numpy(image))
    assert result.passed
    assert module.training


def test_predict_and_search_take_arrays(net: Path, image: np.ndarray) -> None:
    prediction = cp_debug.predict(net, "fp16", inputs=image)
    assert prediction.samples == ["inputs"]
    assert "predicted by emulation" in str(prediction)
    assert repr(prediction) == f"<Prediction of {net}>"
    assert prediction._repr_html_().startswith("<pre>")
    found = cp_debug.search(net, "ort,emu-fp16", "rel_l2<1e-6", inputs={"image": image})
    assert found.reached
    assert found.kept
    assert "rel_l2<1e-06 holds" in str(found)
    with pytest.raises(cp_debug.InputError):
        cp_debug.search(net, "ort,emu-fp16", "nothing<1", inputs=image)


@pytest.mark.slow
def test_evaluate_refuses_what_detects_nothing(net: Path) -> None:
    with pytest.raises(cp_debug.InputError, match="decodes no boxes"):
        cp_debug.evaluate(net, "ort,ort-all")
    result = cp_debug.evaluate("centerpoint:tiny", "torch,ort", samples=1, options=cp_debug.EvaluationOptions(draws=10))
    assert len(result.samples) == 1
    assert "mAP" in str(result)


def test_quantize_writes_a_file_that_diagnose_reads(net: Path, image: np.ndarray, tmp_path: Path) -> None:
    import torch

    result = cp_debug.quantize(net, tmp_path / "q", inputs=[{"image": image}], method="max")
    assert (tmp_path / "q" / "net.onnx") in result.files
    assert "net" in str(result)
    assert cp_debug.diagnose(tmp_path / "q" / "net.onnx", "ort,ort-all", inputs=image).agrees
    (tmp_path / "q" / "notes.txt").write_text("mine")
    before = (tmp_path / "q" / "net.onnx").read_bytes()
    with pytest.raises(
        cp_debug.InputError, match=r"^output: .*q holds net\.onnx of an earlier run; overwrite=True repl"
    ):
        cp_debug.quantize(net, tmp_path / "q", inputs=[{"image": image * 3}], method="max")
    assert (tmp_path / "q" / "net.onnx").read_bytes() == before
    cp_debug.quantize(net, tmp_path / "q", inputs=[{"image": image * 3}], method="max", overwrite=True)
    assert (tmp_path / "q" / "net.onnx").read_bytes() != before
    assert (tmp_path / "q" / "notes.txt").exists()
    with pytest.raises(cp_debug.InputError, match="method: 'mean'"):
        cp_debug.quantize(net, tmp_path / "other", method="mean")
    with pytest.raises(cp_debug.InputError, match="checkpoint"):
        cp_debug.quantize(torch.nn.ReLU(), tmp_path / "other", inputs=torch.ones(1), checkpoint="a.pt")
    assert not (tmp_path / "other").exists()


def test_a_result_is_kept_where_the_options_say_in_text_or_as_a_path(net: Path, tmp_path: Path) -> None:
    for folder in (tmp_path / "path", str(tmp_path / "text")):
        result = cp_debug.diagnose(net, "ort-none,ort-basic", options=cp_debug.Options(save=folder))  # type: ignore[arg-type]
        assert str(cp_debug.open_result(folder)) == str(result)
    with pytest.raises(cp_debug.InputError, match=r"^options\.samples: str; expected a whole number"):
        cp_debug.diagnose(net, "ort,ort-all", options=cp_debug.Options(samples="2"))  # type: ignore[arg-type]
    with pytest.raises(cp_debug.InputError, match=r"cannot import centrepoint: .*; did you mean centerpoint:…"):
        cp_debug.diagnose("centrepoint:tiny")


def test_a_class_is_no_module() -> None:
    import torch

    with pytest.raises(cp_debug.InputError, match=r"model: ReLU is a class; expected a module made of it: ReLU\(…\)"):
        cp_debug.diagnose(torch.nn.ReLU, inputs=torch.ones(1))
