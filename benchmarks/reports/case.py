"""One rebuilt report: what it says, what is true, and the files that a tool is asked about."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx

from .networks import IMAGE, Constants, Frame, behind, network, values_of, written_otherwise

Inputs = Callable[[np.random.Generator], Mapping[str, np.ndarray]]


@dataclass(frozen=True)
class Report:
    """A case. ``kind``: ``files``, two ONNX files; ``fp16``, one file whose float values are to be FP16; ``dump``, one
    file and the values that a runtime computed."""

    name: str
    thread: str
    """``owner/repository/issues/number`` on GitHub, or ``…/pull/…``."""
    reported: str
    """What the thread is about, in our words."""
    right: str
    """Nodes of the network that is right, in ONNX's text syntax."""
    guilty: tuple[str, ...]
    """Nodes that may be accused: those that the fault is in. Empty where nobody may be."""
    cause: str
    """A regular expression that the cause has to match, as told."""
    fix: str = ""
    """The same for the fix; empty: ``cause``."""
    kind: str = "files"
    wrong: str = ""
    healthy: str = ""
    """Nodes that mean what ``right`` means; empty: ``right`` as another tool would write it."""
    frame: Frame = IMAGE
    constants: Constants = field(default_factory=dict)
    wrong_constants: Constants = field(default_factory=dict)
    opset: int = 17
    inputs: Inputs | None = None
    healthy_inputs: Inputs | None = None
    """For ``fp16``: inputs with which the same network is well."""
    broken: tuple[str, Callable[[np.ndarray], np.ndarray]] | None = None
    """For ``dump``: the value that the runtime got wrong, and how."""

    @property
    def link(self) -> str:
        """The report's address."""
        return f"https://github.com/{self.thread}"

    def write(self, folder: Path) -> None:
        """The files of the case and of its twin: ``right.onnx``, ``inputs.npz``, ``truth.json``, and by the kind
        ``wrong.onnx`` and ``healthy.onnx``, or ``wrong.npz`` and ``healthy.npz``."""
        folder.mkdir(parents=True, exist_ok=True)
        right = self._network(self.right, {})
        onnx.save(right, folder / "right.onnx")
        inputs = self._made(self.inputs)
        np.savez(folder / "inputs.npz", **inputs)
        if self.kind == "files":
            onnx.save(self._network(self.wrong or self.right, self.wrong_constants), folder / "wrong.onnx")
            twin = self._network(self.healthy, {}) if self.healthy else written_otherwise(right)
            onnx.save(twin, folder / "healthy.onnx")
        elif self.kind == "fp16":
            onnx.save(self._network(self.healthy or self.right, {}), folder / "healthy.onnx")
            np.savez(folder / "healthy.npz", **self._made(self.healthy_inputs or self.inputs))
        else:
            assert self.broken is not None
            name, change = self.broken
            values = values_of(right, inputs)
            np.savez(folder / "healthy.npz", **inputs, **values)
            bad = {name: np.asarray(change(values[name]), values[name].dtype)}
            before = [o for node in right.graph.node for o in node.output]
            kept = {o: values[o] for o in before[: before.index(name)]}
            tail = behind(right, name, bad[name].dtype)
            needed = {i for node in tail.graph.node for i in node.input}
            rest = values_of(tail, {**inputs, **bad}) if tail.graph.node else {}
            assert needed <= {name, *rest, *inputs, *(t.name for t in tail.graph.initializer)}
            np.savez(folder / "wrong.npz", **inputs, **kept, **bad, **rest)
        truth = {"link": self.link, "kind": self.kind, "guilty": self.guilty, "cause": self.cause}
        (folder / "truth.json").write_text(json.dumps({**truth, "reported": self.reported}, indent=1) + "\n")

    def _network(self, nodes: str, constants: Constants) -> onnx.ModelProto:
        return network(self.frame, nodes, {**self.constants, **constants}, self.opset)

    def _made(self, make: Inputs | None) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(1)
        if make is not None:
            return dict(make(rng))
        return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in self.frame.inputs.items()}

    @staticmethod
    def normal(shape: tuple[int, ...]) -> np.ndarray:
        """What a case with one input of ``shape``, and none of its own, is fed with."""
        return np.random.default_rng(1).standard_normal(shape).astype(np.float32)
