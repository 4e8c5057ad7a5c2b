"""Architectures of transformers on which no rule and no limit was chosen: they came after the rules they judge.

Made and exported as those of ``packaged.py``. Who changes a rule for one of them moves it there.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from wild.architectures import Made, _image
from wild.packaged import _SMALL, _SPEECH, _ids, _padded, _seeded, _transformers

_MAKERS: dict[str, Callable[[], Made]] = {
    "convnextv2": _transformers(
        "ConvNextV2ForImageClassification",
        lambda: {"pixel_values": _image(64)},
        "logits",
        hidden_sizes=[16, 24, 32, 48],
        depths=[1, 1, 2, 1],
    ),
    "dinov2": _transformers(
        "Dinov2ForImageClassification",
        lambda: {"pixel_values": _image(56)},
        "logits",
        hidden_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=56,
        patch_size=14,
    ),
    "bert": _transformers(
        "BertForTokenClassification",
        lambda: {"input_ids": _ids(12), "attention_mask": _padded(12)},
        "logits",
        **_SMALL,
        vocab_size=90,
        max_position_embeddings=32,
    ),
    "gpt2": _transformers(
        "GPT2LMHeadModel",
        lambda: {"input_ids": _ids(11)},
        "logits",
        {"use_cache": False},
        vocab_size=90,
        n_positions=32,
        n_embd=48,
        n_layer=3,
        n_head=4,
    ),
    "llama": _transformers(
        "LlamaForCausalLM",
        lambda: {"input_ids": _ids(11)},
        "logits",
        {"use_cache": False},
        **_SMALL,
        num_key_value_heads=2,
        vocab_size=90,
        max_position_embeddings=64,
    ),
    "poolformer": _transformers(
        "PoolFormerForImageClassification",
        lambda: {"pixel_values": _image(64)},
        "logits",
        hidden_sizes=[16, 24, 32, 48],
        depths=[1, 1, 2, 1],
    ),
    "focalnet": _transformers(
        "FocalNetForImageClassification",
        lambda: {"pixel_values": _image(64)},
        "logits",
        image_size=64,
        embed_dim=16,
        depths=[1, 1, 2, 1],
    ),
    "pvtv2": _transformers(
        "PvtV2ForImageClassification",
        lambda: {"pixel_values": _image(64)},
        "logits",
        image_size=64,
        hidden_sizes=[16, 32, 40, 48],
        depths=[1, 1, 1, 1],
        num_attention_heads=[1, 2, 4, 4],
    ),
    "mobilenetv2": _transformers(
        "MobileNetV2ForImageClassification",
        lambda: {"pixel_values": _image(64)},
        "logits",
        depth_multiplier=0.35,
        image_size=64,
    ),
    "hubert": _transformers(
        "HubertForCTC",
        lambda: {"input_values": torch.cos(torch.arange(1600.0) / 7)[None] + 0.1 * torch.randn(1, 1600)},
        "logits",
        **_SPEECH,
    ),
    "yolos": _transformers(
        "YolosForObjectDetection",
        lambda: {"pixel_values": _image(64)},
        "logits pred_boxes",
        **_SMALL,
        image_size=[64, 64],
        patch_size=16,
        num_detection_tokens=6,
    ),
    "patchtst": _transformers(
        "PatchTSTForPrediction",
        lambda: {"past_values": torch.randn(1, 48, 3).cumsum(1)},
        "prediction_outputs",
        context_length=48,
        prediction_length=12,
        num_input_channels=3,
        patch_length=8,
        patch_stride=8,
        d_model=16,
        num_attention_heads=2,
        num_hidden_layers=2,
        ffn_dim=32,
    ),
}
ARCHITECTURES: dict[str, Callable[[], Made]] = {name: _seeded(name, make) for name, make in _MAKERS.items()}
