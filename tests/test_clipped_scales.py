"""Scales of INT8 files that clip single channels: the scale and the channels are named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from nets import NetBuilder
from test_trt_runner import install

from cp_debug.bisect.engine import Options, bisect
from cp_debug.bisect.result import TestResult

CHANNELS = 32


def network(path: Path, op: str, *, quantized: bool = False, clipped: tuple[int, ...] = (), data: bool = False) -> Path:
    """One product and a Relu; in INT8 with scales of all output channels, ``clipped`` ones 8 times too small.

    ``data``: those of the data along its channels in place of those of the weight.
    """
    net = NetBuilder(3)
    conv = op == "Conv"
    shape = (CHANNELS, CHANNELS, 3, 3) if conv else (CHANNELS, CHANNELS)
    weight, axis = (net.rng.standard_normal(shape) / 8).astype(np.float32), 0 if conv else 1
    x, w = "x", ""
    if quantized:
        scales = np.abs(weight).max(axis=tuple(d for d in range(weight.ndim) if d != axis)) / 127
        of_data = np.full(CHANNELS, 4.5 / 127)
        for channel in clipped:
            (of_data if data else scales)[channel] /= 8
        along = scales.reshape([-1 if d == axis else 1 for d in range(weight.ndim)])
        levels = net.weight(np.clip(np.rint(weight / along), -128, 127).astype(np.int8), "w_levels")
        zero = net.weight(np.zeros(CHANNELS, np.int8), "zero")
        w = net.op("DequantizeLinear", levels, net.weight(scales.astype(np.float32), "w_scale"), zero, axis=axis)
        x_scale = net.weight(of_data.astype(np.float32), "x_scale")
        x = net.op("DequantizeLinear", net.op("QuantizeLinear", x, x_scale, zero, axis=1), x_scale, zero, axis=1)
    else:
        w = net.weight(weight)
    made = net.op("Conv", x, w, name="made", pads=[1] * 4) if conv else net.op("MatMul", x, w, name="made")
    net.op("Relu", made, name="y")
    return net.save(path, {"x": (onnx.TensorProto.FLOAT, [2, CHANNELS, 8, 8] if conv else [64, CHANNELS])}, ["y"])


def compared(folder: Path, op: str, clipped: tuple[int, ...], data: bool = False) -> TestResult:
    ours = network(folder / "ours.onnx", op)
    theirs = network(folder / "theirs.onnx", op, quantized=True, clipped=clipped, data=data)
    (test,) = bisect(str(ours), "ort,ort", test_model=theirs).tests
    return test


@pytest.mark.few(2)
@pytest.mark.parametrize("op", ["Conv", "MatMul"])
@pytest.mark.parametrize(("clipped", "data"), [((5,), False), ((2, 7, 30), False), ((3,), True)])
def test_channels_whose_scale_clips_are_named(tmp_path: Path, op: str, clipped: tuple[int, ...], data: bool) -> None:
    test = compared(tmp_path, op, clipped, data)
    assert [row.onnx for row in test.guilty] == ["made"]
    (finding,) = [f for f in test.findings if "made" in " ".join(f.layers)]
    assert finding.cause == "int8-clipped"
    assert finding.evidence["channels"] == list(clipped)
    assert finding.evidence["scale_of"] == ("x_scale" if data else "w_scale")
    count = "1 channel of 32" if len(clipped) == 1 else f"{len(clipped)} channels of 32"
    assert f"{count} clipped: {', '.join(map(str, clipped))}" in finding.says


@pytest.mark.parametrize(
    ("fault", "cause", "says"),
    [
        ("clip", "int8-clipped", "the weights of its channel 5 reach"),
        ("scale", "int8-scale", "node_quantized and node_held disagree in their scale: "),
        ("zero", "int8-zero-point", "node_q and node_dq disagree in their zero point: 0 and 9"),
        ("one", "int8-clipped", "clipped"),
    ],
)
def test_weights_that_the_file_quantizes_itself_are_looked_at(
    tmp_path: Path, fault: str, cause: str, says: str
) -> None:
    """A file with fake quantizers holds the weights in FP32, with a QuantizeLinear behind them."""
    files = []
    for quantized in (False, True):
        net, x = NetBuilder(3), "x"
        weight = (net.rng.standard_normal((CHANNELS, CHANNELS)) / 8).astype(np.float32)
        scales = (np.abs(weight).max(axis=None if fault == "one" else 0) / 127).astype(np.float32)
        w, bias = net.weight(weight), net.weight(net.rng.standard_normal(CHANNELS).astype(np.float32))
        if quantized:
            ours = scales.copy()
            if fault == "one":  # scale of all weights, and of all biases
                ours = scales = scales / 8
            else:
                scales[5] *= {"clip": 1 / 8, "scale": 1.5}.get(fault, 1)
                ours[5] *= 1 / 8 if fault == "clip" else 1
            zeros = net.weight(np.zeros(scales.shape, np.int8))
            levels = net.op("QuantizeLinear", w, net.weight(ours), zeros, axis=1, name="quantized")
            w = net.op("DequantizeLinear", levels, net.weight(scales), zeros, axis=1, name="held")
            step, none = net.weight(np.array(4.5 / 127, np.float32)), net.weight(np.zeros((), np.int8))
            other = net.weight(np.array(9 if fault == "zero" else 0, np.int8))
            x = net.op("DequantizeLinear", net.op("QuantizeLinear", x, step, none, name="q"), step, other, name="dq")
            if fault == "one":
                bias = net.op("DequantizeLinear", net.op("QuantizeLinear", bias, step, none), step, none)
        net.op("Gemm", x, w, bias, name="made")
        files.append(net.save(tmp_path / f"{quantized}.onnx", {"x": (1, [64, CHANNELS])}, ["made"]))
    (test,) = bisect(str(files[0]), "ort,ort", test_model=files[1]).tests
    (finding,) = test.findings
    assert (finding.cause, finding.layers) == (cause, ["node_made"])
    assert says in finding.says
    assert finding.evidence["error_then"] < 0.2 * finding.evidence["error"]
    assert not [note for note in test.notes if "could be tried" in note]


@pytest.mark.parametrize("op", ["Conv", "MatMul"])
def test_scales_that_fit_every_channel_are_no_fault(tmp_path: Path, op: str) -> None:
    assert not compared(tmp_path, op, ()).guilty


def test_one_layer_that_does_what_it_must_is_told_in_the_singular(tmp_path: Path) -> None:
    files = []
    for quantized in (False, True):
        net, x = NetBuilder(3), "x"
        for layer in range(2):
            weight = (net.rng.standard_normal((CHANNELS, CHANNELS)) / 8).astype(np.float32)
            scales = (np.abs(weight).max(axis=0) / 127).astype(np.float32)
            scales[5] /= 1 if layer else 8
            w = net.weight(weight)
            if quantized:
                levels = net.weight(np.clip(np.rint(weight / scales), -128, 127).astype(np.int8))
                zeros, one = net.weight(np.zeros(CHANNELS, np.int8)), net.weight(np.zeros((), np.int8))
                w = net.op("DequantizeLinear", levels, net.weight(scales), zeros, axis=1)
                step = net.weight(np.array(4.5 / 127, np.float32))
                x = net.op("DequantizeLinear", net.op("QuantizeLinear", x, step, one), step, one)
            x = net.op("MatMul", x, w, name=f"made{layer}")
        files.append(net.save(tmp_path / f"{quantized}.onnx", {"x": (1, [64, CHANNELS])}, [x]))
    (test,) = bisect(str(files[0]), "ort,ort", test_model=files[1]).tests
    assert [row.onnx for row in test.guilty] == ["made0"]
    assert [finding.says for finding in test.findings if finding.cause == "int8"] == ["INT8 as declared"]


@pytest.mark.parametrize("op", ["Add", "MatMul", "Mul", "Add, Relu"])
@pytest.mark.parametrize("clips", [0, 1, None])
def test_a_scale_that_clips_is_named_where_two_activations_meet(tmp_path: Path, op: str, clips: int | None) -> None:
    """Additions and products without a constant have scales of their own, also where a Relu behind them is left to the
    quantizer of its result."""
    op, _, relu = op.partition(", ")
    layer = "relu" if relu else "met"
    inputs = {name: np.random.default_rng(4).standard_normal((16, 16)).astype(np.float32) for name in ("a", "b")}
    np.savez(tmp_path / "x.npz", **inputs)
    paths = []
    for quantized in (False, True):
        net = NetBuilder(4)
        parts = [net.op("Neg", name, name=f"neg_{name}") for name in inputs]
        for place, part in enumerate(parts if quantized else ()):
            scale = np.abs(inputs["ab"[place]]).max() / 127 / (6 if clips == place else 1)
            grid = net.weight(np.array(scale, np.float32)), net.weight(np.array(0, np.int8))
            parts[place] = net.op("DequantizeLinear", net.op("QuantizeLinear", part, *grid), *grid)
        met = net.op(op, *parts, name="relu" if relu and quantized else "met")
        if relu and quantized:
            grid = net.weight(np.array(8 / 255, np.float32)), net.weight(np.array(0, np.uint8))
            met = net.op("DequantizeLinear", net.op("QuantizeLinear", met, *grid), *grid, name="relu_DequantizeLinear")
        elif relu:
            met = net.op("Relu", met, name="relu")
        net.op("MatMul", met, net.weight(np.eye(16, 8, dtype=np.float32)), name="y")
        paths.append(net.save(tmp_path / f"{quantized}.onnx", {name: (1, [16, 16]) for name in inputs}, ["y"]))
    options = Options(inputs=tmp_path / "x.npz")
    (test,) = bisect(str(paths[0]), "ort,ort", test_model=paths[1], options=options).tests
    assert [row.onnx for row in test.guilty] == [layer] * (clips is not None)
    clipped = [f for f in test.findings if f.cause == "int8-clipped"]
    assert [f.layers for f in clipped] == [[f"node_{layer}"]] * (clips is not None)
    for finding in clipped:
        assert finding.evidence["needed_scale"] == pytest.approx(6 * finding.evidence["scale"], rel=1e-2)
        assert finding.evidence["error_then"] < 0.5 * finding.evidence["error"]
        assert f"a scale of {finding.evidence['needed_scale']:.3g} brings the error of this layer from" in finding.fix


@pytest.mark.few(1)
@pytest.mark.parametrize("of", ["data", "weights"])
def test_a_scale_that_clips_inside_a_fused_region_is_read_off_the_files(
    of: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """An engine shows the end of a region alone; the scale lies in the second of its four layers."""
    install("8.6.0", monkeypatch)
    monkeypatch.setattr("fake_tensorrt.REGION", {"node_m0", "node_r3"})
    files = []
    for quantized in (False, True):
        net, x = NetBuilder(5), "x"
        for layer in range(5):
            weight = (net.rng.standard_normal((CHANNELS, CHANNELS)) / 4).astype(np.float32)
            w = net.weight(weight)
            if quantized:
                clips = {of: 32.0 if of == "data" else 8.0} if layer == 1 else {}
                zero = net.weight(np.zeros((), np.int8))
                w_step, x_step = float(np.abs(weight).max()) / 127 / clips.get("weights", 1), 16.0 / 127
                step = net.weight(np.array(x_step / clips.get("data", 1), np.float32), f"x_scale{layer}")
                x = net.op("DequantizeLinear", net.op("QuantizeLinear", x, step, zero), step, zero)
                levels = net.weight(np.clip(np.rint(weight / w_step), -128, 127).astype(np.int8))
                w = net.op(
                    "DequantizeLinear", levels, net.weight(np.array(w_step, np.float32), f"w_scale{layer}"), zero
                )
            x = net.op("Relu", net.op("MatMul", x, w, name=f"m{layer}"), name=f"r{layer}")
        files.append(net.save(tmp_path / f"{quantized}.onnx", {"x": (1, [64, CHANNELS])}, [x]))
    (test,) = bisect(str(files[0]), "ort,trt-fp32", test_model=files[1]).tests
    assert [row.region.kind for row in test.guilty if row.region] == ["Myelin"]
    (finding,) = (finding for finding in test.findings if finding.cause != "int8")
    assert (finding.cause, finding.evidence["of"]) == ("int8-clipped", of)
    assert finding.evidence["scale_of"] == ("x_scale1" if of == "data" else "w_scale1")
    assert finding.evidence["error_then"] < 0.5 * finding.evidence["error"]


@pytest.mark.parametrize("signed", [True, False])
def test_a_scale_that_clips_one_element_is_no_single_wrong_element(tmp_path: Path, signed: bool) -> None:
    """In INT16, the rounding of all others is nothing beside it; the range of unsigned levels has two ends."""
    files = []
    for quantized in (False, True):
        net, x = NetBuilder(2), "x"
        if quantized:
            zero = np.array(0, np.int16) if signed else np.array(40000, np.uint16)
            grid = net.weight(np.float32(8e-5), "x_scale"), net.weight(zero)
            x = net.op("DequantizeLinear", net.op("QuantizeLinear", x, *grid), *grid)
        net.op("LeakyRelu", x, name="y", alpha=0.1)
        files.append(net.save(tmp_path / f"{quantized}.onnx", {"x": (1, [2, 16, 32, 32])}, ["y"], opset=21))
    x = np.clip(np.random.default_rng(0).standard_normal((2, 16, 32, 32)), -1.9, 1.9).astype(np.float32)
    x[1, 3, 5, 7] = 2.7
    np.savez(tmp_path / "x.npz", x=x)
    options = Options(inputs=tmp_path / "x.npz")
    (finding,) = bisect(str(files[0]), "ort,ort", test_model=files[1], options=options).tests[0].findings
    ends = "reaches 2.7, and its INT16 scale 8e-05 ends at ±2.621"
    ends = (
        ends
        if signed
        else "reaches -1.9 and 2.7, and its INT16 scale 8e-05 with zero point 40000 ends at -3.2 and 2.043"
    )
    assert finding.cause == "int8-clipped"
    assert finding.says == f"its input {ends}: 0.00305% is clipped"
    assert f"a scale of {2.7 / 32767 if signed else 4.6 / 65535:.3g} brings the error" in finding.fix


def stored(path: Path, fault: str = "float") -> Path:
    """A convolution with a bias and a Relu; in INT8 the quantizer behind it begins at 0, and there is no Relu."""
    net = NetBuilder(4)
    shape = (CHANNELS, CHANNELS, 3, 3)
    spread = np.logspace(-1, 0, CHANNELS).reshape(-1, 1, 1, 1)
    weight = (net.rng.standard_normal(shape) * spread / 8).astype(np.float32)
    bias = net.rng.standard_normal(CHANNELS).astype(np.float32)
    if fault == "float":
        made = net.op("Conv", "x", net.weight(weight), net.weight(bias), name="made", pads=[1] * 4)
        net.op("Abs", net.op("Relu", made, name="relu"), name="y")
    else:

        def pair(value: str, scale: float, zero: int, name: str) -> str:
            grid = net.weight(np.float32(scale)), net.weight(np.uint8(zero))
            return net.op("DequantizeLinear", net.op("QuantizeLinear", value, *grid), *grid, name=name)

        x_scale = 9 / 255
        scales = np.abs(weight).max((1, 2, 3)) / 127
        levels = np.rint(weight / scales.reshape(-1, 1, 1, 1)).astype(np.int8)
        codes = np.rint(bias / (x_scale * scales)).astype(np.int32)
        of_bias = np.full(CHANNELS, x_scale / 20) if fault == "bias" else x_scale * scales
        scales[7] *= {"dead": 0, "turned": -1}.get(fault, 1)
        levels = levels[::-1].copy() if fault == "others" else levels
        w = net.op(
            "DequantizeLinear", net.weight(levels), net.weight(scales.astype(np.float32)), axis=int(fault == "axis")
        )
        b = net.op("DequantizeLinear", net.weight(codes), net.weight(of_bias.astype(np.float32)), axis=0)
        made = net.op("Conv", pair("x", x_scale, 128, "data"), w, b, name="made", pads=[1] * 4)
        net.op("Abs", pair(made, 12 / 255, 255 if fault == "range" else 0, "relu"), name="y")
    return net.save(path, {"x": (onnx.TensorProto.FLOAT, [2, CHANNELS, 8, 8])}, ["y"])


@pytest.mark.few(2)
@pytest.mark.parametrize(
    ("fault", "cause", "says"),
    [
        ("axis", "int8-axis", "the INT8 scales of its weights are read along axis 1; its codes are by axis 0"),
        ("dead", "int8-weights", "the INT8 scales of 3% of its weights are 0, not those that their codes were "),
        ("turned", "int8-weights", "the INT8 scales of 3% of its weights are -1 times those that their codes were "),
        (
            "others",
            "int8-weights",
            "99% of its INT8 weights are off by more than a level: they were rounded from others",
        ),
        ("bias", "int8-scale", "the scale of its bias is not that of its input times that of its weights, but "),
        (
            "range",
            "int8-zero-point",
            "its result reaches 0 and 8.109, and its INT8 scale 0.0471 with zero point 255 ends ",
        ),
    ],
)
def test_what_an_int8_file_stores_wrongly_is_told(tmp_path: Path, fault: str, cause: str, says: str) -> None:
    ours = stored(tmp_path / "ours.onnx")
    sound, wrong = (
        bisect(str(ours), "ort,ort", test_model=stored(tmp_path / f"{name}.onnx", name)).tests[0]
        for name in ("sound", fault)
    )
    assert not sound.guilty
    assert [f.cause for f in sound.findings if f.cause != "int8"] == []
    assert wrong.guilty
    finding = wrong.findings[0]
    assert (finding.cause, finding.says.startswith(says)) == (cause, True), finding.says
