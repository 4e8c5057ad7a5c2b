"""Weights packed by GPTQ, AWQ and compressed-tensors: numbers, folders, graphs, and what is wrong in them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from nets import NetBuilder
from safetensors.numpy import save_file

import cp_debug
from cp_debug.backends.base import Program
from cp_debug.backends.executor import Executor
from cp_debug.bisect.both_sides import with_levels
from cp_debug.bisect.result import TestResult
from cp_debug.errors import InputError
from cp_debug.graph.graph import Graph
from cp_debug.recipes.packed_weights import PackedWeight
from cp_debug.recipes.transformers_folder import packing_of, read_state

INPUTS, OUTPUTS, GROUP = 64, 32, 16
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Output of eight that each nibble of a word holds, as AutoAWQ's ``WQLinear_GEMM.from_linear`` packs them."""


def quantized(
    weight: np.ndarray, bits: int, *, group: int = GROUP, symmetric: bool = False, order: np.ndarray | None = None
) -> PackedWeight:
    """A weight [inputs, outputs] rounded to the nearest levels, its groups in order or with ``order`` as ``g_idx``."""
    groups = np.arange(len(weight)) // group if order is None else order
    top = 2**bits - 1
    count = int(groups.max()) + 1
    scale, zero = (np.zeros((count, weight.shape[1]), np.float32) for _ in range(2))
    for g in range(count):
        low, high = weight[groups == g].min(0), weight[groups == g].max(0)
        low, high = np.minimum(low, -1e-3), np.maximum(high, 1e-3)
        if symmetric:
            high = np.maximum(-low, high)
            low = -high
        scale[g] = ((high - low) / top).astype(np.float16)
        zero[g] = (top + 1) // 2 if symmetric else np.clip(np.round(-low / scale[g]), 1, top)
    levels = np.clip(np.round(weight / scale[groups]) + zero[groups], 0, top).astype(np.uint8)
    return PackedWeight(bits, levels, scale, zero.astype(np.int16), groups.astype(np.int64))


def words(numbers: np.ndarray, bits: int) -> np.ndarray:
    """Rows of numbers as words of 32 bits: one long number a row, the first in the lowest bits."""
    count = -(-numbers.shape[1] * bits // 32)
    rows = [sum(int(n) << (bits * i) for i, n in enumerate(row)) for row in numbers]
    raw = b"".join(row.to_bytes(4 * count, "little") for row in rows)
    return np.frombuffer(raw, "<i4").reshape(len(rows), count).copy()


def gptq(w: PackedWeight, *, first_format: bool = True) -> dict[str, np.ndarray]:
    """The tensors of GPTQ; zero points minus 1 in the first format."""
    zero = (w.zero - first_format) % 2**w.bits
    return {
        "qweight": words(w.levels.T, w.bits).T.copy(), "qzeros": words(zero, w.bits),
        "scales": w.scale.astype(np.float16), "g_idx": w.groups.astype(np.int32),
    }  # fmt: skip


def awq(w: PackedWeight) -> dict[str, np.ndarray]:
    """The tensors of AWQ: eight outputs a word, in its own order."""
    order = (np.arange(w.levels.shape[1]).reshape(-1, 8)[:, AWQ_ORDER]).reshape(-1)
    return {
        "qweight": words(w.levels[:, order], 4),
        "qzeros": words(w.zero[:, order], 4),
        "scales": w.scale.astype("f2"),
    }


def compressed(w: PackedWeight) -> dict[str, np.ndarray]:
    """The tensors of compressed-tensors, all turned."""
    return {
        "weight_packed": words(w.levels.T, w.bits), "weight_scale": w.scale.T.astype(np.float16),
        "weight_zero_point": words(w.zero, w.bits).T.copy(),
        "weight_shape": np.array(w.levels.shape[::-1], np.int64),
    }  # fmt: skip


GPTQ: dict[str, Any] = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False}
AWQ: dict[str, Any] = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm"}
WEIGHTS = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": GROUP, "symmetric": False}
COMPRESSED: dict[str, Any] = {
    "quant_method": "compressed-tensors", "format": "pack-quantized",
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": WEIGHTS}},
}  # fmt: skip


def folder(path: Path, said: Mapping[str, Any], tensors: Mapping[str, np.ndarray], layer: str = "fc") -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": said}))
    save_file({f"{layer}.{name}": np.ascontiguousarray(a) for name, a in tensors.items()}, path / "model.safetensors")
    return path


