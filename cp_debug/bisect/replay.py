"""Replay of a segment on the oracle with the test's own captured inputs.

It separates what the layer did from what it was given. For a value ``t`` of the test, ``o`` the oracle's result from
the test's inputs of that segment and ``r`` the reference:

- divergence = t − r = (t − o) + (o − r) = introduced + inherited

``expected`` is what the declared precision must introduce, by emulating it on the same inputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from cp_debug.backends.arithmetic import ARITHMETICS, FP32, FP64, overrides_of
from cp_debug.backends.base import Program
from cp_debug.backends.base import Tensor as AnyTensor
from cp_debug.backends.executor import Executor
from cp_debug.backends.kernels import KERNELS
from cp_debug.backends.narrow_options import is_narrow
from cp_debug.bisect.backward import ERRORS, kept_as
from cp_debug.bisect.file_quantization import FileQuantization
from cp_debug.bisect.narrow_variants import NarrowDepartures, spread
from cp_debug.bisect.perturbation import SIZED, between_levels, doubt
from cp_debug.bisect.quantized_segment import EmulatedSegment
from cp_debug.bisect.range_loss import RangeLoss, difference
from cp_debug.bisect.replayed import ASKED, EXCESS, Replay
from cp_debug.bisect.scale_replay import ScaleReplay, int8_activations
from cp_debug.bisect.whole_numbers import as_tensor, instead
from cp_debug.errors import InputError
from cp_debug.graph.graph import Graph, Node
from cp_debug.graph.integer_values import WHOLE, level_values
from cp_debug.graph.operators import CONTRACTIONS, PRODUCTS
from cp_debug.graph.randomness import DRAWS_NUMBERS, draws
from cp_debug.probes.arrays import as_numpy, as_torch
from cp_debug.probes.distance import all_finite, distance, ratio, zeros_differ
from cp_debug.probes.held import Trimmer
from cp_debug.probes.statistics_reduce import is_whole
from cp_debug.programs.precision import PRECISIONS, Precision, coarsest, of_operators
from cp_debug.programs.torch_span import ModuleOperators

Load = Callable[[str], AnyTensor]
"""A captured value by its name in the graph. Raises InputError where the capture lacks it."""

SUSPICIOUS = 30.0
"""A layer that amplifies the divergence of its inputs more than this is replayed for the reference, too: healthy layers
stay below 5, so what was inherited more likely was introduced by the reference."""

TRIM_AFTER = 1 << 27
"""Size of oracle results in bytes after which freed memory goes back to the system."""
MAXIMA = {"GlobalMaxPool", "MaxPool", "MaxRoiPool", "ReduceMax", "ReduceMin"}
"""Operators that keep the largest or smallest of their elements."""


class _Replayed(NamedTuple):
    """Nodes between captured values, and what they make of these."""

    nodes: list[Node]
    starts: list[str]
    given: Mapping[str, AnyTensor]
    captured: Mapping[str, AnyTensor]
    exact: Mapping[str, Tensor]
    expected: EmulatedSegment
    claimed: Precision
    claim: Precision
    """``claimed`` with what emulation does not know."""
    divergence: float
    """Relative L2 divergence of ``given``."""


class Replayer:
    """Replays the segments of one graph. ``known`` are the values that the test's capture holds."""

    def __init__(
        self,
        graph: Graph,
        precisions: tuple[str, str],
        oracle: str,
        known: Collection[str],
        device: str = "cpu",
        *,
        emulated: bool = False,
        narrow: tuple[Mapping[str, str], Mapping[str, str]] = (MappingProxyType({}), MappingProxyType({})),
        quantized: tuple[FileQuantization | None, FileQuantization | None] = (None, None),
        implementers: tuple[str, str] = ("", ""),
        moved: FileQuantization | None = None,
        suspects: Collection[str] = (),
        module: Program | None = None,
    ) -> None:
        """Prepare the oracle and the emulation of both sides' claims.

        ``precisions`` are those that the reference and the test claim to have; ``quantized`` what each of them does in
        INT8, where that is known; ``narrow`` the values (by their names in ``graph``) that each holds in ``fp16`` or
        ``bf16`` because its own program says so; ``implementers`` those of their functions; ``moved`` the quantizers of
        ``graph`` itself, which the test's optimizer may have moved in front of other values; ``suspects`` values that
        are replayed for the reference in any case; ``module`` the program whose module both sides run. ``emulated``:
        the test is the emulation of its claim, of this very graph, so that emulating its layers again would give what
        was captured.
        """
        self.graph = graph
        self.precision = PRECISIONS[precisions[1]]
        self.oracle = Executor(graph, ARITHMETICS[oracle], device)
        self._oracle_roundoff = PRECISIONS[oracle].roundoff
        # A constant is computed anew: a backend may show it, torch does not.
        self.known = {v for v in known if v not in graph.producer or graph.producer[v].op != "Constant"}
        self._device = device
        self._narrow = narrow
        self._claims = precisions
        self._implementers, self._moved, self._suspects = implementers, moved, frozenset(suspects)
        first = self._emulator(0, oracle)
        alike = precisions[0] == precisions[1] and narrow[0] == narrow[1]
        self._alike = alike and implementers[0] == implementers[1]
        self._emulators = first, first if alike else self._emulator(1, oracle)
        self.quantized = quantized
        self._scales = tuple(
            None if of_side is None else ScaleReplay(of_side, self.oracle, emulator, self.known, by)
            for of_side, emulator, by in zip(quantized, self._emulators, implementers, strict=True)
        )
        self._emulated = emulated
        self._module = module
        self._operators: ModuleOperators | None = None
        self._own: dict[str, Tensor] = {}
        """Results of the last replay that the module's own operators gave."""
        self._finer: Executor | None = None
        self._trimmer = Trimmer(TRIM_AFTER)
        self.errors: dict[str, Tensor] = {}
        """Introduced errors of the last replay, on its device, as far as ``ERRORS`` reaches."""
        self._room = 0
        self._outputs = {v.name for v in graph.outputs}
        self.levels = level_values(graph)
        self.range_loss = RangeLoss(graph, self.oracle, self.known)
        narrow_claim = is_narrow(precisions[1]) and not emulated and quantized[1] is None
        self._departures = NarrowDepartures(graph, precisions[1], device) if narrow_claim else None

    def free_memory(self) -> None:
        """Free the weights that were converted for the oracle and the emulation."""
        for executor in filter(None, (self.oracle, *self._emulators, self._finer, self.follower)):
            executor.free_memory()

    @cached_property
    def follower(self) -> Executor:
        """The executor whose derivatives errors are carried by: FP32, which has digits enough for a share."""
        return Executor(self.graph, FP32, self._device) if self.oracle.arithmetic is FP64 else self.oracle

    def _emulator(self, side: int, oracle: str) -> Executor:
        """The executor that computes as the reference (0) or the test (1) claims to."""
        arithmetic = ARITHMETICS[self._claims[side]]
        overrides = overrides_of(self.graph, self._narrow[side], arithmetic)
        if arithmetic.name == oracle and not overrides:
            return self.oracle
        return Executor(self.graph, arithmetic, self._device, overrides=overrides)

    def claim(self, side: int, nodes: Iterable[Node]) -> Precision:
        """The precision that the reference (0) or the test (1) claims for a segment.

        It is the backend's, or the coarser one in which its program holds a result of these nodes.
        """
        nodes = list(nodes)
        declared = (self._narrow[side].get(name) for node in nodes for name in node.outputs)
        return coarsest(of_operators(self._claims[side], (n.op for n in nodes)), *filter(None, declared))

    def layers(
        self, reference: Load, test: Load, divergences: Mapping[str, float] = MappingProxyType({})
    ) -> Iterator[tuple[str, Replay]]:
        """Every captured value in execution order, with its replay.

        ``divergences``: relative L2 norms of test − reference over the finite elements, where they are known already.
        """
        self.errors.clear()
        self._own.clear()
        self._operators = None
        self._room = ERRORS
        for node in self.graph.nodes:
            targets = [o for o in node.outputs if o in self.known]
            if not targets:
                continue
            try:
                yield from self._segment(targets, reference, test, divergences).items()
            except InputError as error:
                nodes, starts = self.graph.segment(targets, self.known)
                other = any(np.shape(reference(name)) != np.shape(test(name)) for name in starts)
                why = "the shape of what is read is another one in the test" if other else str(error)
                yield from ((t, Replay(tuple(n.name for n in nodes), skipped=why)) for t in targets)

    def starts(self, value: str) -> list[str]:
        """The captured values that a value is computed from; none for an input of the graph."""
        return self.graph.segment([value], self.known)[1] if value in self.graph.producer else []

    def exact(self, target: str, load: Load) -> Tensor:
        """The oracle's result of one value from the captured ones that ``load`` gives, in the oracle's dtype.

        Raises InputError where the oracle cannot compute it.
        """
        nodes, starts = self.graph.segment([target], self.known)
        return as_tensor(self.oracle.run_nodes(nodes, {s: load(s) for s in starts}, [target])[target])

    def introduced(self, target: str, test: Load) -> tuple[Tensor, Tensor]:
        """(Introduced error, oracle's result) of one value, in the value's shape and the oracle's dtype.

        The error of whole numbers and booleans is in FP64.

        Raises InputError where ``layers`` would skip it.
        """
        exact = self.exact(target, test) if target not in self._own else self._own[target]
        held = self._hold(test(target))
        if not any(t.is_floating_point() or t.is_complex() for t in (held, exact)):
            return (held.long() - exact.long()).double(), exact
        if not all(t.is_floating_point() or t.is_complex() for t in (held, exact)):
            return held.double() - exact.double(), exact
        return held - exact, exact

    def given(self, value: str, exact: AnyTensor, reference: Load, test: Load) -> Replay:
        """The replay of a graph input, whose exact value the caller knows: glue copies and is not rounded.

        ``exact`` has the shape and dtype that the graph declares for the input.
        """
        exact_tensor = self._hold(exact)
        replay = Replay.of(
            test(value), exact_tensor, [exact_tensor], coarsest(self._claims[1], self._narrow[1].get(value))
        )
        self._trace_back(replay, exact_tensor, reference(value), 0.0)
        return replay

    def _segment(
        self, targets: list[str], reference: Load, test: Load, divergences: Mapping[str, float]
    ) -> dict[str, Replay]:
        nodes, starts = self.graph.segment(targets, self.known)
        if random_nodes := [n for n in nodes if draws(n, self.graph)]:
            return {
                t: Replay(skipped=f"{random_nodes[0].name} ({random_nodes[0].op}) {DRAWS_NUMBERS}") for t in targets
            }
        given = {s: test(s) for s in starts}
        captured = {t: test(t) for t in targets}
        if self._emulated and self._exact(nodes):
            exact = {t: as_tensor(self.oracle.arithmetic.hold(v, self._device)) for t, v in captured.items()}
        else:
            exact = {t: as_tensor(v) for t, v in self.oracle.run_nodes(nodes, given, targets).items()}
        captured |= {t: exact[t] for t in targets if self._as_good(t, captured[t], exact[t], test)}
        claimed = self.claim(1, nodes)
        expected, claim = (
            (EmulatedSegment(captured), claimed) if self._emulated else self._expect(1, nodes, given, exact)
        )
        known_divergence = divergences.get(starts[0]) if len(starts) == 1 else None
        divergence = self._divergence(given, reference) if known_divergence is None else known_divergence
        segment = _Replayed(nodes, starts, given, captured, exact, expected, claimed, claim, divergence)
        results = {}
        for target in targets:
            replay = self._replayed(segment, target, reference, test)
            if (own := self._by_module(replay, target, exact[target], claim, test)) is not None:
                self._own[target] = own
                rounded = EmulatedSegment({target: self._emulators[1].arithmetic.round(own)})
                segment_of_module = segment._replace(exact={target: own}, expected=rounded)
                replay = self._replayed(segment_of_module, target, reference, test)
            results[target] = replay
            self._trimmer.freed(exact[target].nbytes)
        return results

    def _by_module(self, replay: Replay, target: str, exact: Tensor, claim: Precision, load: Load) -> Tensor | None:
        """What the module's own operators make of captured values, where there is doubt and it is not ``exact``: the
        graph decomposes an operator of torch, and another decomposition need not be wrong where that one is."""
        doubtful = replay.new_nonfinite or max(replay.excess or 0.0, replay.reference_excess) > EXCESS
        if self._module is None or not (doubtful or not all_finite(exact)):
            return None
        decided = self.decided(target, exact, claim, load)
        return None if decided is None else decided[0]

    def decided(
        self, target: str, exact: Tensor, claim: Precision, load: Load
    ) -> tuple[Tensor, list[Node], list[str]] | None:
        """What the module's own operators make of captured values, in FP64 and the shape of ``target``, and the nodes
        of the graph that decompose these with the values that they read; None where the graph's ``exact`` is the same
        to rounding, or no module is replayed."""
        own = self.module_result(target, load)
        if own is None or difference(exact, own.to(exact.dtype)) <= EXCESS * claim.roundoff:
            return None
        assert self._operators is not None
        return own, *self.graph.segment([target], self._operators.starts(target, self.known))

    def module_result(self, target: str, load: Load) -> Tensor | None:
        """What the module's own operators make of the captured values that ``load`` gives: ``target`` in FP64, on the
        oracle's device.

        None where no module is replayed, or it has no such value.
        """
        operators = self.module_operators(load)
        result = None if operators is None else operators.result(target, self.known, load)
        return None if result is None else result.to(self._device)

    def module_operators(self, load: Load) -> ModuleOperators | None:
        """The operators of the module that both sides run; None where they do not, or it fails."""
        if self._operators is None and self._module is not None:
            inputs = {info.name: as_torch(as_numpy(load(info.name))) for info in self.graph.inputs}
            inputs = {n: t.float() if t.dtype in (torch.float16, torch.bfloat16) else t for n, t in inputs.items()}
            try:
                self._operators = ModuleOperators(self._module, inputs)
            except InputError:
                self._module = None
        return self._operators

    def _replayed(self, segment: _Replayed, target: str, reference: Load, test: Load) -> Replay:
        """The replay of one result of a segment."""
        nodes, starts, given, captured, exact, expected, claimed, claim, divergence = segment
        sides = captured[target], exact[target]
        error = self._place_of_error(*sides)
        replay = self._asked(1, nodes, given, target, *sides, expected, claim, reference, error)
        if error is not None and replay.introduced == 0:  # what is copied, cut off or put together: one zero says it
            self._room += error.nbytes
            error = error.new_zeros(()).expand(error.shape)
        if error is not None:
            self.errors[target] = error
        if replay.new_nonfinite:
            replay.new_nonfinite -= _undecided(nodes, captured[target], exact[target], expected.results[target])
        finite = all_finite(exact[target])
        if not finite:
            replay.numbers = _numbers(nodes, captured[target], exact[target], expected.results[target])
            replay.new_nonfinite += replay.numbers
        if replay.new_nonfinite or (replay.excess or 0.0) > EXCESS:
            replay = self._in_range(replay, target, captured[target], exact[target], expected, claim, reference)
        if (scales := self._scales[1]) is not None and scales.quantized.touches(nodes):
            replay.clipped, replay.step = expected.clipped, expected.step
            tensors = captured[target], exact[target], expected.results[target]
            scales.compare(replay, nodes, target, given, *tensors, reference)
        replay.nodes, replay.precision = tuple(n.name for n in nodes), claimed.name
        if self._departures is not None:
            replay.computed_in = self._departures.find(
                nodes, given, target, captured[target], expected.results[target], exact[target]
            )
            if replay.new_nonfinite and spread(given, captured[target], expected.results[target]):
                replay.new_nonfinite = 0
        replay.unread = target not in self.graph.consumers and target not in self._outputs
        replay.not_emulated = tuple(n.name for n in nodes if not self._emulators[1].emulates(n))
        replay.instead = instead(captured[target], exact[target], expected.results[target])
        if replay.instead:  # levels may be computed by x ÷ scale in FP32, or by x × (1 ÷ scale)
            plain = PRECISIONS["fp32"].roundoff
            settled = between_levels(self.oracle, nodes, given, target, *sides, plain)
            right = exact[target] if settled is None else settled.to(exact[target].dtype)
            replay.instead = instead(captured[target], right, expected.results[target])
        replay.oracle_error = self._oracle_roundoff * math.sqrt(max(self._reduction(n) for n in nodes))
        replay.range_loss = self.range_loss(nodes, given, target, sides, lambda n: self.claim(1, [n]), reference)
        self._trace_back(replay, exact[target], reference(target), divergence)
        rounding = self.claim(0, nodes).roundoff * math.sqrt(max(self._reduction(n) for n in nodes))
        if self._alike and (replay.excess or 0.0) <= EXCESS:  # what a faithful test rounds, the reference rounds, too
            rounding = max(rounding, replay.introduced or 0.0)
        if not finite:
            replay.nonfinite_in = self._nonfinite_in(nodes, given, exact[target], reference(target))
        amplified = replay.inherited is not None and replay.inherited > SUSPICIOUS * divergence + 2 * rounding
        if amplified or replay.nonfinite_in or target in self._suspects:
            replay.reference_excess = self.reference_excess(nodes, starts, target, reference)
        return replay

    def _place_of_error(self, captured: AnyTensor, exact: Tensor) -> Tensor | None:
        """Where the introduced error goes, in its shape, while there is room."""
        if not exact.is_floating_point() or exact.nbytes > self._room or captured.shape != exact.shape:
            return None  # whole numbers are subtracted exactly, when they are asked for
        place = torch.empty_like(exact, dtype=kept_as(exact), memory_format=torch.contiguous_format)
        self._room -= place.nbytes
        return place

    def _exact(self, nodes: list[Node]) -> bool:
        """Whether the emulation of the claim computes ``nodes`` just as the oracle does, by the same code."""
        oracle, claim = self.oracle.arithmetic, self._emulators[1].arithmetic
        if self._narrow[1]:
            return False

        def alike(node: Node) -> bool:
            kernel = KERNELS.get(node.op)
            if kernel is None or kernel.multiplies:
                return False
            # What only chooses among values of the same run, which are rounded already, rounds nothing.
            makers = (self.graph.producer.get(name) for name in node.inputs)
            chooses = not kernel.rounds and all(maker and maker.op != "Constant" for maker in makers)
            return claim.value is None or chooses

        return oracle.dtype == claim.dtype and oracle.value is None and all(map(alike, nodes))

    def _expect(
        self, side: int, nodes: list[Node], given: Mapping[str, AnyTensor], exact: Mapping[str, Tensor]
    ) -> tuple[EmulatedSegment, Precision]:
        """Results that the reference (0) or the test (1) must make of ``given`` in place of ``exact``.

        Also returns the precision that allows for what emulation does not know.
        """
        emulator, quantized = self._emulators[side], self.quantized[side]
        if quantized is not None and quantized.touches(nodes):
            return quantized.ideal(emulator, nodes, given, exact), quantized.beside
        precision = self.claim(side, nodes)
        precision = quantized.beside if quantized is not None and precision.name == "int8" else precision
        if rounded := int8_activations(nodes, given):
            return EmulatedSegment(emulator.run_nodes(nodes, {**given, **rounded}, exact)), precision
        return EmulatedSegment(exact if emulator is self.oracle else emulator.run_nodes(nodes, given, exact)), precision

    def _asked(
        self,
        side: int,
        nodes: list[Node],
        given: Mapping[str, AnyTensor],
        target: str,
        captured: AnyTensor,
        exact: Tensor,
        expected: EmulatedSegment,
        claim: Precision,
        reference: Load,
        error: Tensor | None = None,
    ) -> Replay:
        """The replay of one value of the reference (0) or the test (1); ``error`` is filled with what it introduced.

        Where emulating one correct implementation has raised a doubt, others are asked.
        """
        scales, result = self._scales[side], expected.results[target]
        unrounded = is_whole(exact) and target not in self.levels and self._rounds_nothing(nodes, given, claim)
        replay = Replay.of(captured, exact, [result], claim, unrounded=unrounded, error=error)
        if (replay.excess or 0.0) <= ASKED:
            return replay
        others: list[AnyTensor] = [] if scales is None else [*scales.for_readers(target, captured, result)]
        if scales is None and side == 1 and self._moved is not None:
            others = [g.quantized(as_tensor(result)) for _, g in self._moved.for_readers(target, captured)]
        if scales is not None and scales.quantized.touches(nodes):
            others += [
                *scales.larger(nodes, given, target, exact),
                *scales.as_calibrated(nodes, given, reference, target),
            ]
        if others:  # the function itself may be coarser than the levels
            off = partial(doubt, self.oracle, nodes, given, target, self._implementers[side], None)
            return Replay.of(captured, exact, [result, *others], claim, off, unrounded=unrounded)
        oracle = self._oracle_of(claim)
        if oracle is not self.oracle:
            exact = as_tensor(oracle.run_nodes(nodes, given, [target])[target])
        if (settled := between_levels(oracle, nodes, given, target, captured, exact, claim.roundoff)) is not None:
            replay = Replay.of(captured, settled, [settled], claim, unrounded=unrounded)
            # Where all that differs are neighbours as near, it is doubtful which is meant: it is told as what it costs.
            if not any(node.op in SIZED for node in nodes) or (replay.excess or 0.0) > EXCESS:
                return replay
        arithmetic = None if scales is not None else ARITHMETICS[claim.name]
        allowed = partial(doubt, oracle, nodes, given, target, self._implementers[side], arithmetic)
        return Replay.of(captured, exact, [expected.results[target]], claim, allowed, unrounded=unrounded)

    def _rounds_nothing(self, nodes: Iterable[Node], given: Mapping[str, AnyTensor], claim: Precision) -> bool:
        """Whether the integers that a segment gives hang on nothing rounded but what it was given.

        Below FP32 an engine may read its operands as they were before they were rounded to what it shows.
        """
        if claim.roundoff <= PRECISIONS["fp32"].roundoff:
            return True
        made = [self.graph.types.get(name) for node in nodes for name in node.outputs]
        only_integers = all(kind is not None and kind.tensor_type.elem_type in WHOLE for kind in made)
        return only_integers and all(map(is_whole, given.values()))

    def _oracle_of(self, claim: Precision) -> Executor:
        """The oracle, or one in FP64 where it is no finer than what is judged."""
        if self._oracle_roundoff < claim.roundoff or self.oracle.arithmetic is FP64:
            return self.oracle
        if self._finer is None:
            self._finer = Executor(self.graph, FP64, self._device)
        return self._finer

    def _trace_back(self, replay: Replay, exact: Tensor, captured: AnyTensor, divergence: float) -> None:
        if tuple(captured.shape) != tuple(exact.shape):
            return
        inherited, scale, _ = distance(exact, captured)
        replay.inherited = ratio(inherited, scale)
        if divergence:
            replay.amplification = replay.inherited / divergence

    def reference_excess(self, nodes: list[Node], starts: list[str], target: str, reference: Load) -> float:
        """Excess of the reference's ``target``, given its own inputs; infinite for NaN and Inf of its own."""
        given = {s: reference(s) for s in starts}
        exact = as_tensor(self.oracle.run_nodes(nodes, given, [target])[target])
        expected, claim = self._expect(0, nodes, given, {target: exact})
        if target in self._suspects:  # other implementations were asked by the alignment
            replay = Replay.of(reference(target), exact, [expected.results[target]], claim)
        else:
            replay = self._asked(0, nodes, given, target, reference(target), exact, expected, claim, reference)
        if (own := self._by_module(replay, target, exact, claim, reference)) is not None:
            exact = own
            replay = Replay.of(reference(target), own, [self._emulators[0].arithmetic.round(own)], claim)
        if replay.introduced is not None:
            got = as_tensor(reference(target)).to(exact.device)
            if distance(exact, got).new_nonfinite or (target in self._suspects and zeros_differ(exact, got)):
                return math.inf
        return replay.excess or 0.0

    def _nonfinite_in(
        self, nodes: list[Node], given: Mapping[str, AnyTensor], exact: Tensor, reference: AnyTensor
    ) -> str:
        """The node that makes the NaN or Inf in ``exact`` of finite inputs, where the reference has neither."""
        if tuple(reference.shape) != tuple(exact.shape):
            return ""
        if not distance(exact, reference).new_nonfinite:
            return ""
        if any(not all_finite(as_tensor(t)) for t in given.values()):
            return ""
        results = [name for node in nodes for name in node.outputs]
        values = self.oracle.run_nodes(nodes, given, results)
        strange = {name for name, value in values.items() if not all_finite(as_tensor(value))}
        first = next((node for node in nodes if not strange.isdisjoint(node.outputs)), None)
        return "" if first is None else f"{first.name} ({first.op})"

    def _in_range(
        self,
        replay: Replay,
        target: str,
        captured: AnyTensor,
        exact: Tensor,
        expected: EmulatedSegment,
        claim: Precision,
        reference: Load,
    ) -> Replay:
        """The replay without the elements that the claimed type cannot hold, where nothing that reads them notices."""
        if tuple(captured.shape) != tuple(exact.shape) or not exact.is_floating_point():
            return replay
        beyond = self.range_loss.beyond(target, self._hold(captured), exact, claim, reference)
        if beyond is None:
            return replay
        in_range = [torch.where(beyond, 0.0, self._hold(t)) for t in (captured, exact, expected.results[target])]
        replay = Replay.of(in_range[0], in_range[1], [in_range[2]], claim)
        replay.wanted = int(beyond.sum())
        return replay

    def _as_good(self, target: str, captured: AnyTensor, exact: Tensor, test: Load) -> bool:
        """Whether whole numbers differ and make no difference: [0, −1] is as good as [1, 189] to a Reshape."""
        if not instead(captured, exact, exact):
            return False
        captured_tensor = self._hold(captured).to(exact.dtype)
        return not self.range_loss.matters(test, (target, exact, captured_tensor), 0.0)

    def _divergence(self, given: Mapping[str, AnyTensor], reference: Load) -> float:
        """Relative L2 divergence of a segment's inputs, all of them taken as one vector."""
        differing, reference_norm = 0.0, 0.0
        for name, ours in given.items():
            theirs = reference(name)
            if tuple(ours.shape) != tuple(theirs.shape):
                return math.inf
            norms = distance(ours, theirs)
            differing, reference_norm = math.hypot(differing, norms.difference), math.hypot(reference_norm, norms.whole)
        return ratio(differing, reference_norm)

    def _reduction(self, node: Node) -> int:
        """Number of products that one element of the result sums, by the weight's shape; 1 where nothing is summed."""
        weights = [i for i in node.inputs if i in self.graph.initializers]
        if node.op not in PRODUCTS or not weights:
            return 1
        shape = tuple(self.graph.weight(weights[0]).dims)
        return max(shape) if node.op in ("Gemm", "MatMul") else math.prod(shape[1:])

    def _hold(self, tensor: AnyTensor) -> Tensor:
        return as_tensor(FP64.hold(tensor, self._device))


