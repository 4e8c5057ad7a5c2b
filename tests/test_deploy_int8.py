"""Deployment in INT8: calibrated or from a checkpoint, exported with Q/DQ pairs, verified, AWML's block understood."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from extras import needs

from cp_debug.backends.tensorrt.config import decide
from cp_debug.deploy.config import load_config
from cp_debug.deploy.runner import deploy
from cp_debug.deploy.schema import DeployConfig
from cp_debug.deploy.stages import Deployment
from cp_debug.errors import InputError
from cp_debug.graph.graph import Graph
from cp_debug.programs.torch_layers import full_path
from cp_debug.quantization.checkpoint import save_ptq_model
from cp_debug.quantization.models import QuantizedComponent
from cp_debug.quantization.open_quantized import modules_of, open_quantized
from cp_debug.recipes.registry import load_model

AWML = Path(__file__).parent / "data" / "awml" / "deploy_config.py"
QUANTIZED = """
quantization = dict(enabled=True, mode="ptq", fuse_bn=True, quant_voxel_encoder=False, quant_backbone=True,
    quant_neck=True, quant_head=True, quant_add=True, skip_backbone_first_stages=1, skip_backbone_stages=[2],
    sensitive_layers=["pts_neck.deblocks.2.0"])
"""


def awml(folder: Path, text: str = QUANTIZED) -> Path:
    (folder / "deploy_config.py").write_text(AWML.read_text() + text)
    return folder / "deploy_config.py"


def settings(folder: Path, **more: object) -> DeployConfig:
    return DeployConfig.model_validate(
        {
            "model": "centerpoint:tiny",
            "work_dir": folder,
            "quantization": {"samples": 2, "method": "max", "skip_layers": ["pts_voxel_encoder"]},
            "verify": {"samples": 1},
            "evaluate": {"samples": 1},
            **more,
        }
    )


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Quantized, and its weights trained since, as far as anybody can tell."""
    path = tmp_path_factory.mktemp("checkpoint") / "qat.pt"
    modules = modules_of(open_quantized(load_model("centerpoint:tiny"), None, count=2, method="max"))
    with torch.no_grad():
        modules["pts_backbone_neck_head"].pts_bbox_head.shared_conv.conv.bias += 0.5
    save_ptq_model(modules, path)
    return path


def pairs(path: Path) -> int:
    return sum(node.op == "DequantizeLinear" for node in Graph(path).nodes)


@pytest.mark.slow
@needs("modelopt")
def test_calibrated_exported_verified_evaluated_and_resumed(tmp_path: Path) -> None:
    config = settings(tmp_path)
    records = deploy(Deployment(config, "c.yaml"))
    assert [(r.name, r.passed) for r in records] == [
        (name, True) for name in ("load", "quantize", "export", "verify", "evaluate")
    ]
    assert pairs(tmp_path / "onnx" / "pts_voxel_encoder.onnx") == 0
    assert pairs(tmp_path / "onnx" / "pts_backbone_neck_head.onnx") > 40
    (scenario,) = records[3].document["scenarios"]
    assert (scenario["reference"], scenario["test"]) == ("torch", "ort-int8")
    # The files differ from FP32 by INT8, and from the fake-quantized modules by far less.
    errors = [tensor["rel_l2"] for tensor in scenario["tensors"] if tensor["component"] == "pts_backbone_neck_head"]
    exported = {each["component"]: each["error"] for each in records[2].document["components"]}
    assert exported["pts_backbone_neck_head"] < min(errors)
    (tmp_path / "onnx" / "pts_voxel_encoder.onnx").unlink()
    again = deploy(Deployment(config, "c.yaml"))
    assert [r.name for r in again if r.resumed] == ["load", "quantize", "verify", "evaluate"]


@pytest.mark.slow
@needs("modelopt")
def test_checkpoint_brings_its_weights_scales_and_skips(tmp_path: Path, checkpoint: Path) -> None:
    config = settings(tmp_path, quantization={"checkpoint": checkpoint, "skip_layers": ["pts_neck"]})
    deployment = Deployment(config, "c.yaml")
    deployment.export()
    parts = deployment.quantized
    assert not any(name.startswith("pts_neck") for name in parts["pts_backbone_neck_head"].scales.layers)
    assert pairs(tmp_path / "onnx" / "pts_voxel_encoder.onnx") == 2
    expected = 2 * len(parts["pts_backbone_neck_head"].scales.layers)
    shared = len([n for n in parts["pts_backbone_neck_head"].scales.layers if ".task_heads." in n and ".0." in n[-7:]])
    assert expected - shared <= pairs(tmp_path / "onnx" / "pts_backbone_neck_head.onnx") <= expected
    trained = parts["pts_backbone_neck_head"].folded.pts_bbox_head.shared_conv.conv.bias  # type: ignore[union-attr]
    (own,) = [c.module for c in deployment.model.components if c.name == "pts_backbone_neck_head"]
    assert own.pts_bbox_head.shared_conv.conv.bias is None, "the reference is the FP32 model"
    assert trained.abs().max() > 0.4


@needs("modelopt")
def test_awmls_checkpoint_path_may_be_quantized(tmp_path: Path, checkpoint: Path) -> None:
    config = settings(tmp_path, checkpoint=checkpoint, quantization={"skip_layers": ["pts_voxel_encoder"]})
    deployment = Deployment(config, "c.yaml")
    (own,) = [c.module for c in deployment.model.components if c.name == "pts_backbone_neck_head"]
    assert own.pts_bbox_head.shared_conv.conv.bias.abs().max() > 0.4, "FP32 is the trained weights without INT8"
    assert not deployment.quantized["pts_voxel_encoder"].scales.layers


