"""Folders of transformers: loaded from disk alone, with inputs that fit; what would run code is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from extras import needs
from test_cli import run


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


@needs("transformers")
def test_code_in_a_folder_is_never_run(tmp_path: Path) -> None:
    path = folder(tmp_path / "a", model_type="of-their-own", auto_map={"AutoModel": "modeling.Net"})
    (path / "model.safetensors").write_bytes(b"")
    (path / "modeling.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    code, text = run("bisect", path)
    assert code == 2
    assert "names code of its own (modeling.Net)" in text
    assert not (tmp_path / "ran").exists()


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