def _numbers(nodes: Sequence[Node], captured: AnyTensor, exact: Tensor, expected: AnyTensor) -> int:
    """The number of elements that are finite where Inf is right, or anything else where NaN is, and where the declared
    arithmetic makes that, too.

    Runtimes begin a maximum with the lowest number, which is all that −Inf and NaN leave of it: that is no fault. Nor
    is a sum of products in which Inf meets no zero, as padding and sparse weights are left out.
    """
    if any(node.op in MAXIMA for node in nodes):
        return 0
    ours, emulated = (as_tensor(side).to(exact.device) for side in (captured, expected))
    if ours.shape != exact.shape:
        return 0
    lost = torch.isfinite(ours) & torch.isinf(exact) & torch.isinf(emulated)
    if not any(node.op in CONTRACTIONS for node in nodes):
        lost |= ~torch.isnan(ours) & torch.isnan(exact) & torch.isnan(emulated)
    return int(lost.sum())


def _undecided(nodes: Sequence[Node], captured: AnyTensor, exact: Tensor, expected: AnyTensor) -> int:
    """The number of elements that are NaN where the exact result is Inf, and that nobody is guilty of: the declared
    arithmetic makes NaN of them, too, or they are sums of products of Inf, whose order decides."""
    ours, emulated = (as_tensor(side).to(exact.device) for side in (captured, expected))
    if ours.shape != exact.shape or not ours.is_floating_point():
        return 0
    of_inf = torch.isnan(ours) & torch.isinf(exact)
    sums = any(node.op in CONTRACTIONS for node in nodes)
    return int((of_inf if sums else of_inf & torch.isnan(emulated)).sum())
