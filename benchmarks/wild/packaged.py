"""Networks whose architectures packages define (timm, transformers, ultralytics, torchvision …).

Seeded weights, not trained; small settings. They need ``requirements-packaged.txt`` in this Python, and are exported as
those of ``architectures.py``; nobody of this project wrote them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.append(str(Path(__file__).resolve().parents[1]))  # this file is also loaded by its path, outside the package
from wild.architectures import Made, _image, _trained

_KEPT: list[torch.library.Library] = []


def _import_torchvision() -> None:
    """Import torchvision, which timm needs, also where its compiled operators do not load (they are built for CUDA):
    the two that it asks for while it is imported are declared, and no network here runs them."""
    if "torchvision" in sys.modules:
        return
    try:
        import_module("torchvision")
    except RuntimeError:
        for name in [n for n in sys.modules if n.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _KEPT.append(library)
        import_module("torchvision")


class Tensors(nn.Module):
    """A model whose inputs are positional and whose outputs are a tuple of tensors, whatever it returns itself."""

    def __init__(self, model: nn.Module, *names: str, outputs: tuple[str, ...] = (), **fixed: Any) -> None:
        super().__init__()
        self.model, self.names, self.outputs, self.fixed = model, names, outputs, fixed

    def forward(self, *inputs: Tensor) -> Any:
        if self.names:
            made = self.model(**dict(zip(self.names, inputs, strict=True)), **self.fixed)
        else:
            made = self.model(*inputs, **self.fixed)
        if self.outputs:
            made = tuple(made[name] for name in self.outputs)
        return made


def _seeded(name: str, make: Callable[[], Made]) -> Callable[[], Made]:
    def made() -> Made:
        torch.manual_seed(sum(map(ord, name)))
        module, inputs = make()
        for parameter in module.parameters():  # scales of 1e-6 and zeros are what training starts with
            if parameter.ndim == 1 and parameter.numel() > 1 and float(parameter.detach().abs().max()) < 1e-3:
                nn.init.normal_(parameter, 0, 0.3)
        with torch.no_grad():
            return _trained(module, inputs)

    return made


def _timm(name: str, side: int, **settings: Any) -> Callable[[], Made]:
    def make() -> Made:
        _import_torchvision()
        import timm
        from timm.layers import set_exportable, set_fused_attn

        set_exportable(True)
        set_fused_attn(False)
        return timm.create_model(name, num_classes=10, **settings), (_image(side),)

    return make


def _transformers(
    architecture: str, inputs: Callable[[], dict[str, Tensor]], outputs: str, fixed: Any = None, **settings: Any
) -> Callable[[], Made]:
    def make() -> Made:
        import transformers

        kind = getattr(transformers, architecture)
        config = kind.config_class(**settings)
        config._attn_implementation = "eager"
        given = inputs()
        model = kind(config)
        return Tensors(model, *given, outputs=tuple(outputs.split()), **(fixed or {})), tuple(given.values())

    return make


def _segmentation(architecture: str, encoder: str, **settings: Any) -> Callable[[], Made]:
    def make() -> Made:
        _import_torchvision()
        import segmentation_models_pytorch

        kind = getattr(segmentation_models_pytorch, architecture)
        return kind(encoder_name=encoder, encoder_weights=None, classes=2, **settings), (_image(64),)

    return make


def _ultralytics(file: str, kind: str = "DetectionModel") -> Callable[[], Made]:
    def make() -> Made:
        _import_torchvision()
        from ultralytics.nn import tasks

        model = getattr(tasks, kind)(file, nc=4, verbose=False)
        head = model.model[-1]
        head.export, head.format, head.dynamic = True, "onnx", False
        return model, (_image(64),)

    return make


def _volo() -> Made:
    _import_torchvision()
    from timm.models.volo import VOLO

    widths = {"embed_dims": (24, 48, 48, 48), "num_heads": (2, 4, 4, 4), "mlp_ratio": (2, 2, 2, 2)}
    return VOLO(layers=(1, 1, 1, 1), img_size=64, num_classes=10, downsamples=(True, False, False, False), **widths), (
        _image(64),
    )


def _torchvision() -> Made:
    _import_torchvision()
    from torchvision.models.segmentation import lraspp_mobilenet_v3_large

    model = lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=4)
    return Tensors(model, outputs=("out",)), (_image(64),)


def _ids(count: int, words: int = 90) -> Tensor:
    return torch.randint(3, words, (1, count))


def _padded(count: int) -> Tensor:
    mask = torch.ones(1, count, dtype=torch.long)
    mask[:, count - 3 :] = 0
    return mask


_SMALL = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
_SPEECH = {
    **_SMALL,
    "conv_dim": (24, 24, 24),
    "conv_stride": (5, 2, 2),
    "conv_kernel": (10, 3, 3),
    "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "vocab_size": 20,
}
_TOWER = {**_SMALL, "image_size": 32, "patch_size": 8, "projection_dim": 24}
_RT_DETR = {
    "backbone_config": {
        "model_type": "rt_detr_resnet",
        "embedding_size": 8,
        "hidden_sizes": [8, 16, 24, 32],
        "depths": [1, 1, 1, 1],
        "layer_type": "basic",
        "out_features": ["stage2", "stage3", "stage4"],
    },
    "encoder_hidden_dim": 32,
    "encoder_in_channels": [16, 24, 32],
    "encoder_ffn_dim": 48,
    "encoder_attention_heads": 4,
    "d_model": 32,
    "num_queries": 12,
    "decoder_in_channels": [32, 32, 32],
    "decoder_ffn_dim": 48,
    "decoder_layers": 2,
    "decoder_attention_heads": 4,
    "num_labels": 5,
}

_MAKERS: dict[str, Callable[[], Made]] = {
    "edgenext": _timm("edgenext_xx_small", 64),
    "mobilevit": _timm("mobilevitv2_050", 64),
    "ghostnet": _timm("ghostnet_050", 64),
    "levit": _timm("levit_128s", 224, embed_dim=(32, 48, 64), key_dim=16, num_heads=(2, 3, 4), depth=(1, 2, 2)),
    "xcit": _timm("xcit_nano_12_p16_224", 64, img_size=64, depth=3),
    "regnet": _timm("regnety_002", 64),
    "hrnet": _timm("hrnet_w18_small", 64),
    "maxvit": _timm("maxvit_rmlp_pico_rw_256", 64, img_size=64, embed_dim=(32, 32, 64, 64), depths=(1, 1, 1, 1)),
    "efficientvit": _timm("efficientvit_b0", 64, head_widths=(64, 64)),
    "fastvit": _timm("fastvit_t8", 64, layers=(1, 1, 1, 1)),
    "starnet": _timm("starnet_s050", 64),
    "nfnet": _timm("nf_regnet_b0", 64),
    "volo": _volo,
    "convit": _timm("convit_tiny", 64, img_size=64, embed_dim=48, depth=3, local_up_to_layer=2),
    "wav2vec2": _transformers(
        "Wav2Vec2ForCTC",
        lambda: {"input_values": torch.sin(torch.arange(1600.0) / 9)[None] + 0.1 * torch.randn(1, 1600)},
        "logits",
        **_SPEECH,
    ),
    "rtdetr": _transformers(
        "RTDetrForObjectDetection", lambda: {"pixel_values": _image(64)}, "logits pred_boxes", **_RT_DETR
    ),
    "swinv2": _transformers(
        "Swinv2ForImageClassification",
        lambda: {"pixel_values": _image(64)},
        "logits",
        image_size=64,
        patch_size=4,
        embed_dim=24,
        depths=[2, 2],
        num_heads=[2, 4],
        window_size=4,
    ),
    "mamba": _transformers(
        "MambaForCausalLM",
        lambda: {"input_ids": _ids(9)},
        "logits",
        {"use_cache": False},
        vocab_size=90,
        hidden_size=32,
        state_size=8,
        num_hidden_layers=2,
    ),
    "t5": _transformers(
        "T5ForConditionalGeneration",
        lambda: {"input_ids": _ids(10), "attention_mask": _padded(10), "decoder_input_ids": _ids(6)},
        "logits",
        {"use_cache": False},
        vocab_size=90,
        d_model=48,
        d_kv=12,
        d_ff=96,
        num_layers=2,
        num_heads=4,
    ),
    "whisper": _transformers(
        "WhisperForConditionalGeneration",
        lambda: {"input_features": torch.randn(1, 20, 64), "decoder_input_ids": _ids(6)},
        "logits",
        {"use_cache": False},
        vocab_size=90,
        num_mel_bins=20,
        d_model=48,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=96,
        decoder_ffn_dim=96,
        max_source_positions=32,
        max_target_positions=16,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    ),
    "clip": _transformers(
        "CLIPModel",
        lambda: {"input_ids": _ids(8), "pixel_values": _image(32), "attention_mask": _padded(8)},
        "logits_per_image text_embeds image_embeds",
        text_config={
            **_SMALL,
            "vocab_size": 90,
            "max_position_embeddings": 12,
            "projection_dim": 24,
            "eos_token_id": 2,
        },
        vision_config=_TOWER,
        projection_dim=24,
    ),
    "segformer": _transformers(
        "SegformerForSemanticSegmentation",
        lambda: {"pixel_values": _image(64)},
        "logits",
        depths=[1, 1, 1, 1],
        hidden_sizes=[16, 24, 32, 48],
        num_attention_heads=[1, 2, 4, 4],
        decoder_hidden_size=32,
        num_labels=4,
    ),
    "deberta": _transformers(
        "DebertaV2ForTokenClassification",
        lambda: {"input_ids": _ids(10), "attention_mask": _padded(10)},
        "logits",
        **_SMALL,
        vocab_size=90,
        relative_attention=True,
        position_buckets=8,
        pos_att_type=["p2c", "c2p"],
        share_att_key=True,
        norm_rel_ebd="layer_norm",
        max_position_embeddings=32,
    ),
    "patchtsmixer": _transformers(
        "PatchTSMixerForPrediction",
        lambda: {"past_values": torch.randn(1, 48, 3).cumsum(1)},
        "prediction_outputs",
        {"return_loss": False},
        context_length=48,
        prediction_length=12,
        num_input_channels=3,
        patch_length=8,
        patch_stride=8,
        d_model=16,
        num_layers=2,
        gated_attn=True,
        self_attn=True,
    ),
    "deeplab": _segmentation("DeepLabV3Plus", "timm-mobilenetv3_small_minimal_100"),
    "unetplus": _segmentation(
        "UnetPlusPlus", "timm-mobilenetv3_small_minimal_100", decoder_channels=(48, 32, 24, 16, 8)
    ),
    "yolo11": _ultralytics("yolo11n-seg.yaml", "SegmentationModel"),
    "yolo10": _ultralytics("yolov10n.yaml"),
    "lraspp": _torchvision,
}
ARCHITECTURES: dict[str, Callable[[], Made]] = {name: _seeded(name, make) for name, make in _MAKERS.items()}
globals().update(ARCHITECTURES)  # ``packaged.py:edgenext`` is a callable for cpdebug
