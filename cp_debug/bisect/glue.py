"""Derivatives through the glue between components, which copies: scatters, cuts, stacks.

Glue is asked where each number comes from: it is given numbers that count their places. The answer is checked on the
numbers that it was really given.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import numpy as np

from cp_debug.errors import InputError
from cp_debug.recipes.base import Arrays, Component, Model, Sample

BASE = 1 << 11
"""Places are counted in digits of this base: FP16 holds no larger whole numbers."""


def through_glue(
    model: Model, component: Component, sample: Sample, results: Mapping[str, Arrays], derivatives: Arrays
) -> dict[tuple[str, str], np.ndarray]:
    """Derivatives of a measure by the outputs of earlier components, from those by the inputs of ``component``.

    ``results``: earlier component → output name → array, of the test; ``derivatives``: input name → array.
    Returns (component, output) → array in the output's shape, float64. Raises InputError where the glue computes.
    """
    outputs = {(c, n): array for c, arrays in results.items() for n, array in arrays.items() if array.dtype.kind == "f"}
    ends = np.cumsum([0, *(array.size for array in outputs.values())])
    parts = dict(zip(outputs, itertools.pairwise(ends), strict=True))
    places: dict[str, np.ndarray] = {}
    weight = 1
    while weight <= ends[-1]:
        digits = np.arange(1, ends[-1] + 1) // weight % BASE
        counted = {component_name: dict(arrays) for component_name, arrays in results.items()}
        for (of, name), (first, end) in parts.items():
            array = outputs[of, name]
            counted[of][name] = digits[first:end].reshape(array.shape).astype(array.dtype)
        for name, digit in model.feed(component, sample, counted).items():
            places[name] = places.get(name, 0) + digit.astype(np.float64) * weight
        weight *= BASE
    exact = model.feed(component, sample, results)
    flat = np.concatenate([np.zeros(1), *(array.ravel().astype(np.float64) for array in outputs.values())])
    total = np.zeros(len(flat))
    for name, derivative in derivatives.items():
        place = np.clip(np.nan_to_num(places.get(name, np.zeros(derivative.shape))), 0, ends[-1]).astype(np.int64)
        copied = (place == places.get(name, place)) & np.equal(
            flat[place], exact[name], where=place > 0, out=place == 0
        )
        if not bool(np.all(copied | ~np.isfinite(exact[name]))):
            raise InputError(f"the glue in front of {component.name} computes its input {name}")
        np.add.at(total, place.ravel(), derivative.astype(np.float64).ravel())
    return {of: total[first + 1 : end + 1].reshape(outputs[of].shape) for of, (first, end) in parts.items()}
