"""Abilities that only some models have, each as a protocol to ask with ``isinstance``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Protocol, TypeVar, runtime_checkable

import numpy as np

from cp_debug.errors import InputError
from cp_debug.recipes.base import Model, Sample
from cp_debug.recipes.data.base import DataOptions, DataSet

M = TypeVar("M", bound=Model)


@runtime_checkable
class HasClasses(Protocol):
    """A model that detects objects of named classes, or its detections."""

    @property
    def class_names(self) -> Sequence[str]:
        """Names of the classes, by label."""
        ...


@runtime_checkable
class HasData(Protocol):
    """A model that opens data sets with ground truth."""

    def data(self, inputs: Path | None, count: int, seed: int, options: DataOptions) -> DataSet:
        """At most ``count`` samples from ``inputs``, or made from ``seed``. Raises InputError for unusable files."""
        ...


@runtime_checkable
class Batches(Protocol):
    """A model that takes several samples in one pass."""

    def batch(self, samples: Sequence[Sample]) -> Sample:
        """Join samples into one, with the batch along the first axis as the model takes it."""
        ...


@runtime_checkable
class TurnsYaw(Protocol):
    """A model whose yaw can be counted from the y axis, as AWML's files want it."""

    def use_rot_y_axis_reference(self) -> None:
        """Change the outputs ``dim`` and ``rot`` in place."""
        ...


@runtime_checkable
class HasWeights(Protocol):
    """A model that knows where its weights come from."""

    weights: str
    """A file, or how they were made."""


@runtime_checkable
class HasNotes(Protocol):
    """A model with remarks about its loading that a reader must know."""

    notes: Sequence[str]


@runtime_checkable
class RemarksOnSamples(Protocol):
    """A model that sees what is odd about a sample."""

    def remarks(self, sample: Sample) -> Sequence[str]:
        """Sentences that a reader of the result must know; none for an ordinary sample."""
        ...


@runtime_checkable
class CountsSamples(Protocol):
    """A model that knows how many samples files hold."""

    def sample_count(self, inputs: Path) -> int:
        """Number of samples in ``inputs``. Raises InputError for unusable files."""
        ...


MADE_UP = "generated inputs: "
"""Beginning of a remark that says what made-up inputs hold, and so of no concern about the model."""
MOST_REMARKS = 8
"""Remarks on samples that are told; the others are counted."""


class Remarks:
    """Remarks on the samples of one job: those of ``model``, if it has any, and those that are added."""

    def __init__(self, model: Model | None = None) -> None:
        self._model, self._lines = model, list[str]()

    def see(self, sample: Sample) -> None:
        """Take the sample's own remarks, and ask the model about it, once."""
        self.add(sample.remarks)
        if isinstance(self._model, RemarksOnSamples):
            self.add(self._model.remarks(sample))

    def add(self, lines: Sequence[str]) -> None:
        """Remarks on one sample; those that were told of it before are not told again."""
        self._lines += [line for line in lines if line not in self._lines[-2:]]

    @property
    def sentences(self) -> list[str]:
        """The first remarks, and the number of the others."""
        left_out = len(self._lines) - MOST_REMARKS
        more = [f"and {left_out} more notes of this kind on other samples"] if left_out > 0 else []
        return [*self._lines[:MOST_REMARKS], *more]


@runtime_checkable
class HasScores(Protocol):
    """A decoded result whose entries have scores, boxes or not."""

    @property
    def scores(self) -> np.ndarray:
        """``[N]``, 0 to 1."""
        ...


@runtime_checkable
class DetectsBoxes(HasScores, Protocol):
    """A decoded result that consists of detections."""

    @property
    def boxes(self) -> np.ndarray:
        """``[N, 7 or more]``: x, y, z, length, width, height in metres, yaw in radians."""
        ...

    @property
    def labels(self) -> np.ndarray:
        """``[N]``, integers."""
        ...


class _GivenSamples:
    """Base of models whose samples are given: they hand out those, however many are asked for."""

    given: Sequence[Sample]

    def samples(self, count: int, seed: int, inputs: Path | None) -> Iterator[Sample]:
        """The given samples."""
        return iter(self.given)


def with_samples(model: M, samples: Sequence[Sample]) -> M:
    """A copy of ``model`` that gives exactly these samples, however many are asked for.

    Its class derives from the model's own, so that it keeps every ability: Python 3.12 looks for a protocol's members
    past ``__getattr__``.
    """
    kind = type(model)
    if not issubclass(kind, _GivenSamples):
        kind = type(kind.__name__, (_GivenSamples, kind), {"__doc__": kind.__doc__, "__module__": kind.__module__})
    chosen: M = kind.__new__(kind)
    vars(chosen).update(vars(model), given=tuple(samples))
    return chosen


def with_notes(model: M, notes: Sequence[str]) -> M:
    """A copy of ``model`` with more remarks for the reader of its results; the model itself where there are none."""
    if not notes:
        return model
    noted = copy(model)
    vars(noted)["notes"] = [*(model.notes if isinstance(model, HasNotes) else ()), *notes]
    return noted


def with_components_of(reference: Model, test: M) -> M:
    """A test's model whose components have the reference's names: a single one may be an instance of another class.

    Raises InputError where several are called otherwise.
    """
    ours, theirs = ([component.name for component in model.components] for model in (reference, test))
    if ours == theirs:
        return test
    if len(ours) != 1 or len(theirs) != 1:
        raise InputError(
            f"--test-model: {test.name} has the components {', '.join(theirs)}; expected those of {reference.name}: "
            f"{', '.join(ours)}"
        )
    renamed = copy(test)
    vars(renamed)["components"] = [replace(test.components[0], name=ours[0])]
    return renamed


def samples_left_out(model: Model, inputs: Path | None, asked: int, taken: int) -> list[str]:
    """A sentence where ``inputs`` hold more samples than the ``asked`` ones, all of which were ``taken``; else none.

    Of samples that were handed over, or made up, there are no more.
    """
    if inputs is None or taken < asked or isinstance(model, _GivenSamples) or not isinstance(model, CountsSamples):
        return []
    total, verb = model.sample_count(inputs), "was" if taken == 1 else "were"
    looked = f"{taken} of {total} samples of {inputs} {verb} used; --samples {total} uses all"
    return [looked] if taken < total else []
