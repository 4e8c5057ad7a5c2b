"""A folder of Hugging Face's transformers: the text model in it on PyTorch, ONNX Runtime, and in emulated FP16.

    python transformers_folder.py bert-base-uncased/

The folder holds ``config.json`` and safetensors, as ``save_pretrained`` or a download leave them. Code in it is never
run, and nothing is downloaded. Without an argument it makes a small BERT. Needs ``pip install '.[transformers]'`` in a
checkout of cpdebug.
"""

import sys
from pathlib import Path
from tempfile import mkdtemp

import cp_debug


def made() -> Path:
    """A small BERT with random weights."""
    import torch
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, vocab_size=1000
    )
    folder = Path(mkdtemp()) / "bert"
    BertModel(config).save_pretrained(folder)
    return folder


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) == 2 else made()
    result = cp_debug.diagnose(str(folder), "torch,ort,emu-fp16")
    print(result)
    worst = result.tests[1].layers.nlargest(3, "introduced")
    print(worst[["name", "op", "introduced", "expected", "excess"]].to_string(index=False))


if __name__ == "__main__":
    main()