def read(path: Path) -> PackedWeight:
    config = json.loads((path / "config.json").read_text())
    packing = packing_of(path, config)
    assert packing is not None
    state, packed = read_state(path, packing)
    np.testing.assert_array_equal(state["fc.weight"].numpy(), packed["fc"].weight())
    assert list(state) == ["fc.weight"]
    return packed["fc"]


def weight(seed: int = 0, inputs: int = INPUTS, outputs: int = OUTPUTS) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((inputs, outputs)) * np.exp(rng.normal(0, 0.4, outputs)) + 0.2).astype(np.float32)


def same(one: PackedWeight, other: PackedWeight) -> None:
    for part in ("levels", "scale", "zero", "groups"):
        np.testing.assert_array_equal(getattr(one, part), getattr(other, part), err_msg=part)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("first_format", [True, False])
def test_gptq_is_unpacked(tmp_path: Path, bits: int, *, first_format: bool) -> None:
    order = np.random.default_rng(1).permutation(INPUTS) // GROUP
    made = quantized(weight(), bits, order=order)
    made.zero[0, :2] = 0  # stored as −1, which takes from the next one in the word where there are no 3 bits
    tensors = gptq(made, first_format=first_format)
    if first_format and bits != 3:
        ones = np.uint32(sum(1 << i for i in range(0, 32, bits)))
        tensors["qzeros"] = (words(made.zero, bits).view(np.uint32) - ones).view(np.int32)
    said = GPTQ | {"bits": bits, "desc_act": True, "checkpoint_format": "gptq" if first_format else "gptq_v2"}
    same(read(folder(tmp_path / "f", said, tensors)), made)


def test_awq_and_compressed_tensors_are_unpacked(tmp_path: Path) -> None:
    made = quantized(weight(), 4)
    same(read(folder(tmp_path / "a", AWQ, awq(made))), made)
    same(read(folder(tmp_path / "c", COMPRESSED, compressed(made))), made)
    middle = quantized(weight(), 4, symmetric=True)
    without = {name: a for name, a in compressed(middle).items() if name != "weight_zero_point"}
    same(read(folder(tmp_path / "s", COMPRESSED, without)), middle)


def edited(**changes: Any) -> Callable[[dict[str, np.ndarray]], None]:
    def edit(tensors: dict[str, np.ndarray]) -> None:
        for name, change in changes.items():
            if change is None:
                del tensors[name]
            else:
                tensors[name] = change(tensors[name])

    return edit


def _with(value: float) -> Callable[[np.ndarray], np.ndarray]:
    def change(array: np.ndarray) -> np.ndarray:
        array = array.copy()
        array.flat[3] = value
        return array

    return change


