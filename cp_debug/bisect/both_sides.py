"""Programs that each side of a bisect runs: exported, flattened, paired, and in INT8 where a backend wants it.

Where the folder behind an exported graph stores levels, its weights are levels again: what was exported has them in
floats.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from onnx import TensorProto

from cp_debug.backends.base import Backend, Program
from cp_debug.bisect.options import Options, Rewrite, StepCounter
from cp_debug.graph.constants import Constants
from cp_debug.graph.graph import Graph
from cp_debug.graph.narrow_qdq import NarrowLayer, StoredWeight, insert_narrow_qdq
from cp_debug.graph.randomness import drawing, drawing_note
from cp_debug.programs.export_cache import own_exports
from cp_debug.programs.openvino_ir import IR, check_run_irs, ir_program
from cp_debug.programs.paired import differing_weights, pair_programs
from cp_debug.programs.pipeline import Export, changed_state, load_test_programs, prepare, wants_int8
from cp_debug.programs.unroll import Unroller
from cp_debug.programs.weight_differences import WeightDifferences
from cp_debug.quantization.models import QuantizedComponent
from cp_debug.quantization.open_quantized import calibration_samples
from cp_debug.quantization.quantized_programs import (
    already_quantized,
    load_quantized,
    quantize_programs,
    with_modules_beside,
)
from cp_debug.recipes.base import Model, Sample
from cp_debug.recipes.packed_weights import PackedWeight


@dataclass(frozen=True, eq=False)
class Side:
    """The model of one side, and its components in INT8 where a checkpoint has them."""

    model: Model
    parts: Mapping[str, QuantizedComponent] | None = None
    how: str = ""
    """Origin of ``parts``, in words."""

    @classmethod
    def load(cls, name: str, checkpoint: Path | None, options: Options) -> Side:
        """The model of one side and its checkpoint. Raises InputError as ``load_quantized``."""
        model, parts = load_quantized(name, checkpoint, options.seed, options.inputs, options.reading)
        return cls(model, parts, f"quantized as in {checkpoint}") if parts else cls(model)


@dataclass(frozen=True)
class BothSides:
    """The programs of one bisect."""

    programs: list[Program]
    """Programs of the reference before INT8: they name the values and are replayed."""
    reference: list[Program]
    """Programs that the reference's backend runs."""
    tests: list[list[Program]]
    """Programs that each test backend runs."""
    weights: dict[str, WeightDifferences]
    """Component → how the weights of the two sides differ."""
    notes: list[str]
    unfold: bool
    """Whether side values that a backend folded away are computed: test and reference are different graphs."""
    quantized_how: Mapping[tuple[Program, ...], str]
    """Programs that were quantized here → how, in words."""


class Preparation:
    """Makes the programs of both sides, each once for all backends that run the same."""

    def __init__(
        self,
        sides: tuple[Side, Side],
        test_model: Path | Model | Rewrite | None,
        export: Export,
        options: Options,
        samples: Callable[[], Iterable[Sample]],
        progress: StepCounter,
    ) -> None:
        """``sides``: the reference's and the tests'. ``samples`` begins anew at each call."""
        self._reference, self._test = sides
        self._test_model, self._export, self._options = test_model, export, options
        self._samples, self._progress = samples, progress
        self._quantized: dict[tuple[Program, ...], list[Program]] = {}
        self._how: dict[tuple[Program, ...], str] = {}

    def make(
        self,
        first: Sample,
        backends: Sequence[Backend],
        scratch: Path,
        exported: Sequence[Program] | None,
        say: Callable[[str], None],
    ) -> BothSides:
        """The programs for ``backends``, the reference's first. ``exported`` None exports the model.

        ``say`` is told how weights differ, as soon as that is known. Raises InputError.
        """
        reference, *tests = backends
        folder = self._options.save or scratch
        originals, changed = self._exported(first, folder, exported)
        if (train := self._options.test_train_mode) or self._options.test_out_of_place:
            changed = [changed_state(p, train=train, out_of_place=self._options.test_out_of_place) for p in changed]
        check_run_irs(tests, changed)
        weights = differing_weights(originals, changed)
        for component, differences in weights.items():
            say(f"weights{(len(weights) > 1) * f' of {component}'}: {differences.says}")
        unroller = Unroller(folder)
        programs = unroller.unrolled(originals, self._reference.model, self._samples, reference.precision)
        ours = self._for(reference, self._reference, programs, folder)
        theirs = [unroller.unrolled(changed, self._test.model, self._samples, b.precision) for b in tests]
        notes = unroller.notes + [drawing_note(node) for program in programs for node in drawing(program.graph)]
        notes += [note for program in originals if program.alignment for note in program.alignment.notes]
        step, maps = self._progress.step, self._options.maps
        paired = {tuple(own): pair_programs(self._reference.model, first, programs, own, maps, step) for own in theirs}
        theirs = [paired[tuple(own)] for own in theirs]
        unfold = any(t.graph is not p.graph for own in theirs for t, p in zip(own, programs, strict=True))
        theirs = [self._for(b, self._test, own, folder) for b, own in zip(tests, theirs, strict=True)]
        return BothSides(programs, ours, theirs, weights, notes, unfold, self._how)

    def _exported(
        self, sample: Sample, folder: Path, exported: Sequence[Program] | None
    ) -> tuple[list[Program], list[Program]]:
        """The reference's programs and those of the tests."""
        folder.mkdir(parents=True, exist_ok=True)
        model, test_model, how, folded = self._reference.model, self._test.model, self._export, self._options.folded
        cache = own_exports() if self._options.cache else None
        programs = list(exported or prepare(model, sample, folder, how=how, folded=folded, cache=cache))
        if isinstance(self._test_model, Path):
            if self._test_model.suffix == IR and len(programs) == 1:
                return programs, [ir_program(programs[0], self._test_model, folder)]
            changed = load_test_programs(programs, self._test_model)
            return programs, with_modules_beside(changed, model, self._test_model)
        if callable(self._test_model):
            return programs, self._test_model(programs, folder)
        if test_model.components is not model.components:
            own = folder / "test"
            own.mkdir(exist_ok=True)
            changed = prepare(test_model, sample, own, how=how, folded=folded, cache=cache)
            pairs = zip(changed, test_model.components, strict=True)
            return programs, [with_levels(program, component.packed, own) for program, component in pairs]
        return programs, programs

    def _for(self, backend: Backend, side: Side, programs: list[Program], folder: Path) -> list[Program]:
        """The programs as this backend runs them: with Q/DQ pairs for one in INT8."""
        key = tuple(programs)
        if not wants_int8(backend):
            return programs
        quantized = self._quantized.get(key) or already_quantized(programs)
        if quantized is None:
            calibration, target = self._options.calibration, folder / ("test" if self._quantized else "")
            samples = calibration_samples(side.model, calibration.data or self._options.inputs, calibration.samples)
            self._progress.steps += 1
            self._progress.step("quantizing")
            quantized, how = quantize_programs(
                side.model, programs, target, samples, parts=side.parts, calibration=calibration
            )
            self._how[tuple(quantized)] = how or side.how
        self._quantized[key] = quantized
        return quantized