def foreign(path: Path, quantized: dict[str, QuantizedComponent], prefix: dict[str, str]) -> Path:
    """A state dict as pytorch-quantization leaves it: folded weights of the whole model, and ``_amax``."""
    state = {}
    for component, part in quantized.items():
        assert part.folded is not None
        for name, tensor in part.folded.state_dict().items():
            state[full_path(prefix[component], name)] = tensor
        for name, layer in part.scales.layers.items():
            axes = [1] * (state[f"{name}.weight"].ndim - 1)
            state[f"{name}._input_quantizer._amax"] = torch.tensor(layer.input)
            state[f"{name}._weight_quantizer._amax"] = torch.from_numpy(layer.weight).view(-1, *axes)
    torch.save({"state_dict": state}, path)
    return path


@needs("modelopt")
@pytest.mark.slow
def test_checkpoints_of_pytorch_quantization_are_read(tmp_path: Path) -> None:
    model = load_model("centerpoint:tiny")
    prefix = {component.name: component.prefix for component in model.components}
    quantized = open_quantized(model, None, count=2, method="max", skip_layers=["pts_voxel_encoder", "*.heatmap.1"])
    path = foreign(tmp_path / "ptq.pth", quantized, prefix)
    found = open_quantized(model, path, skip_layers=["pts_neck"])
    for name, part in quantized.items():
        layers = {layer: scales for layer, scales in part.scales.layers.items() if not layer.startswith("pts_neck")}
        assert found[name].scales.layers.keys() == layers.keys()
        for layer, scales in layers.items():
            assert found[name].scales.layers[layer].input == pytest.approx(scales.input)
            np.testing.assert_array_equal(found[name].scales.layers[layer].weight, scales.weight)
    x = torch.rand(1, 32, 32, 32)
    name = "pts_backbone_neck_head"
    assert all(map(torch.equal, found[name].folded(x), quantized[name].folded(x)))  # type: ignore[misc]
    deployment = Deployment(settings(tmp_path, checkpoint=path, quantization={}), "c.yaml")
    assert deployment.quantized[name].scales.layers.keys() == quantized[name].scales.layers.keys()
    state = torch.load(path)["state_dict"]
    upsampled = "pts_neck.deblocks.2.0"
    for damage, says in (
        (
            {f"{upsampled}._weight_quantizer._amax": torch.ones(128, 1, 1, 1)},
            f"{upsampled} has 128 scales for its weight",
        ),
        ({"pts_backbone.relu._input_quantizer._amax": torch.ones(1)}, "is the scale of no layer of centerpoint:tiny"),
        ({f"{upsampled}.weight": torch.ones(3)}, "does not fit the model"),
    ):
        torch.save({**state, **damage}, tmp_path / "damaged.pth")
        with pytest.raises(InputError, match=says):
            open_quantized(model, tmp_path / "damaged.pth")


def test_awml_block(tmp_path: Path) -> None:
    config = load_config(awml(tmp_path))
    assert config.quantization is not None
    assert config.quantization.skip_layers == [
        "pts_voxel_encoder",
        "pts_backbone.blocks.0",
        "pts_backbone.blocks.2",
        "pts_neck.deblocks.2.0",
    ]
    assert config.tensorrt.precision == "fp16"
    assert config.engine_backend == "trt-int8"
    assert [(s.reference, s.test) for s in config.scenarios()] == [("torch@cpu", "ort-int8@cpu")]
    assert load_config(awml(tmp_path, QUANTIZED.replace("enabled=True", "enabled=False"))).quantization is None


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("quantization = dict(enabled=True, fuse_bn=False)", "quantization.fuse_bn is false; expected True"),
        ("quantization = dict(enabled=True, mode='int4')", "quantization.mode is \"int4\"; expected 'ptq' or 'qat'"),
        ("quantization = dict(enabled=True, quant_bakbone=False)", "did you mean quant_backbone?"),
    ],
)
def test_awml_block_that_cannot_be_followed(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        load_config(awml(tmp_path, text))


def test_other_precisions_do_not_go_with_quantization(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("work_dir: w\nquantization: {}\ntensorrt: {precision: bf16}\n")
    with pytest.raises(InputError, match="'bf16' together with quantization; expected int8, fp16 or auto"):
        load_config(tmp_path / "c.yaml")


@needs("modelopt")
def test_bad_input(tmp_path: Path, checkpoint: Path) -> None:
    plain = Deployment(settings(tmp_path, quantization=None), "c.yaml")
    plain.export()
    quantized = Deployment(settings(tmp_path), "c.yaml")
    with pytest.raises(InputError, match="no file has Q/DQ pairs"):
        quantized.programs()
    with pytest.raises(InputError, match="torch-int8 runs modules"):
        quantized.backend("torch-int8")
    with pytest.raises(InputError, match=r"no layer matches 'pts_nek'; the nearest names are pts_neck"):
        open_quantized(load_model("centerpoint:tiny"), checkpoint, skip_layers=["pts_nek"])
    config = settings(tmp_path, quantization=None, tensorrt={"precision": "int8"})
    with pytest.raises(InputError, match=r"tensorrt\.precision is int8: expected a quantization section"):
        deploy(Deployment(config, "c.yaml"))


def test_engines_fall_back_to_fp16_without_a_calibrator() -> None:
    config = decide("int8", "8.6.1", quantized=True, fp16_fallback=True)
    assert config.set_flags == ("FP16", "INT8")
    assert decide("int8", "8.6.1", quantized=True).set_flags == ("INT8",)
    assert decide("fp16", "8.6.1", fp16_fallback=True).set_flags == ("FP16",)
    with pytest.raises(InputError, match="no QuantizeLinear"):
        decide("int8", "8.6.1", fp16_fallback=True)
