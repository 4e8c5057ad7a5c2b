"""Derivatives through the glue between components, which copies: scatters, cuts, stacks.

Glue is asked where each number comes from: it is given numbers that count their places. The answer is checked on the
numbers that it was really given.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from cp_debug.errors import InputError
from cp_debug.recipes.base import Arrays, Component, Model, Sample


def through_glue(
    model: Model,
    component: Component,
    sample: Sample,
    results: Mapping[str, Arrays],
    derivatives: Mapping[str, Tensor],
) -> dict[tuple[str, str], np.ndarray]:
    """Derivatives of a measure by the outputs of earlier components, from those by the inputs of ``component``.

    ``results``: earlier component → output name → array, of the test; ``derivatives``: input name → tensor in
    its shape. Returns (component, output) → array in the output's shape, float64.
    Raises InputError where the glue computes.
    """
    outputs = {(c, n): array for c, arrays in results.items() for n, array in arrays.items() if array.dtype.kind == "f"}
    ends = np.cumsum([0, *(array.size for array in outputs.values())])
    parts = dict(zip(outputs, itertools.pairwise(ends), strict=True))
    counts: dict[str, list[np.ndarray]] = {}
    exact = model.feed(component, sample, results)
    # Places are counted in digits that are whole numbers in all dtypes: FP16 has them to 2¹¹, FP32 to 2²⁴.
    floats = [array.dtype for array in (*outputs.values(), *exact.values()) if array.dtype.kind == "f"]
    base = 1 << min([24, *(np.finfo(dtype).nmant + 1 for dtype in floats)])
    weights = list(itertools.takewhile(lambda weight: weight <= ends[-1], (base**n for n in itertools.count())))
    for weight in weights:
        digits = np.arange(1, ends[-1] + 1) // weight % base
        counted = {component_name: dict(arrays) for component_name, arrays in results.items()}
        for (of, name), (first, end) in parts.items():
            array = outputs[of, name]
            counted[of][name] = digits[first:end].reshape(array.shape).astype(array.dtype)
        for name, digit in model.feed(component, sample, counted).items():
            counts.setdefault(name, []).append(digit.ravel())
    flat = np.concatenate([np.zeros(1), *(array.ravel().astype(np.float64) for array in outputs.values())])
    total = np.zeros(len(flat))
    for name in filter(counts.__contains__, derivatives):
        first, *others = counts[name]
        copies = np.flatnonzero(sum(others, first))  # a canvas is mostly constant
        place = np.dot(weights, [digit[copies].astype(np.float64) for digit in counts[name]])
        whole = np.clip(np.nan_to_num(place), 0, ends[-1]).astype(np.int64)
        given = exact[name].ravel()[copies]
        if not bool(np.all((whole == place) & (flat[whole] == given) | ~np.isfinite(given))):
            raise InputError(f"the glue before {component.name} computes its input {name}")
        derivative = derivatives[name].flatten()  # of a GPU's, only what is copied comes to the host
        derivative = derivative[torch.from_numpy(copies).to(derivative.device)].double()
        total += np.bincount(whole, derivative.cpu().numpy(), len(total))
    return {of: total[first + 1 : end + 1].reshape(outputs[of].shape) for of, (first, end) in parts.items()}
