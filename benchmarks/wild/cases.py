"""The questions that are asked of cpdebug: one command each, and what a right answer is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .faults import renamed_file
from .networks import SLOW, base, half, source_file

HEALTHY = ("ort-none,ort-basic", "ort-none,ort-all", "ort,emu-tf32", "ort,emu-bf16", "ort,emu-fp16")
"""What is asked of every network in FP32: nobody may be accused."""
TRUE = {
    "int8:decoder.dynamo:decoder.dynamo.static-tensorrt.onnx:ort,ort-int8": "The quantizer gave the scores after the "
    "attention mask one scale of 2.7e36, because the mask contains −3.4e38: every score becomes 0, and both Softmax "
    "are uniform (rel. L2 0.19).",
    "int8:decoder.dynamo:decoder.dynamo.static-tensorrt.onnx:ort,ort-all": "The same file; its Softmax is visible only "
    "through the next layer.",
    "healthy:ddddocr-old:ort,emu-fp16": "Sums of integers reach 156,996, FP16 ends at 65,504: the final output is NaN.",
    "healthy:magika:ort,emu-fp16": "A sum of squares reaches 131,711, FP16 ends at 65,504: the scores are off by 1.03 "
    "(rel. L2).",
}
"""Cases that are not healthy, although nobody put a fault in: looked at by hand, an accusation is right."""
QUICK = frozenset({"ppocr-cls", "magika", "silero", "resnet.dynamo", "vit.torchscript", "tagger.torchscript"})
"""Networks of ``--quick``."""


@dataclass(frozen=True)
class Case:
    """One run of ``cpdebug bisect MODEL -b BACKENDS [--test-model …] [--inputs …]``."""

    group: str
    """``healthy``, ``fp16``, ``int8``, ``again`` (the same network exported again), ``torch``, ``fault``, ``renamed``
    (a fault in a network whose every name is another one) or ``tensors`` (a fault by its values alone)."""
    network: str
    backends: str
    model: str
    """File name in the zoo's folder, or ``FILE.py:CALLABLE``."""
    test_model: str = ""
    inputs: str = ""
    fault: dict[str, Any] = field(default_factory=dict)
    """Of a fault: ``kind``, ``nodes`` and ``values`` (the faulty layer), ``right`` and ``near`` causes."""

    @property
    def key(self) -> str:
        """What ``--only`` selects by and the log knows the case by."""
        own = self.model if self.model != f"{self.network}.onnx" else ""
        other = self.fault.get("kind", self.test_model)
        parts = (self.group, self.network, own.rpartition("/")[2].replace(":", "."), other, self.backends)
        return ":".join(part for part in parts if part)

    @property
    def half(self) -> str:
        """``tuning`` or ``held-out``."""
        return half(self.network)

    def command(self, folder: Path, tensors: Path | None = None) -> list[str]:
        """The arguments of ``cpdebug``; ``tensors`` is where the values of ``test_model`` lie, for ``tensors``."""
        model = self.model if ":" in self.model else str(folder / self.model)
        found = ["bisect", model, "-b", self.backends]
        if self.group == "tensors":
            found += ["--test-tensors", str(tensors)]
        elif self.test_model:
            found += ["--test-model", str(folder / self.test_model)]
        if self.inputs:
            found += ["--inputs", str(folder / self.inputs)]
        return found

    def to_dict(self) -> dict[str, Any]:
        """The fields that the log keeps."""
        return {"key": self.key, "half": self.half, **asdict(self)}


def all_cases(folder: Path) -> Iterator[Case]:
    """Every question about the networks, variants and faults that lie in the folder, by network."""
    import json

    names = sorted(path.name.removesuffix(".onnx") for path in folder.glob("*.onnx"))
    variants = json.loads((folder / "variants.json").read_text()) if (folder / "variants.json").exists() else {}
    faults = json.loads((folder / "faults.json").read_text()) if (folder / "faults.json").exists() else []
    spoilt = {file for fault in faults for file in (fault["file"], renamed_file(fault["file"]))}
    own = [n for n in names if n not in variants and f"{n}.onnx" not in spoilt]
    for name in own:
        for backends in HEALTHY[: 2 if name in SLOW else None]:
            yield Case("healthy", name, backends, f"{name}.onnx", inputs=f"{name}.npz")
    for name, about in variants.items():
        yield from _of_variant(name, about)
    for name in own:
        other = name.replace(".torchscript", ".dynamo").replace(".opset13", ".dynamo")
        if other != name and other in own:
            yield Case("again", name, "ort,ort-none", f"{name}.onnx", f"{other}.onnx", f"{name}.npz")
    for kind in sorted({base(n) for n in own if "." in n}):
        yield Case("torch", f"{kind}.torch", "torch,ort", f"{source_file(kind)}:{kind}")
    for fault in faults:
        for backends in ("ort,ort-none", "ort,ort-all"):
            about = {k: fault[k] for k in ("kind", "nodes", "values", "right", "near", "what", "size")}
            parent = fault["network"]
            yield Case("fault", parent, backends, f"{parent}.onnx", fault["file"], f"{parent}.npz", about)
        yield Case("tensors", parent, "ort", f"{parent}.onnx", fault["file"], f"{parent}.npz", about)
        other = renamed_file(fault["file"])
        if (folder / other).exists():
            yield Case("renamed", parent, "ort,ort-none", f"{parent}.onnx", other, f"{parent}.npz", about)


def _of_variant(name: str, about: dict[str, str]) -> Iterator[Case]:
    parent, file = about["parent"], f"{name}.onnx"
    inputs = f"{about.get('inputs', parent)}.npz"
    parents = f"{parent}.npz"
    if about["group"] == "fp16":
        for backends in ("ort-none,ort-all", "ort,emu-fp16"):
            yield Case("fp16", parent, backends, file, inputs=inputs)
        if inputs == parents:
            yield Case("fp16", parent, "ort,ort-none", f"{parent}.onnx", file, parents)
    elif about["group"] == "int8":
        for backends in ("ort,ort-int8", "ort,ort-all"):
            yield Case("int8", parent, backends, f"{parent}.onnx", file, parents)
        yield Case("int8", parent, "ort-none,ort-all", file, inputs=inputs)
    else:
        yield Case("again", parent, "ort,ort-none", f"{parent}.onnx", file, parents)
