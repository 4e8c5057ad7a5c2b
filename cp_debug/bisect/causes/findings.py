"""The findings of one run: every guilty layer explained, layers with one cause put together, and what holds for all."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from statistics import fmean
from typing import Any

from cp_debug.backends.narrow_options import NarrowOptions
from cp_debug.bisect.acquittals import BASIS, MASKS
from cp_debug.bisect.candidate_run import CandidateRun, loader
from cp_debug.bisect.causes import declared
from cp_debug.bisect.causes.base import CAUSES, Candidate, Cause
from cp_debug.bisect.causes.batchnorm import in_words as pairs_in_words
from cp_debug.bisect.causes.effects import Effects
from cp_debug.bisect.causes.graphs import GraphReader
from cp_debug.bisect.causes.narrow import departure
from cp_debug.bisect.causes.narrow_costs import costs
from cp_debug.bisect.causes.precision import PROMOTED
from cp_debug.bisect.causes.quantized import outliers
from cp_debug.bisect.causes.ranges import BEYOND_FP16
from cp_debug.bisect.causes.search import ENOUGH, Explanation, accepted, explain
from cp_debug.bisect.causes.segment import Segment, SegmentContext
from cp_debug.bisect.causes.where import counted, in_words, locate, orders
from cp_debug.bisect.finding import UNKNOWN, Finding, Where
from cp_debug.bisect.kept import KeepTrials, gave
from cp_debug.bisect.observe import Observation
from cp_debug.bisect.options import has_knobs
from cp_debug.bisect.remainder import Flip
from cp_debug.bisect.result import GUILTY, SHAPE, LayerRow
from cp_debug.errors import InputError, in_one_line
from cp_debug.graph.exporter_notes import source_line
from cp_debug.graph.graph import downstream
from cp_debug.graph.operators import MOVING, PRODUCTS, VIEWS
from cp_debug.graph.randomness import drawing
from cp_debug.probes.arrays import Tensor
from cp_debug.probes.held import CapturedRun
from cp_debug.programs.pipeline import Key
from cp_debug.quantization.onnx_ptq import names_of_layers
from cp_debug.safe_text import amount, flags, some

LISTED = 32
"""Nodes to leave unquantized in a line that is to be followed."""
MOST = 64
"""Guilty layers that are explained, the most excessive first."""
IN_VAIN = 4
"""Layers in a row without a cause, the most excessive first, after which the others are asked for quick ones."""
LOCATED = 8
"""Layers of a finding for which it says where in them the error sits."""
NAMED = 8
"""Layers that a fix names."""
EQUALS = 3
"""Causes that explain a layer as well as the named one, which are told with it."""
_VIEWS = VIEWS | {"Cast", "Expand"}
"""Operators whose result is their input in another shape."""
_NUMBER = re.compile(r"\[[^]]*]|(?<![\w/.-])-?\d+(?:\.\d+)?(?:e[+-]?\d+)?(?![\w/])")
"""A number in a sentence, and none of a name such as ``conv_2`` or ``FP16``; or a list."""
NOTICEABLE = 1.3
"""Excess below which a layer of an unknown kernel is not asked whether a cause holds there, too."""
UNSTEADY = 10.0
"""A layer that differs from run to run by this many times its rounding does not merely sum in another order."""


@dataclass
class Explained:
    """One layer and what explains it."""

    row: LayerRow
    explanation: Explanation
    where: Where


@dataclass
class Explainer:
    """Explains the rows of one test backend on one sample."""

    run: CandidateRun
    reference_precision: str
    reference: CapturedRun
    test: CapturedRun
    exact_input: Callable[[Key], Tensor]
    """Function that gives the value that glue should have made for an input of a component."""
    effects: Effects
    settled: Mapping[Key, Finding] = field(default_factory=dict)
    """Guilty rows whose cause is known before anything is tried: other control flow, a wrong export."""
    flips: Sequence[Flip] = ()
    notes: list[str] = field(default_factory=list)
    """Layers that could not be explained and why not, one sentence each: explaining never ends a run."""
    adds_up: bool = True
    """Whether rounding may be named as the cause where no layer is guilty: see ``Remainder``."""
    goes_inside: Callable[[str], bool] = lambda component: False
    """Whether the guilty regions of a component are looked into afterwards, with hypotheses of their own."""
    _contexts: dict[tuple[str, str, str], SegmentContext] = field(default_factory=dict)
    _rows: Mapping[Key, LayerRow] = field(default_factory=dict)
    _layers_of: dict[str, set[str]] = field(default_factory=dict)
    """Cause → the guilty layers that it explains."""

    @cached_property
    def _graphs(self) -> GraphReader:
        return GraphReader(self.run, self.test)

    @cached_property
    def _trials(self) -> KeepTrials | None:
        effects = self.effects
        return KeepTrials.of(self.run, effects.sample, effects.results[effects.model.components[-1].name])

    @property
    def _of_kept(self) -> KeepTrials | None:
        """Trials of nodes that are kept in FP32."""
        return None if self._trials is None or self._trials.quantized else self._trials

    @property
    def _of_unquantized(self) -> KeepTrials | None:
        """Trials of layers that are left unquantized."""
        return self._trials if self._trials is not None and self._trials.quantized else None

    @cached_property
    def _draws(self) -> bool:
        """Whether the network draws random numbers: runs differ then, and probed runs from others, without a defect."""
        return any(drawing(program.graph) for program in self.run.programs.values())

    def findings(self, rows: Mapping[Key, LayerRow], observation: Observation | None) -> list[Finding]:
        """The findings, those with the largest effect first. What fails on the way is in ``notes``."""
        self._rows = rows
        unsteady = [] if self._draws else list(self._unsteady(rows))
        restless = {name for finding in unsteady for name in finding.layers}
        guilty = [
            (key, row)
            for key, row in rows.items()
            if row.verdict == GUILTY and row.name not in restless and key not in self.settled
        ]
        guilty += [(key, row) for key, row in rows.items() if row.verdict == SHAPE and row.op == "input"]
        guilty.sort(key=lambda item: item[1].severity, reverse=True)
        groups: dict[tuple[str, ...], list[Explained]] = {}
        families: list[Cause] = []
        in_vain = quickly = 0
        for key, row in guilty[:MOST]:
            quick = in_vain >= IN_VAIN
            explained, family = self._explained(key, row, families, quick=quick)
            quickly += quick and explained.explanation.cause is None
            in_vain = in_vain + 1 if explained.explanation.cause is None else 0
            if family is not None and family not in families:
                families.append(family)
            best = explained.explanation.cause
            name = (UNKNOWN,) if best is None else (best.cause, _kind(best))
            groups.setdefault((row.side, *name), []).append(explained)
        if quickly:
            many = amount(quickly, "guilty layer")
            self.notes.append(f"{many}: only quick causes were tried, after {IN_VAIN} in a row that nothing explains")
        for key_of_group, group in groups.items():
            self._layers_of.setdefault(key_of_group[1], set()).update(e.row.name for e in group)
        findings = [self._finding(group) for group in groups.values()]
        findings += self._shapes(rows)
        for says in dict.fromkeys(finding.says for finding in self.settled.values()):
            alike = [finding for finding in self.settled.values() if finding.says == says]
            names, ops = [n for f in alike for n in f.layers], [op for f in alike for op in f.ops]
            findings.append(replace(alike[0], layers=names, ops=ops))
        findings += [*unsteady, *(() if self._draws else self._program(observation))]
        costly: list[Finding] = []
        try:
            costly += costs(rows, self.run.precision.name, self.run.precision.roundoff, self.segment)
        except Exception as error:
            self.notes.append(f"remedies for the declared precision's cost are not known: {in_one_line(error)}")
        differs = any(not (row.within or row.why.startswith((*MASKS, BASIS))) for row in rows.values())
        # A layer has a step where its own nodes quantize by a constant; a file may also compute its scales as it runs.
        levels = any(row.replay and row.replay.step is not None for row in rows.values())
        programs = self.run.programs
        others = (g for c, g in self.run.graphs.items() if g is not programs[c].graph)
        levels |= any("DynamicQuantize" in n.op or "Integer" in n.op for graph in others for n in graph.nodes)
        if differs or levels:
            try:
                kind = self.run.kind(next(iter(rows)).component)
                costliest = self.effects.costliest
                if levels:
                    why = lambda key, row: outliers(self.segment(key, row))  # noqa: E731
                    costly += declared.int8(rows, kind, self._left_out, self._of_unquantized, costliest, why)
                if self.adds_up and not findings and not costly and differs:
                    known = declared.flipped(self.run, rows, self.flips, self._of_kept)
                    of = self.run, rows, self.segment, self._explanation, self._of_kept, costliest
                    costly += [known] if known else declared.declared(*of)
            except Exception as error:
                self.notes.append(f"the declared precision's cost is not known: {in_one_line(error)}")
        both = (findings, costly)  # what is wrong comes first
        return [each for part in both for each in sorted(part, key=lambda f: -abs(f.effect.share or 0.0))]

    def _shapes(self, rows: Mapping[Key, LayerRow]) -> Iterator[Finding]:
        """For the first layer of another shape in each component, the difference of the two graphs that makes it."""
        wrong: dict[str, tuple[Key, LayerRow]] = {}
        for key, row in sorted(rows.items(), key=lambda item: item[1].index):
            if row.verdict == SHAPE and row.op != "input" and key not in self.settled:
                wrong.setdefault(key.component, (key, row))
        for key, row in wrong.values():
            try:
                candidate = self._graphs.of_shape(key.component, self.segment(key, row))
            except Exception as error:
                self._failed(row, error)
                continue
            if candidate is not None:
                fix, tried = self._fix(candidate, [row])
                evidence = {"why": row.why, **candidate.evidence, **tried}
                yield Finding(candidate.cause, candidate.says, [row.name], [row.op], evidence=evidence, fix=fix)

    def _explained(
        self, key: Key, row: LayerRow, families: Sequence[Cause], *, quick: bool = False
    ) -> tuple[Explained, Cause | None]:
        """The layer with its cause, and the family that proposed it; without both where anything fails on the way.

        ``families``: those that explained worse layers. ``quick``: no others are asked that are costly and go from
        node to node.
        """
        explanation, family, where = Explanation(None, 0.0, None, 0.0), None, Where(row.name)
        try:
            segment = self.segment(key, row)
            where = locate(segment, row.name)
            failed = partial(self._failed, row)
            if segment.decomposed is not None:
                ops = ", ".join(dict.fromkeys(node.op for node in segment.nodes if node.op != "Constant"))
                says = f"it is computed by other operators ({ops}), which do not give what torch's own gives here"
                candidate = Candidate("decomposition", says, segment.decomposed, fix="report it: {layers}")
                return Explained(row, accepted(segment, candidate) or explanation, where), None
            if row.replay is not None and row.replay.computed_in:
                claim = NarrowOptions.parse(row.replay.precision or self.run.precision.name)
                known = departure(segment, claim, row.replay.computed_in)
                if known is not None:
                    share = segment.explained(known.value)[0]
                    return Explained(row, Explanation(known, share, None, 0.0), where), None
            inside = row.region is not None and self.goes_inside(key.component)
            asked = [c for c in CAUSES if not (c.by_node and (inside or (quick and c.costly and c not in families)))]
            if inside:
                explanation, family = explain(segment, families, failed, asked)
            elif row.side == "test":
                explanation, family = self._graphs.explain(key.component, segment, families, failed, asked)
                told = None if explanation.cause is None else explanation.cause.evidence.get("node")
                row.source = next((source_line(n.proto) for n in segment.nodes if n.name == told), "") or row.source
            else:
                explanation, family = explain(segment, families, failed, asked)
        except Exception as error:
            self._failed(row, error)
        return Explained(row, explanation, where), family

    def _explanation(self, key: Key, row: LayerRow) -> Explanation:
        return self._explained(key, row, ())[0].explanation

    def _failed(self, row: LayerRow, error: Exception) -> None:
        note = f"{row.name}: not every cause could be tried: {in_one_line(error)}"
        if note not in self.notes:
            self.notes.append(note)

    def segment(self, key: Key, row: LayerRow) -> Segment:
        """The layer of a row, cut out on its captured inputs. Raises InputError where the oracle cannot compute it."""
        of_test = row.side == "test" or (row.side == "export" and self.run.module_side(key.component) == "test")
        capture = self.test if of_test else self.reference
        declared = (row.replay and row.replay.precision) or self.run.precision.name
        claim = declared if of_test else self.reference_precision
        program = self.run.programs[key.component]
        replayer = self.run.replayer(key.component, self.test)
        of = (key.component, row.side, claim)
        if of not in self._contexts:
            quantized = replayer.quantized[of_test]
            self._contexts[of] = SegmentContext(program, replayer.oracle, claim, quantized)
        context, load = self._contexts[of], loader(capture, key.component)
        if row.op == "input":
            segment = Segment.of_input(context, key.value, self.exact_input(key), load(key.value))
        else:
            segment = Segment.of(context, key.value, replayer.known, load)
            if (decided := replayer.decided(key.value, segment.exact, context.claim, load)) is not None:
                exact, nodes, starts = decided
                segment.decided(exact, nodes, {name: load(name) for name in starts})
        segment.tactic = row.tactic if row.side == "test" else ""
        later, views = self._later(key, capture), self._views(key)
        segment.others = [
            (
                entry.name + (" of the reference" if side is self.reference else ""),
                partial(side.load, entry.name, component=entry.component),
            )
            for side in (self.reference, self.test)
            for entry in side.entries
            if (entry.component, entry.name) != key
            and (entry.component, entry.name) not in views
            and (side is not capture or (entry.component, entry.name) not in later)
        ]
        return segment

    def _views(self, key: Key) -> set[tuple[str, str]]:
        """Values, on either side, that hold the same numbers as ``key`` in another shape, upstream and downstream."""
        graph, names = self.run.programs[key.component].graph, {key.value}
        size = 0
        while size != len(names):
            size = len(names)
            for node in graph.nodes:
                if node.op in _VIEWS and node.inputs and not names.isdisjoint({node.inputs[0], *node.outputs}):
                    names.update((node.inputs[0], *node.outputs))
        return {(key.component, name) for name in names}

    def _later(self, key: Key, capture: CapturedRun) -> set[tuple[str, str]]:
        """Values that depend on ``key`` in its component, and values that only this run has, whose place is unknown."""
        graph = self.run.programs[key.component].graph
        maker = graph.producer.get(key.value)  # its other results are as wrong as this one
        results = [key.value] if maker is None else list(maker.outputs)
        reached = {*results, *downstream(graph.nodes, results)}
        only_here = {(e.component, e.name) for e in capture.entries} - set(self.run.layers)
        return only_here | {(key.component, name) for name in reached}

    def _finding(self, group: Sequence[Explained]) -> Finding:
        worst = max(group, key=lambda e: e.row.severity)
        explanation, rows = worst.explanation, [e.row for e in group]
        cause, second = explanation.cause, explanation.runner_up
        names = [row.name for row in rows]
        named = [(e.row.name, e.explanation.cause) for e in group]
        says = _unexplained(explanation) if cause is None else _said_of_all([c.says for _, c in named if c], cause.says)
        pairs = {name: c.evidence["batchnorm_of"] for name, c in named if c and "batchnorm_of" in c.evidence}
        if len(pairs) > 1 and len(pairs) == len(group):
            says = pairs_in_words(pairs)
        equals = {other.cause: other.says for other in explanation.equals[:EQUALS]}
        located = [e.where for e in group if e.where.worst]  # none where float64 does not tell large integers apart
        is_told = cause is not None and not cause.observed and bool(located)
        if cause is not None and explanation.alike:
            says += f" ({', '.join(explanation.alike[:EQUALS])} would have the same result)"
        if cause is not None and equals:
            says += "; or, which explains it as well: " + "; or ".join(equals.values())
        if cause is not None:
            cause = replace(cause, fix=_of_all(dict.fromkeys(c.fix for _, c in named if c is not None)) or cause.fix)
        ask = "ask with --knobs which graph optimizer does it; a report: "
        asked = "" if cause or not has_knobs(self.run.pipeline.backend) else ask
        fix, tried = self._fix(cause, rows) if cause else (f"{asked}cpdebug bundle RESULT --layer {names[0]}", {})
        finding = Finding(
            cause=cause.cause if cause else UNKNOWN,
            says=says,
            layers=names,
            ops=[row.op for row in rows],
            side=worst.row.side,
            explained=fmean(e.explanation.explained for e in group) if cause and is_told else None,
            runner_up=second.cause if second else None,
            runner_up_explained=explanation.runner_up_explained if second else None,
            evidence={
                "why": worst.row.why,
                **(cause.evidence if cause else {}),
                **({"one_of": [cause.cause, *equals]} if cause and equals else {}),
                **({"pairs": pairs} if len(pairs) > 1 else {}),
                **tried,
            },
            where=located[:LOCATED],
            fix=fix,
        )
        if cause and worst.row.side == "test" and (figures := self._counted(cause.cause, worst)):
            finding.says = in_words(finding.says, figures)
            finding.evidence |= {name: value for name, value in figures.items() if value is not None}
        if cause and worst.row.tactic:
            causes = [(e.row.tactic, e.explanation.cause) for e in group]
            finding.evidence |= orders(cause.cause, [(tactic, c.evidence) for tactic, c in causes if c])
        if cause and cause.by_magnitude and (explanation.explained < ENOUGH):
            finding.evidence["magnitude_only"] = True
        if len(group) > 1 and finding.explained is not None:
            finding.evidence["explained_least"] = min(e.explanation.explained for e in group)
        try:
            finding.effect = self.effects.of(rows)
        except Exception as error:
            self.notes.append(f"{names[0]}: its effect on the outputs could not be computed: {in_one_line(error)}")
        return finding

    def _counted(self, cause: str, worst: Explained) -> dict[str, Any]:
        """In how many layers the cause holds besides the guilty ones, and what all of them do together."""

        def holds(key: Key, row: LayerRow) -> bool:
            if row.verdict == GUILTY:
                return row.name in explained
            replay = row.replay
            if replay is None or (replay.excess or 0.0) < NOTICEABLE:
                return False
            explained_layer, _ = self._explained(key, row, [])
            best = explained_layer.explanation.cause
            return best is not None and best.cause == cause

        explained = self._layers_of.get(cause, set())
        graphs = {name: program.graph for name, program in self.run.programs.items()}
        try:
            return counted(cause, self._rows, graphs, holds)
        except Exception as error:
            self._failed(worst.row, error)
            return {}

    def _fix(self, cause: Candidate, rows: Sequence[LayerRow]) -> tuple[str, dict[str, Any]]:
        """The cause's advice with the layers' names, with flags where it is about INT8; and figures of its trial."""
        if cause.cause in (*BEYOND_FP16, "nonfinite") and self._of_kept is not None:
            told = declared.kept(self._of_kept, rows)
            guilty = [row for row in self._rows.values() if row.verdict == GUILTY]
            # Where a number overflows elsewhere, keeping these layers alone helps little.
            if len(guilty) > len(rows) and told[1].get("after", math.inf) > self.run.precision.rtol:
                told = min(declared.kept(self._of_kept, guilty), told, key=lambda t: t[1].get("after", math.inf))
            if told[1] or not cause.observed:
                return told
        names = _node_names(rows) if cause.cause in PROMOTED else [row.name for row in rows]
        constant = cause.evidence.get("constant") if len(rows) == 1 else None
        fix = cause.fix.replace("the weights of {layers}", constant or f"the weights of {some(names)}")
        fix = fix.replace("{layers}", some(names))
        if "{unquantized}" not in fix:  # else no row is an input, which nothing quantizes
            return fix, {}
        calibrate = "--trt-calib-data" if self.run.implicit else "--calib-data"
        if self._came_quantized(rows):
            ours = self._in_int8(rows)
            calibrate = f"{self._quantize} --calib-data DATA" if ours else "with the tool that quantized the file"
        fix = fix.replace("{calibrate}", calibrate).replace("{unquantized}", self._unquantized(rows))
        if self._of_unquantized is None or self._came_quantized(rows):
            return fix, {}
        try:
            tried = self._of_unquantized.first({Key(row.component, row.onnx): row for row in rows}, (len(rows),))
        except InputError:
            return fix, {}
        if tried is None:
            return fix.partition(", or leave it unquantized")[0], {}
        return f"{fix}: {gave(tried)}", {"after": tried.after, "before": tried.before}

    def _came_quantized(self, rows: Sequence[LayerRow]) -> bool:
        """Whether no flag of this command reaches the Q/DQ pairs at these layers."""
        return all(self.run.came_quantized(row.component) for row in rows)

    def _in_int8(self, rows: Sequence[LayerRow]) -> bool:
        """Whether these layers are quantized to INT8, which is all that ``quantize`` writes."""
        return self.run.kind(rows[0].component) == "int8"

    @property
    def _quantize(self) -> str:
        return f"cpdebug quantize ptq {shlex.quote(self.run.pipeline.model.name)} -o FOLDER"

    def _unquantized(self, rows: Sequence[LayerRow]) -> str:
        """The flag that leaves these layers out of INT8, with the command for a file that came quantized."""
        if self._came_quantized(rows):
            if not self._in_int8(rows):
                return some([row.name for row in rows])
            graph = self.run.programs[rows[0].component].graph
            known, names = names_of_layers(graph), list[str]()  # what is no such layer is never quantized
            for row in rows:
                own = [name for name in (row.replay.nodes if row.replay is not None else (row.name,)) if name in known]
                readers = graph.consumers.get(row.onnx, ())  # whose pairs are in front of them
                names += own or [node.name for node in readers if node.name in known]
            return f"{self._quantize} {flags('--skip-layers', [known[name] for name in dict.fromkeys(names)])}".rstrip()
        names = [name for row in rows for name in self.run.quantized_names(row)]
        return flags("--keep-fp32" if self.run.implicit else "--skip-layers", names)

    def _left_out(self, rows: Sequence[LayerRow]) -> str:
        """How these layers are left unquantized; a file that came quantized is written without their quantizers."""
        if self._came_quantized(rows) and self._of_unquantized is not None:
            names = [name for row in rows for name in self._computing(row)]
            return f"{some(names, LISTED)} (data, weights and result in FP32)"
        return self._unquantized(rows)

    def _computing(self, row: LayerRow) -> list[str]:
        """The layer's name; where it is a chain of several products, which an optimizer fused or shows no value of, the
        names of all its nodes that compute."""
        names = row.replay.nodes if row.replay is not None else ()
        nodes = [node for node in self.run.programs[row.component].graph.nodes if node.name in names]
        if sum(node.op in PRODUCTS for node in nodes) < 2:
            return [row.name]
        return [node.name for node in nodes if node.op not in MOVING]

    def _unsteady(self, rows: Mapping[Key, LayerRow]) -> Iterator[Finding]:
        """Two runs of one backend differ by more than the order of a sum can make."""
        row = next((row for row in rows.values() if row.noise_floor), None)
        expected = row.replay.expected if row is not None and row.replay else None
        introduced = row.replay.introduced if row is not None and row.replay else None
        # Only the first one: further down the noise has been amplified, and has tipped roundings over; and never where
        # it is small beside a steady error, whose cause may round so coarsely that little tips it over.
        floor = max(UNSTEADY * max(expected or 0.0, self.run.precision.roundoff), (introduced or 0.0) / UNSTEADY)
        if row is not None and row.noise_floor > floor:
            yield Finding(
                "unsteady-memory",
                f"two runs of the same program differ by {row.noise_floor:.2g}, but another order of summation "
                f"explains only {expected or 0.0:.2g}: memory is read before or while it is written",
                [row.name],
                [row.op],
                evidence={"noise_floor": row.noise_floor, "expected": expected},
                fix="compute-sanitizer --tool initcheck (and racecheck) on the kernel or plugin of " + row.name,
            )

    def _program(self, observation: Observation | None) -> Iterator[Finding]:
        """A finding where probes change the result: the deployed program is another one than the probed one."""
        if observation is None or observation.observer_gap <= max(
            UNSTEADY * observation.noise_floor, self.run.tolerance[0]
        ):
            return
        backends = {"ort": "ort-none,ort-all", "torch": "torch,torch-compile", "openvino": "ort,openvino"}
        pair = backends.get(self.run.pipeline.backend.spec.family)
        knobs = f"cpdebug bisect MODEL --backends {pair} --knobs"
        yield Finding(
            "optimizer",
            f"the outputs change by {observation.observer_gap:.2g} when probes prevent fusions: an optimization, a "
            "fused kernel or a value at its border is at fault",
            [],
            [],
            evidence={"observer_gap": observation.observer_gap, "noise_floor": observation.noise_floor},
            fix=knobs if pair else "build with fewer fusions, or mark one tensor at a time",
        )


def _kind(cause: Candidate) -> str:
    """What a finding has besides its cause: a sentence whose numbers were fitted, and without them one about what a
    node was told; whether FP16 has no room for what is read. All other causes are one for all layers, whatever each of
    them reaches."""
    if cause.cause in BEYOND_FP16:
        return "" if cause.evidence.get("of", "result") == "result" else "read"
    of_node = not {"node", "instead_of"}.isdisjoint(cause.evidence)
    without = re.sub(r"(\[[^]]*])|\d[\d.e+-]*", lambda found: found[1] or "#", cause.says)  # a perm is no number
    return cause.says if cause.parameters else without if of_node else ""


def _of_all(fixes: Collection[str]) -> str:
    """The advice about the constants of several layers, with all of them; empty for other advice."""
    found = [re.fullmatch(r"use the same ([^·]*) on both sides", fix) for fix in fixes]
    names = [match[1] for match in found if match]
    return f"use the same {some(names, LISTED)} on both sides" if len(names) == len(found) else ""


def _said_of_all(sentences: Sequence[str], worst: str) -> str:
    """The sentence about several layers: numbers that are others in each are told with their range, after "up to" with
    its end. The worst layer's where the words differ, too, or lists."""
    found = [set(tokens) for tokens in zip(*(_NUMBER.findall(says) for says in sentences), strict=False)]
    other = [tokens for tokens in found if len(tokens) > 1]
    if len({_NUMBER.sub("#", says) for says in sentences}) > 1 or any("[" in token for each in other for token in each):
        return worst
    ordered = (sorted(tokens, key=float) if len(tokens) > 1 else [*tokens] for tokens in found)
    told = iter([(f"{n[0]} to {n[-1]}" if len(n) > 2 else " or ".join(n), n[-1]) for n in ordered])
    return _NUMBER.sub(lambda at: next(told)[worst[: at.start()].endswith("up to ")], worst)


def _unexplained(explanation: Explanation) -> str:
    says = "no known cause explains what these layers introduce"
    differ = "; ".join(explanation.graphs_differ)
    return f"{says}; the two graphs differ there: {differ}" if differ else says


def _node_names(rows: Sequence[LayerRow]) -> list[str]:
    """Names that a list of nodes takes: the label of a region is none."""
    return [name for row in rows for name in (row.region.nodes if row.region else [row.name])]
