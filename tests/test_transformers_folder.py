"""Folders of transformers: loaded from disk alone, with inputs that fit; what would run code is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from extras import needs
from safetensors.torch import load_file, save_file
from test_cli import run
from test_packed_weights import GPTQ, gptq, quantized


def folder(path: Path, **config: object) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"model_type": "bert", **config}))
    return path


def test_pickled_weights_and_missing_ones_are_refused(tmp_path: Path) -> None:
    (folder(tmp_path / "a") / "pytorch_model.bin").write_bytes(b"")
    code, text = run("bisect", tmp_path / "a")
    assert code == 2
    assert "pytorch_model.bin is pickled, and unpickling runs code" in text
    code, text = run("bisect", folder(tmp_path / "b"))
    assert (code, "there are no weights" in text) == (2, True)


@pytest.mark.parametrize("content", ["{}", "[]", "{", '{"model": 1}'])
def test_configurations_that_are_none(content: str, tmp_path: Path) -> None:
    (folder(tmp_path / "a") / "config.json").write_text(content)
    (tmp_path / "a" / "model.safetensors").write_bytes(b"")
    code, text = run("bisect", tmp_path / "a")
    assert code == 2
    assert "config.json" in text


def test_a_checkpoint_beside_a_folder_is_refused(tmp_path: Path) -> None:
    (folder(tmp_path / "a") / "model.safetensors").write_bytes(b"")
    (tmp_path / "w.pt").write_bytes(b"")
    code, text = run("bisect", tmp_path / "a", "--checkpoint", tmp_path / "w.pt")
    assert (code, "already holds its weights" in text) == (2, True)


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"model_type": 3}, "model_type is '3'; expected a name"),
        ({"architectures": -1}, "architectures is '-1'; expected a list of names"),
        ({"architectures": [["Net"]]}, "expected a list of names"),
    ],
)
def test_a_configuration_of_other_types_is_refused(config: dict[str, object], told: str, tmp_path: Path) -> None:
    path = folder(tmp_path / "a", **config)
    (path / "model.safetensors").write_bytes(b"")
    code, text = run("bisect", path)
    assert (code, told in " ".join(text.split())) == (2, True), text


@needs("transformers")
@pytest.mark.parametrize("kind", ["of-their-own", "bert"])
def test_code_in_a_folder_is_never_run(kind: str, tmp_path: Path) -> None:
    auto_map = {"AutoModel": "modeling.Net"}
    path = folder(tmp_path / "a", model_type=kind, architectures=["Net"], auto_map=auto_map)
    (path / "model.safetensors").write_bytes(b"")
    (path / "modeling.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    code, text = run("bisect", path)
    assert code == 2
    assert "names custom code (modeling.Net)" in text
    assert not (tmp_path / "ran").exists()


@pytest.mark.slow
@needs("transformers")
@pytest.mark.parametrize("kind", ["text", "images"])
def test_a_model_is_bisected(kind: str, tmp_path: Path) -> None:
    import transformers

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    if kind == "text":
        config = transformers.BertConfig(**sizes, vocab_size=50, max_position_embeddings=12)
        transformers.BertForSequenceClassification(config).save_pretrained(tmp_path / "net")
    else:
        config = transformers.ViTConfig(**sizes, image_size=16, patch_size=8)
        transformers.ViTForImageClassification(config).save_pretrained(tmp_path / "net")
    code, text = run("bisect", tmp_path / "net", "-b", "torch,ort")
    assert code == 0, text
    assert "1 of 1 outputs" in text


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A small decoder in floats, and packed by GPTQ with groups in another order."""
    import transformers

    parent, test = (tmp_path_factory.mktemp("folders") / name for name in ("floats", "gptq"))
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**sizes, num_key_value_heads=1, vocab_size=50, max_position_embeddings=12)
    model = transformers.LlamaForCausalLM(config)
    for folder in (parent, test):
        model.save_pretrained(folder)
    state = load_file(test / "model.safetensors")
    for name in [name for name in state if name.endswith("_proj.weight")]:
        weight = np.ascontiguousarray(state.pop(name).numpy().T)
        order = np.random.default_rng(len(state)).permutation(len(weight)) // 16
        made = gptq(quantized(weight, 4, order=order))
        state |= {f"{name.removesuffix('.weight')}.{end}": torch.from_numpy(array) for end, array in made.items()}
    save_file(state, test / "model.safetensors")
    _configured(test, quantization_config=GPTQ | {"desc_act": True})
    return parent, test


def _configured(path: Path, **changes: object) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | changes))


@needs("transformers")
@pytest.mark.slow
def test_a_packed_folder_is_compared_with_its_parent(packed: tuple[Path, Path]) -> None:
    parent, test = packed
    code, text = run("bisect", test, "-b", "torch,ort")
    assert code == 0, text
    assert "agrees within rtol 0.0001" in text
    code, text = run("bisect", parent, test, "--rtol", "0.5", "--atol", "0.5")
    assert code == 0, text
    assert "every layer computes what its scales say from its own inputs," in " ".join(text.split()), text
    _configured(test, quantization_config=GPTQ | {"desc_act": True, "checkpoint_format": "gptq_v2"})
    code, text = run("bisect", parent, test)
    _configured(test, quantization_config=GPTQ | {"desc_act": True})
    assert code == 1, text
    assert "7 layers (MatMul): its zero points are 1 too small" in text


@pytest.mark.slow
@needs("transformers")
def test_a_packed_folder_that_does_not_fit_its_model(packed: tuple[Path, Path], tmp_path: Path) -> None:
    whole = load_file(packed[1] / "model.safetensors")
    for name, changes, message in (
        ("lacks", {"model.norm.weight": None}, "holds no model.norm.weight, which LlamaForCausalLM has"),
        ("more", {"intermediate_size": 128}, "_proj.weight with the shape"),
    ):
        path = tmp_path / name
        path.mkdir()
        save_file({n: t for n, t in whole.items() if n not in changes}, path / "model.safetensors")
        (path / "config.json").write_text((packed[1] / "config.json").read_text())
        _configured(path, **{key: value for key, value in changes.items() if value is not None})
        code, text = run("bisect", path)
        assert (code, message in text) == (2, True), text


@needs("transformers")
@pytest.mark.parametrize("part", ["", "text_config"])
def test_a_configuration_with_more_layers_than_weights_is_refused_before_it_is_built(part: str, tmp_path: Path) -> None:
    asked = {"num_hidden_layers": 1_000_000}
    path = folder(tmp_path / "deep", **({part: asked} if part else asked))
    save_file({"a": torch.zeros(1)}, path / "model.safetensors")
    code, text = run("bisect", path, "-b", "torch,torch-bf16")
    assert code == 2
    assert "config.json: num_hidden_layers is 1000000; number of tensors beside it: 1" in " ".join(text.split())
