"""One sample through the reference and every test: run, compared, replayed, judged, explained."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cp_debug.backends.determinism import exactly_on
from cp_debug.bisect.acquittals import acquit_masks, acquit_undone
from cp_debug.bisect.assemble import Collected
from cp_debug.bisect.branches import judge_ways, other_ways
from cp_debug.bisect.candidate_run import CandidateRun
from cp_debug.bisect.causes.effects import Effects
from cp_debug.bisect.causes.findings import Explainer
from cp_debug.bisect.compiled import compiled_findings
from cp_debug.bisect.exports import judge_exports
from cp_debug.bisect.lost_channels import judge_lost, lost_channels
from cp_debug.bisect.observe import Observation, observe
from cp_debug.bisect.options import Options, StepCounter
from cp_debug.bisect.regions.guilty import can_build, look_inside
from cp_debug.bisect.remainder import Flip, flips, flips_told, remainder
from cp_debug.bisect.replayed import EXCESS, Replay
from cp_debug.bisect.result import GUILTY, OK, Attribution
from cp_debug.bisect.shares import NOT_LINEAR, Shares, set_shares
from cp_debug.bisect.special_values import judge_signs, trace_origins
from cp_debug.bisect.verdict import counts_told
from cp_debug.errors import in_one_line
from cp_debug.probes.held import CaptureHolder, HeldCapture, Room
from cp_debug.probes.statistics import TensorStats
from cp_debug.programs.pipeline import Key, Pipeline, header
from cp_debug.programs.precision import PRECISIONS
from cp_debug.programs.scene import decode, keep_scene
from cp_debug.programs.walk import Walk
from cp_debug.recipes.base import Arrays, Model, Sample
from cp_debug.serialize import json_safe

COSTLY = 0.1
"""Share of the final divergence from which a side value has a row."""


class ReferenceRun(NamedTuple):
    """Outputs, captured values and decoded outputs of the reference on one sample."""

    outputs: dict[str, Arrays]
    captured: HeldCapture
    decoded: Any | None


class SampleRuns:
    """Takes samples one after the other; the results of each test are added to its ``Collected``."""

    def __init__(
        self,
        model: Model,
        reference: Pipeline,
        runs: Sequence[CandidateRun],
        options: Options,
        scratch: Path,
        progress: StepCounter,
    ) -> None:
        """``model`` is the reference's; ``scratch`` takes captures that are not to be saved."""
        self._model, self._reference, self.runs = model, reference, runs
        self._options, self._scratch, self._progress = options, scratch, progress
        self.collected = [Collected() for _ in runs]
        self.observation: Observation | None = None
        """The reference against itself, on the first sample."""
        self._reference_floors: dict[Key, float] = {}
        self._room = Room(options.memory, weights=sum(program.weight_bytes for program in reference.programs))

    def take(self, index: int, sample: Sample) -> None:
        """Run and judge one sample; ``index`` is its place."""
        folder = (self._options.save or self._scratch) / f"sample-{index}"
        spec = str(self._reference.backend.spec)
        self._progress.step(f"{spec}, sample {index}")
        with self._holder(folder, self._reference, sample) as writer:
            given = self._reference.run(sample, lambda k, tensor: writer.put(k.value, tensor, component=k.component))
        self._reference.free_memory()
        decoded = {spec: decode(self._model, sample, given)}
        captured = writer.capture
        if index == 0 and self._options.replay:
            self._progress.step(f"{spec}: noise floor")
            self.observation, self._reference_floors = observe(self._reference, sample, given, captured)
        side = ReferenceRun(given, captured, decoded[spec])
        for run, test_collected in zip(self.runs, self.collected, strict=True):
            decoded[str(run.pipeline.backend.spec)] = self._test(run, test_collected, index, sample, side)
        captured.release()
        if self._options.save is None:
            shutil.rmtree(folder, ignore_errors=True)
        else:
            keep_scene(folder, sample, decoded)

    def _test(
        self, run: CandidateRun, collected: Collected, index: int, sample: Sample, side: ReferenceRun
    ) -> Any | None:
        """Run one test on the sample and add its results to ``collected``; returns what the model decodes of them."""
        model = run.pipeline.model
        self._progress.step(f"{run.pipeline.backend.spec}, sample {index}")
        with self._holder(side.captured.folder.parent, run.pipeline, sample) as writer:
            stats, results = run.run(sample, side.captured, writer)
            run.pipeline.free_memory()
            settings = run.pipeline.record().settings  # engines know more once they ran
            writer.update({"settings": json_safe(settings)})
        decoded = decode(model, sample, results)
        collected.detect(side.decoded, decoded)
        with exactly_on(run.device):
            self._judge(run, collected, index, sample, side, results, writer.capture, stats)
        writer.capture.release()
        return decoded

    def _judge(
        self,
        run: CandidateRun,
        collected: Collected,
        index: int,
        sample: Sample,
        side: ReferenceRun,
        results: Mapping[str, Arrays],
        test: HeldCapture,
        stats: dict[Key, TensorStats],
    ) -> None:
        """Replay, judge and explain what one test did with a sample; ``index`` is its place, ``results`` and ``test``
        are the test's outputs and values, ``stats`` how these compare with the reference's."""
        spec, model = str(run.pipeline.backend.spec), run.pipeline.model
        replays: dict[Key, Replay] = {}
        floors: dict[Key, float] = {}
        observation: Observation | None = None
        if run.oracle is not None:
            self._progress.step(f"{spec}, sample {index}: replay")
            replays = run.replay(side.captured, test, stats)
            if model is not self._model:
                replays |= run.replay_inputs(self._model, sample, results, side.captured, test)
            self._progress.step(f"{spec}, sample {index}: noise floor")
            observation, floors = run.observe(sample, results, test)
            collected.observe(observation)
            floors = {key: max(floors.get(key, 0.0), self._reference_floors.get(key, 0.0)) for key in stats}
        last = model.components[-1].name
        bounded = math.isfinite(run.tolerance[1])
        lost = dict.fromkeys(lost_channels(side.outputs[last], results[last], run.tolerance[1]) if bounded else ())
        collected.lost |= lost
        rows = run.rows(stats, replays, floors, index)
        ours, theirs = run.programs.values(), run.pipeline.programs
        branches = {p.name: p.branches for p in ours}, {p.name: p.branches for p in theirs}
        ways = list(other_ways(branches, (side.captured, test), {}, run.name))
        collected.ways |= dict.fromkeys(map(str, ways))
        exports = judge_exports(run, rows, side.captured)
        settled = judge_ways(ways, run.programs, rows) | exports.settled
        settled |= judge_signs(run, rows, side.captured, test) if run.oracle is not None else {}
        trace_origins(run, rows, side.captured, test)
        collected.masks |= dict.fromkeys(acquit_masks(run, rows, side.captured, test))
        collected.undone |= acquit_undone(run, rows)
        failures: list[str] = []

        def feed(key: Key) -> np.ndarray:
            """The input that the reference's glue makes of the test's upstream results."""
            return Walk(self._model, sample, results).at(key.component).inputs[key.value]

        shares = Shares(run, sample, side.captured, test, results, feed)
        attribution: Attribution | None = None
        flipped: list[Flip] = []
        # Behind control flow that goes another way, no error is carried to the outputs: there are other nodes.
        if run.oracle is not None and not ways:
            try:
                # Where all is within the tolerance of FP32, nobody asks which rounding makes the last 1e-6. That of a
                # quantized file is wider, whatever its backend computes in.
                is_fine = run.tolerance[0] <= PRECISIONS["fp32"].rtol and all(
                    r.within and r.verdict == OK for r in rows.values()
                )
                if not is_fine:
                    self._progress.tell(f"{spec}, sample {index}: shares")
                    attribution = set_shares(shares, rows)
                if attribution is not None and not all(row.within for row in rows.values()):
                    # Side values within the tolerance may make a part of it: the angles of a rotation depend on no
                    # input, and FP16 has no room for the positions that they are made of.
                    costly = {k for k, share in shares.of_layers.items() if abs(share) >= COSTLY and k not in rows}
                    sides = {
                        k: stats[k] for k in stats if k in costly and k in run.layers and run.layers[k].kind != "data"
                    }
                    more = run.rows(sides, replays, floors, index, sides) if sides else {}
                    for key, row in more.items():
                        row.share = shares.of_layers[key]
                    rows = {key: (rows | more)[key] for key in run.layers if key in rows or key in more}
                settled |= judge_lost(run, rows, shares, side.outputs[last], results[last]) if lost else {}
            except Exception as error:
                failures.append(f"the layers' shares of the final divergence are unknown: {in_one_line(error)}")
            flipped = flips(run, rows, side.captured, test, exports.tied)
            failures += shares.notes
        if run.oracle is not None and collected.is_worst(rows):
            collected.attribution = attribution
            whole = not any(row.stats.shape_mismatch for row in rows.values())  # else what is missing has a note
            if whole and attribution and attribution.carried and abs(attribution.remainder) > NOT_LINEAR:
                failures.append(str(attribution))
            unexplained = not exports.tied and not any(row.verdict == GUILTY for row in rows.values())
            differs = unexplained and not all(row.within for row in rows.values())
            try:
                collected.remainder = remainder(run, sample, results, side.outputs, replays) if differs else None
                if collected.remainder is not None and attribution is not None:
                    collected.remainder.shared_out = abs(attribution.remainder) <= NOT_LINEAR and all(
                        (row.replay.excess or 0.0) <= EXCESS and not row.replay.new_nonfinite
                        for row in rows.values()
                        if row.side == "test" and row.replay is not None
                    )
            except Exception as error:
                failures.append(f"whether rounding explains the divergence is unknown: {in_one_line(error)}")
            if self._options.explain:
                effects = Effects(self._model, sample, shares, side.outputs)
                precision = self._reference.backend.precision
                explainer = Explainer(run, precision, side.captured, test, feed, effects, settled, flipped)
                explainer.goes_inside = partial(can_build, run)
                explainer.adds_up = not exports.tied and (collected.remainder is None or collected.remainder.adds_up)
                collected.findings = explainer.findings(rows, observation)
                builds, tell = self._options.max_builds, self._progress.tell
                collected.findings = look_inside(explainer, rows, collected.findings, builds, tell)
                failures += explainer.notes
                try:
                    outputs, captured = (side.outputs[last], results[last]), (side.captured, test)
                    found = compiled_findings(run, sample, outputs, captured, rows, collected.findings)
                    collected.findings, told = found
                    failures += told
                except Exception as error:
                    failures.append(f"which side is nearer to FP64 is unknown: {in_one_line(error)}")
        known = {finding.evidence.get("flips") for finding in collected.findings}
        failures += flips_told([flip for flip in flipped if flip.first is None or rows[flip.first].name not in known])
        collected.unexplained |= dict.fromkeys([*counts_told(rows), *failures])
        collected.add(rows)

    def _holder(self, folder: Path, pipeline: Pipeline, sample: Sample) -> CaptureHolder:
        is_saved = self._options.save is not None
        target = folder / str(pipeline.backend.spec)
        return CaptureHolder(target, header(pipeline, [sample]) if is_saved else {}, self._room, saved=is_saved)