@pytest.mark.parametrize(
    ("said", "edit", "message"),
    [
        (GPTQ, edited(scales=None), "fc.scales is missing; expected beside fc.qweight"),
        (GPTQ, edited(qzeros=None), "fc.qzeros is missing"),
        (GPTQ | {"desc_act": True}, edited(g_idx=None), "fc.g_idx is missing, though the configuration says"),
        (GPTQ, edited(g_idx=_with(9)), r"fc.g_idx is int32 from 0 to 9; expected groups from 0 to 3"),
        (GPTQ, edited(g_idx=lambda a: a[:-1]), r"fc.g_idx has the shape \[63\]; expected \[64\]"),
        (GPTQ, edited(scales=_with(np.nan)), "fc.scales holds nan; expected finite numbers other than 0"),
        (GPTQ, edited(scales=_with(0)), "fc.scales holds 0;"),
        (GPTQ, edited(scales=_with(np.inf)), "fc.scales holds inf;"),
        (GPTQ, edited(qweight=lambda a: a[:, :-1]), r"fc.qweight has the shape \[31\]; expected \[32\]"),
        (GPTQ, edited(qweight=lambda a: a.astype(np.int64)), "fc.qweight is int64; expected int32"),
        (GPTQ, edited(qzeros=lambda a: a[:-1]), r"fc.qzeros has the shape \[3, 4\]; expected \[4, 4\]"),
        (GPTQ | {"bits": 8}, edited(), "fc.qzeros has words for 4 bits; the configuration says 8"),
        (GPTQ | {"group_size": 32}, edited(g_idx=None), "fc.scales holds 4 groups; 64 inputs in groups of 32 are 2"),
        (GPTQ | {"bits": 5}, edited(), "quantization_config.bits is 5; expected one of 2, 3, 4, 8"),
        (GPTQ | {"bits": "4"}, edited(), "quantization_config.bits is '4'"),
        (GPTQ | {"group_size": 0}, edited(), "quantization_config.group_size is 0; expected a number above 0, or -1"),
        (GPTQ | {"checkpoint_format": "marlin"}, edited(), "checkpoint_format is 'marlin'; expected gptq or gptq_v2"),
        (GPTQ | {"quant_method": "bitsandbytes"}, edited(), "quant_method is 'bitsandbytes'"),
        (AWQ | {"version": "gemv"}, edited(), "version is 'gemv'; expected gemm"),
        (AWQ, edited(), "fc.qweight"),  # GPTQ's tensors, called AWQ's
        (COMPRESSED | {"format": "marlin-24"}, edited(), "format is 'marlin-24'; expected pack-quantized"),
        (COMPRESSED | {"config_groups": {}}, edited(), "config_groups holds 0 groups; expected one"),
        (COMPRESSED, edited(), r"no tensor is called \*\.weight_packed"),
        ([4], edited(), "quantization_config is list; expected an object"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, said: Any, edit: Any, message: str) -> None:
    tensors = gptq(quantized(weight(), 4))
    edit(tensors)
    path = folder(tmp_path / "f", said, tensors)
    with pytest.raises(InputError, match=message) as raised:
        read(path)
    assert str(path) in str(raised.value)


def test_shards_that_are_not_there(tmp_path: Path) -> None:
    path = folder(tmp_path / "f", AWQ, awq(quantized(weight(), 4)))
    index = path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"fc.qweight": "model-1.safetensors"}}))
    with pytest.raises(InputError, match=r"index.json: weight_map names model-1.safetensors, which is not there"):
        read(path)
    index.write_text(json.dumps({"weight_map": {"fc.qweight": "../secret.safetensors"}}))
    with pytest.raises(InputError, match="expected a file of this folder"):
        read(path)
    index.unlink()
    (path / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(InputError, match=r"model.safetensors: not a readable safetensors file"):
        read(path)


def parent(path: Path, weights: Mapping[str, np.ndarray]) -> Graph:
    """Two products with an activation between them, the second as Gemm with its weight turned."""
    net = NetBuilder(5)
    h = net.op("Relu", net.op("MatMul", "x", net.weight(weights["a"])))
    y = net.op("Gemm", h, net.weight(np.ascontiguousarray(weights["b"].T)), transB=1)
    return Graph(net.save(path, {"x": (1, [24, INPUTS])}, [y]))


def floats(packed: Mapping[str, PackedWeight]) -> dict[str, np.ndarray]:
    return {name: each.weight().T for name, each in packed.items()}


def levels_file(folder: Path, packed: Mapping[str, PackedWeight]) -> Graph:
    graph = parent(folder / "floats.onnx", floats(packed))
    return with_levels(Program("net", graph), packed, folder).graph


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_graph_with_levels_computes_the_same(tmp_path: Path, bits: int) -> None:
    uneven = np.sort(np.random.default_rng(2).integers(0, 4, INPUTS))[np.random.default_rng(3).permutation(INPUTS)]
    packed = {"a": quantized(weight(1), bits, order=uneven), "b": quantized(weight(2, OUTPUTS, 24), bits)}
    graph = levels_file(tmp_path, packed)
    assert [node.op for node in graph.nodes] == [
        "DequantizeLinear",
        "Gather",
        "MatMul",
        "Relu",
        "DequantizeLinear",
        "Gemm",
    ]
    x = np.random.default_rng(4).standard_normal((24, INPUTS)).astype(np.float32)
    plain = Executor(Graph(tmp_path / "floats.onnx")).run({"x": x})
    for name, value in Executor(graph).run({"x": x}).items():
        np.testing.assert_array_equal(np.asarray(value), np.asarray(plain[name]))


@pytest.mark.parametrize("bits", [4, 8])
def test_levels_of_four_bits_are_not_judged_as_int8(tmp_path: Path, bits: int) -> None:
    file = levels_file(tmp_path, {"a": quantized(weight(1), bits), "b": quantized(weight(2, OUTPUTS, 24), bits)})
    if bits == 8:
        assert cp_debug.diagnose(str(file.path), "ort,emu-int8", progress=False).agrees
        return
    with pytest.raises(
        cp_debug.InputError, match=r"quantized to U?INT4, which INT8 cannot be compared with; expected emu-fp32"
    ):
        cp_debug.diagnose(str(file.path), "ort,emu-int8", progress=False)
    assert cp_debug.diagnose(str(file.path), "ort,emu-fp32", progress=False).agrees


def compared(folder: Path, weights: Mapping[str, np.ndarray], packed: Mapping[str, PackedWeight]) -> TestResult:
    """A bisect of the float parent and the file with levels."""
    file, test = parent(folder / "net.onnx", weights), levels_file(folder, packed)
    return cp_debug.diagnose(str(file.path), "ort,ort", test_model=str(test.path), progress=False).tests[0]


WIDE = {"a": weight(1), "b": weight(2, OUTPUTS, 24)}


@pytest.mark.parametrize(("bits", "symmetric"), [(3, False), (4, False), (4, True), (8, True)])
def test_sound_levels_accuse_nobody(tmp_path: Path, bits: int, *, symmetric: bool) -> None:
    pytest.importorskip("onnxruntime")
    order = np.random.default_rng(1).permutation(INPUTS) // GROUP
    packed = {
        "a": quantized(WIDE["a"], bits, symmetric=symmetric, order=order),
        "b": quantized(WIDE["b"], bits, symmetric=symmetric),
    }
    test = compared(tmp_path, WIDE, packed)
    assert not test.guilty
    assert not test.findings


def _changed(w: PackedWeight, **parts: np.ndarray) -> PackedWeight:
    return PackedWeight(**{**vars(w), **parts})


def _outliers(w: np.ndarray) -> np.ndarray:
    """A weight with a few inputs of large weights, which act-order puts into one group."""
    return np.where(np.arange(len(w))[:, None] % 16 == 5, 8 * w, w).astype(np.float32)


LARGE_FIRST = np.argsort(np.argsort(-(np.arange(INPUTS) % 16 == 5).astype(int), kind="stable")) // GROUP


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (lambda w: _changed(w, zero=w.zero - 1), "its zero points are 1 too small"),
        (lambda w: _changed(w, zero=w.zero + 1), "its zero points are 1 too large"),
        (lambda w: _changed(w, scale=np.roll(w.scale, 1, 1)), "INT4 scales of"),
        (lambda w: _changed(w, groups=np.arange(INPUTS) // GROUP), "inputs are not in the groups of their"),
        (
            lambda w: _changed(w, levels=w.levels.reshape(INPUTS, -1, 8)[:, :, AWQ_ORDER].reshape(INPUTS, -1)),
            "codes are in another order within words of eight along axis 1",
        ),
        (lambda w: _changed(w, levels=w.levels.reshape(-1, 8, OUTPUTS)[:, ::-1].reshape(INPUTS, -1)), "along axis 0"),
    ],
)
def test_what_was_read_wrong_is_named(tmp_path: Path, fault: Callable[[PackedWeight], PackedWeight], says: str) -> None:
    pytest.importorskip("onnxruntime")
    weights = WIDE | {"a": _outliers(WIDE["a"])}
    packed = {"a": quantized(weights["a"], 4, order=LARGE_FIRST), "b": quantized(weights["b"], 4)}
    packed["a"] = fault(packed["a"])
    test = compared(tmp_path, weights, packed)
    assert [row.op for row in test.guilty] == ["MatMul"]
    assert [(finding.cause, finding.layers) for finding in test.findings] == [("int4-weights", [test.guilty[0].name])]
    assert says in test.findings[0].says


def test_channels_that_awq_scaled_are_no_fault(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    by = np.exp(np.random.default_rng(7).normal(0, 0.8, OUTPUTS)).astype(np.float32)
    packed = {"a": quantized(WIDE["a"] / by, 4), "b": quantized(WIDE["b"] * by[:, None], 4)}
    test = compared(tmp_path, WIDE, packed)
    assert not test.guilty
    assert any("in another basis" in note for note in test.notes)


def test_groups_in_another_order_are_expected_as_they_are(tmp_path: Path) -> None:
    """Inputs with large weights have a group of their own: in groups in order the error would be another."""
    pytest.importorskip("onnxruntime")
    weights = WIDE | {"a": _outliers(WIDE["a"])}
    packed = {"a": quantized(weights["a"], 4, order=LARGE_FIRST), "b": quantized(weights["b"], 4)}
    [row] = [row for row in compared(tmp_path, weights, packed).rows if row.op == "MatMul"]
    assert row.replay is not None
    assert row.replay.excess == pytest.approx(1, abs=0.01)
