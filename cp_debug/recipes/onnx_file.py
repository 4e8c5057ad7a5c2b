"""Any ONNX file: one component, fed with arrays from ``.npz`` files or made from a seed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from cp_debug.graph.graph import Graph
from cp_debug.graph.made_up import MadeUp
from cp_debug.recipes.base import Arrays, Component, Sample
from cp_debug.recipes.npz import npz_samples
from cp_debug.recipes.stages import stages_of


class OnnxFileModel:
    """An ONNX file as a model. Raises InputError when the file is missing, incomplete or not ONNX."""

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        self._inputs = (graph := Graph(path)).inputs
        self._path = path
        self.components: Sequence[Component] = [
            Component(
                name=path.stem,
                input_names=[v.name for v in graph.inputs],
                output_names=[v.name for v in graph.outputs],
                onnx_path=path,
                stages=stages_of(graph),
            )
        ]

    def samples(self, count: int, seed: int, inputs: Path | None) -> Iterator[Sample]:
        """One sample a ``.npz`` file (``inputs`` is one, or a folder of them), checked against the graph; or random.

        Random inputs are those of ``MadeUp``, seeded with ``seed`` and the sample's number. At most ``count`` samples.
        Raises InputError for files with a wrong name, dtype or shape in them, and where no input can be made up.
        """
        if inputs is None:
            made_up = MadeUp(Graph(self._path))
            for index in range(count):
                yield Sample(made_up.sample([seed, index]), f"random, seed {seed}, sample {index}")
            return
        yield from npz_samples(inputs, self._inputs, count)

    def feed(self, component: Component, sample: Sample, results: Mapping[str, Arrays]) -> dict[str, np.ndarray]:
        """The sample's arrays by input name, unchanged."""
        return sample.arrays

    def decode(self, sample: Sample, results: Mapping[str, Arrays]) -> None:
        """Nothing: an ONNX file has no decoder."""
        return None
