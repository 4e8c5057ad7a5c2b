"""Any ONNX file: one component, fed with arrays from files or made from a seed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from cp_debug.graph.check_inputs import with_shapes
from cp_debug.graph.graph import Graph
from cp_debug.graph.made_up import MadeUp
from cp_debug.recipes.abilities import MADE_UP
from cp_debug.recipes.base import Component, Sample, Unglued
from cp_debug.recipes.input_files import DEFAULT_READING, Reading, count_samples, file_samples
from cp_debug.recipes.stages import stages_of
from cp_debug.safe_text import in_utf8


class OnnxFileModel(Unglued):
    """An ONNX file as a model. Raises InputError when the file is missing, incomplete or not ONNX."""

    def __init__(self, path: Path, reading: Reading = DEFAULT_READING) -> None:
        """``reading`` says how inputs are read from files, and which sizes free axes have."""
        self.name = str(path)
        self._inputs = (graph := Graph(path)).inputs
        self._path, self._reading = path, reading
        self._made_up: dict[str, list[str]] = {}
        with_shapes(graph.inputs, reading.shapes)  # refuses those that do not fit
        self.components: Sequence[Component] = [
            Component(
                name=in_utf8(path.stem),
                input_names=[v.name for v in graph.inputs],
                output_names=[v.name for v in graph.outputs],
                onnx_path=path,
                stages=stages_of(graph),
            )
        ]

    def samples(self, count: int, seed: int, inputs: Path | None) -> Iterator[Sample]:
        """Samples from the file or folder ``inputs`` (see ``file_samples``), checked against the graph; or random.

        Random inputs are those of ``MadeUp``, seeded with ``seed`` and the sample's number. At most ``count`` samples.
        Raises InputError for files with a wrong name, dtype or shape in them, and where no input can be made up.
        """
        if inputs is None:
            made_up = MadeUp(Graph(self._path), self._reading.shapes)
            for index in range(count):
                source = f"random, seed {seed}, sample {index}"
                sample = Sample(made_up.sample([seed, index]), source)
                self._made_up[source] = made_up.reasons()
                yield sample
            return
        yield from file_samples(inputs, self._inputs, count, self._reading)

    def sample_count(self, inputs: Path) -> int:
        """Number of samples in these files. Raises InputError for unusable files."""
        return count_samples(inputs, self._inputs)

    def remarks(self, sample: Sample) -> Sequence[str]:
        """Contents of made-up inputs and their reasons, where the sample was and there is something to say."""
        reasons = self._made_up.get(sample.source)
        return [f"{MADE_UP}{'; '.join(reasons)}"] if reasons else []