def with_levels(program: Program, packed: Mapping[str, PackedWeight], folder: Path) -> Program:
    """``program`` with the weights of ``packed`` as levels behind DequantizeLinear; the numbers stay, bit for bit.

    Weights are recognized in the graph by what they hold. Those that are not there (fused with others, or read by no
    ``MatMul`` or ``Gemm``) stay in floats. The graph is written to ``folder``, and its nodes and values keep their
    names.
    """
    found = dict(_layers(program.graph, packed))
    if not found:
        return program
    path = insert_narrow_qdq(program.graph, found, folder / f"{program.name}.levels.onnx", "levels in groups")
    return program.rewritten(Graph(path, source=program.graph))


def _layers(graph: Graph, packed: Mapping[str, PackedWeight]) -> list[tuple[str, NarrowLayer]]:
    constants = Constants(graph)
    shapes = {weight.levels.shape for weight in packed.values()}
    by_contents: dict[bytes, PackedWeight] = {}
    for weight in packed.values():
        by_contents.setdefault(weight.weight().tobytes(), weight)
    layers = []
    for node in graph.nodes:
        name = node.proto.input[1] if node.op in ("MatMul", "Gemm") and len(node.proto.input) > 1 else ""
        if name not in constants:
            continue
        turned = bool(node.attribute("transB", 0))
        array = constants[name]
        if array.ndim != 2 or (array.T if turned else array).shape not in shapes or array.dtype != np.float32:
            continue
        found = by_contents.get(np.ascontiguousarray(array if turned else array.T).tobytes())
        if found is not None:
            layers.append((node.name, NarrowLayer(stored(found, turned=turned), None)))
    return layers


def stored(weight: PackedWeight, *, turned: bool) -> StoredWeight:
    """The weight as DequantizeLinear has it, [inputs, outputs] or ``turned``, in blocks of inputs.

    Groups whose inputs do not stand together are put together, each filled up to the length of the longest with levels
    that stand for 0; ``order`` says where each input went.
    """
    counts = np.bincount(weight.groups, minlength=len(weight.scale))
    block = int(counts.max())
    inputs = len(weight.groups)
    order = None
    if (weight.groups != np.arange(inputs) // block).any():
        sequence = np.argsort(weight.groups, kind="stable")
        starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
        order = np.empty(inputs, np.int64)
        order[sequence] = np.arange(inputs) - starts[weight.groups[sequence]] + weight.groups[sequence] * block
    levels, zero, scale = weight.levels, weight.zero, weight.scale
    if order is not None:
        levels = np.repeat(zero, block, axis=0).astype(np.uint8)
        levels[order] = weight.levels
    # Types of 4 bits allow no scale below 0, which some quantizers make.
    kind = TensorProto.UINT4 if weight.bits == 4 and (scale > 0).all() else TensorProto.UINT8
    parts = [np.ascontiguousarray(part.T) if turned else part for part in (levels, scale, zero)]
    return StoredWeight(kind, parts[0], parts[1], int(turned), block, parts[2], bits=weight.bits, order=order)
