"""Inspector JSON of 8.6 and of 10/11, and tactic names."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cp_debug.backends.tensorrt.inspector import (
    compare_engines,
    decode,
    fusions,
    materialized,
    parse_layers,
    realised_precision,
    with_split,
)
from cp_debug.bisect.causes.where import orders
from cp_debug.reports.tables import kernel, sums

CONV = "sm80_xmma_fprop_implicit_gemm_{}_nhwckrsc_nhwc_tilesize128x128x64_stage4_warpsize2x2x1_g1_tensor16x8x16"
HALF = "Channel major FP16 format where channel % 8 == 0"

# As 8.6 prints it: no escapes for control characters, formats in prose, no metadata but what was set before the build.
TENSORRT_8 = """{"Layers": [{
  "Name": "Reformatting CopyNode for Input Tensor 0 to /b0/b0.0/Conv + /b0/b0.2/Relu",
  "LayerType": "Reformat",
  "Inputs": [{"Name": "x", "Location": "Device", "Dimensions": [1,64,64,64],
    "Format/Datatype": "Row major linear FP32"}],
  "Outputs": [{"Name": "Reformatted Input Tensor 0 to /b0/b0.0/Conv + /b0/b0.2/Relu", "Location": "Device",
    "Dimensions": [1,64,64,64], "Format/Datatype": "HALF"}],
  "ParameterType": "Reformat", "Origin": "REFORMAT", "TacticValue": "0x3ea"
},{
  "Name": "/b0/b0.0/Conv + /b0/b0.2/Relu",
  "LayerType": "CaskConvolution",
  "Inputs": [{"Name": "Reformatted Input Tensor 0 to /b0/b0.0/Conv + /b0/b0.2/Relu", "Location": "Device",
    "Dimensions": [1,64,64,64], "Format/Datatype": "HALF"}],
  "Outputs": [{"Name": "/b0/b0.2/Relu_output_0", "Location": "Device", "Dimensions": [1,64,64,64],
    "Format/Datatype": "HALF"}],
  "Weights": {"Type": "Half", "Count": 36864}, "Activation": "RELU",
  "TacticName": "CONV", "TacticValue": "0x1",
  "Metadata": "[ONNX Layer: /b0/b0.0/Conv]\x1f[ONNX Layer: /b0/b0.2/Relu]"
},{
  "Name": "PWN(PWN(/b1/Sigmoid), /b1/Mul)",
  "LayerType": "PointWiseV2",
  "Inputs": [{"Name": "/b0/b0.2/Relu_output_0", "Dimensions": [1,64,64,64], "Format/Datatype": "HALF"}],
  "Outputs": [{"Name": "y", "Dimensions": [1,64,64,64], "Format/Datatype": "Row major linear FP32"}],
  "ParameterType": "PointWise", "TacticValue": "0x1c"
}], "Bindings": ["x", "y"]}""".replace("HALF", HALF).replace("CONV", CONV.format("f16f16_f16f16_f16"))

TENSORRT_10 = json.dumps(
    {
        "Layers": [
            {
                "Name": "/b0/b0.0/Conv + /b0/b0.2/Relu",
                "LayerType": "CaskConvolution",
                "Inputs": [{"Name": "x", "Dimensions": [1, 64, 64, 64], "Format/Datatype": "Half"}],
                "Outputs": [
                    {"Name": "/b0/b0.2/Relu_output_0", "Dimensions": [1, 64, 64, 64], "Format/Datatype": "Half"}
                ],
                "TacticName": CONV.format("f16f16_f16f32_f32"),
                "Metadata": "[ONNX Layer: /b0/b0.0/Conv]\x1f[ONNX Layer: /b0/b0.2/Relu]",
            },
            {
                "Name": "__myl_SigMul_myl0_1",
                "LayerType": "kgen",
                "Inputs": [{"Name": "/b0/b0.2/Relu_output_0", "Dimensions": [1], "Format/Datatype": "Half"}],
                "Outputs": [{"Name": "y", "Dimensions": [1], "Format/Datatype": "Float"}],
                "TacticName": "__myl_SigMul_0x1f",
                "Metadata": "[ONNX Layer: /b1/Sigmoid]\x1e[ONNX Layer: /b1/Mul]",
            },
        ],
        "Bindings": ["x", "y"],
    }
)
NODES = ["/b0/b0.0/Conv", "/b0/b0.2/Relu", "/b1/Sigmoid", "/b1/Mul"]
VALUES = ["/b0/b0.0/Conv_output_0", "/b0/b0.2/Relu_output_0", "/b1/Sigmoid_output_0", "y"]


def load(text: str):
    return parse_layers(json.loads(text, strict=False)["Layers"], NODES)


@pytest.mark.parametrize("text", [TENSORRT_8, TENSORRT_10])
def test_layers_nodes_and_what_is_in_memory(text: str) -> None:
    layers = [layer for layer in load(text) if layer.nodes]
    assert [layer.nodes for layer in layers] == [tuple(NODES[:2]), tuple(NODES[2:])]
    found = {name: tensor.dtype for name, tensor in materialized(load(text), VALUES).items()}
    assert found == {"/b0/b0.2/Relu_output_0": "Half", "y": "Float"}
    assert realised_precision(load(text)) == {"Float": 0.25, "Half": 0.75}


def test_borders_in_fp32_say_nothing_about_a_compiled_layer() -> None:
    entries = json.loads(TENSORRT_10)["Layers"]
    assert realised_precision(parse_layers([*entries, {**entries[1], "LayerType": "Myelin"}], NODES)) == {
        "Float": 0.2,
        "Half": 0.8,
    }


def test_reformats_belong_to_no_node() -> None:
    first = load(TENSORRT_8)[0]
    assert (first.kind, first.nodes, first.inputs[0].dtype) == ("Reformat", (), "Float")
    assert first.outputs[0].shape == (1, 64, 64, 64)


def test_accumulation_is_told_by_the_tactic() -> None:
    assert load(TENSORRT_8)[1].tactic.arithmetic == "fp16acc"
    assert load(TENSORRT_10)[0].tactic.arithmetic == "fp16"
    assert load(TENSORRT_10)[0].to_dict()["arithmetic"] == "fp16"


def test_engines_of_bare_names() -> None:
    (layer,) = parse_layers(["/b0/b0.0/Conv + /b0/b0.2/Relu"], NODES)
    assert (layer.nodes, layer.inputs, layer.outputs) == (tuple(NODES[:2]), (), ())


def test_differences_between_builds() -> None:
    eight, ten = load(TENSORRT_8), load(TENSORRT_10)
    assert compare_engines(eight, eight).same
    other = compare_engines(eight, ten)
    assert other.fusions == ()
    assert other.tactics == ("/b0/b0.0/Conv + /b0/b0.2/Relu", "/b1/Mul + /b1/Sigmoid")
    split = parse_layers(["/b0/b0.0/Conv", "/b0/b0.2/Relu"], NODES)
    assert "/b0/b0.0/Conv + /b0/b0.2/Relu" in compare_engines(eight, split).fusions
    assert frozenset(NODES[:2]) in fusions(eight)


@pytest.mark.parametrize(
    ("name", "arithmetic", "accumulates", "tile"),
    [
        (CONV.format("f16f16_f16f16_f16"), "fp16acc", "fp16", (128, 128, 64)),
        (CONV.format("f16f16_f16f32_f32"), "fp16", "fp32", (128, 128, 64)),
        (CONV.format("f32f32_tf32f32_f32"), "tf32", "fp32", (128, 128, 64)),
        (CONV.format("bf16bf16_bf16f32_f32"), "bf16", "fp32", (128, 128, 64)),
        (CONV.format("i8f32_i8i32_f32"), "int8", "int32", (128, 128, 64)),
        ("sm80_xmma_fprop_implicit_gemm_interleaved_i8i8_i8i32_f32_nchw_vect_c_32", "int8", "int32", None),
        ("sm80_xmma_gemm_f32f32_f32f32_f32_tn_n_tilesize32x128x8_stage3_ffma", "fp32", "fp32", (32, 128, 8)),
        ("ampere_h16816gemm_128x64_ldg8_stages_32x6_nn_v1", "fp16acc", "fp16", None),
        ("turing_fp16_s1688cudnn_fp16_128x128_ldg8_relu_exp_medium_nhwc_tn_v1", "fp16", "fp32", None),
        ("volta_h884cudnn_256x64_ldg8_relu_exp_small_nhwc_tn_v1", "fp16acc", "fp16", None),
        ("ampere_scudnn_128x64_relu_small_nn_v1", "fp32", "fp32", None),
        (
            "sm50_xmma_deconv_2d_stride_eq_filter_FP32FP32FP32NCHW_tilesize32x128x16_threadsize8x16_threadPixels4x4",
            "fp32",
            "fp32",
            (32, 128, 16),
        ),
        ("sm50_xmma_cublas_gemvx_f16f16_f32_f32_tn_n_int32_unit_n_launch_param4x32x1", "fp16", "fp32", None),
        ("sm50_xmma_cublas_gemvx_f32f32_f32_f32_nn_n_int32_unit_n_launch_param16x8x8", "fp32", "fp32", None),
        (
            "sm50_xmma_fprop_conv3d_c1_k1_f16f16_f16_f16_ndhwcktrsc_ndhwc_tilesize64x16_threadsize64x2_general_alignC8",
            "fp16acc",
            "fp16",
            None,
        ),
        ("sm50_xmma_convolution_depthwiseHMMA_FP16NHWCx8_TR5_TS5_STRIDEH1_STRIDEW1", "fp16", "fp32", None),
        ("sm70_xmma_convolution_depthwiseConv_fp32fp32_trt_kernel_fp32_TR_TS", "fp32", "fp32", None),
        ("__myl_SigMul_0x1f", None, None, None),
        ("", None, None, None),
    ],
)
def test_tactic_names(name: str, arithmetic: str | None, accumulates: str | None, tile: tuple | None) -> None:
    tactic = decode(name)
    assert (tactic.arithmetic, tactic.accumulates, tactic.tile) == (arithmetic, accumulates, tile)


def test_winograd_is_seen() -> None:
    assert decode("sm80_xmma_fprop_winograd_f32f32_f32f32_f32").winograd
    assert decode("sm50_xmma_conv_wngd_f32f32_f32f32_f32_f3x3").winograd
    assert not decode(CONV.format("f16f16_f16f16_f16")).winograd


@given(
    st.lists(st.lists(st.text(st.characters(codec="ascii", exclude_characters="[]\x1e\x1f"), min_size=1), min_size=1))
)
def test_any_metadata_gives_its_nodes_back(groups: list[list[str]]) -> None:
    entries = [{"Name": "layer", "Metadata": "\x1f".join(f"[ONNX Layer: {n}]" for n in group)} for group in groups]
    layers = parse_layers(entries, {name for group in groups for name in group})
    assert [list(layer.nodes) for layer in layers] == [list(dict.fromkeys(group)) for group in groups]


@pytest.mark.parametrize(
    ("tile", "more", "vector"),
    [
        ("128x16x64", "_aligna8_alignc8", 8),
        ("128x16x64", "_alignc4", 8),
        ("128x32x64", "_aligna4_alignc4", 4),
        ("128x16x32", "_aligna8_alignc8", 4),
    ],
)
def test_kernels_without_shared_memory_tell_their_vectors(tile: str, more: str, vector: int) -> None:
    start = "sm80_xmma_fprop_implicit_gemm_indexed"
    end = f"f16f16_f16f16_f16_nhwckrsc_nhwc_tilesize{tile}_stage1_warpsize4x1x1_g1_tensor16x8x16{more}"
    assert decode(f"{start}_wo_smem_{end}").vector == vector
    assert decode(f"{start}_{end}").vector == 0


GEMM = "sm80_xmma_gemm_f16f16_f16f16_f16_nn_n_tilesize32x32x64_stage6_warpsize2x2x1_tensor16x8x16"


@pytest.mark.parametrize(
    ("number", "split", "kernels"),  # as TensorRT 8.6's log and inspector gave them
    [
        ("0x00000000000207e5", 1, 1),
        ("0x000000000c0e07e5", 7, 1),
        ("0x00000002080802df", 4, 2),
        ("0x00000000080a02df", 5, 1),
        ("0x00000002181807e5", 12, 2),
        ("0x0000000280800939", 64, 2),
        ("0x0000000002080939", 1, 1),  # four parts, one buffer: not such a number
        ("0xc5b678b79dec25fd", 1, 1),  # the hash of a convolution
        ("", 1, 1),
    ],
)
def test_the_number_of_a_gemm_tells_how_its_sum_is_split(number: str, split: int, kernels: int) -> None:
    entry = {"Name": "/a/MatMul", "LayerType": "CaskGemmMatrixMultiply", "TacticName": GEMM, "TacticValue": number}
    (layer,) = parse_layers([entry], {"/a/MatMul"})
    assert (layer.tactic.split, layer.tactic.split_kernels, layer.tactic.tile) == (split, kernels, (32, 32, 64))
    assert decode(layer.tactic.name) == layer.tactic
    assert kernel(layer.tactic.name) == ("fp16acc/64" if split == 1 else f"fp16acc/64 split {split}")
    assert decode(with_split(GEMM.replace("_gemm_", "_fprop_"), number)).split == 1


def test_an_engine_tells_how_its_products_sum_whatever_their_excess() -> None:
    layers = [
        {"kind": "CaskConvolution", "tactic": GEMM},
        {"kind": "CaskGemmMatrixMultiply", "tactic": with_split(GEMM, "0xc0e07e5")},
        {"kind": "CaskConvolution", "tactic": GEMM.replace("f16f16_f16f16_f16", "f32f32_f32f32_f32")},
        {"kind": "CaskPooling", "tactic": "sm50_xmma_pooling_max"},
        {"kind": "Reformat", "tactic": ""},
        {"kind": "Myelin", "tactic": ""},
    ]
    told = "products: 2 sum in FP16, 1 FP32, 1 of them with a split sum, 1 region without kernel names"
    assert sums(layers) == told
    assert (
        sums([{**layers[2], "tactic": GEMM.replace("f16f16_f16f16_f16", "f32f32_tf32f32_f32")}]) == "products: 1 TF32"
    )
    assert sums(layers[3:5]) == ""


def test_orders_told_by_a_name_are_told_from_fitted_ones() -> None:
    start, end = "sm80_xmma_fprop_implicit_gemm", "f16f16_f16f16_f16_nhwckrsc_nhwc_tilesize128x16x64_stage1"
    tiled, direct, silent = f"{start}_{end}", f"{start}_indexed_wo_smem_{end}_alignc4", "sm50_xmma_gemvx"
    layers = [
        *((tiled, {"tile": 64, "slices": 1}), (tiled, {"tile": 32, "slices": 1}), (tiled, {"tile": 64, "vector": 8})),
        *((direct, {"tile": 64, "slices": 1}), (direct, {"tile": 64, "slices": 1, "vector": 8})),
        (silent, {"tile": 64, "slices": 1}),
    ]
    assert orders("fp16-accumulation", layers) == {"orders_told": 2, "orders_fitted": 4}
    split = [(with_split(GEMM, "0xc0e07e5"), {"tile": 64, "slices": 1, "split": parts}) for parts in (7, 1)]
    assert orders("fp16-accumulation", split) == {"orders_told": 1, "orders_fitted": 1}
    assert orders("tf32", layers) == {}
