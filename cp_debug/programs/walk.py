"""The walk over a model's components: the model's own glue feeds each with the outputs of the earlier ones.

Whoever runs a model part by part (exports it, calibrates it, times it, replays it) walks here and says only what is
done with one component. ``walk`` is for those who run every component; ``Walk`` for those who skip some, stop early, or
start in the middle.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from typing import Any

import numpy as np
import torch

from cp_debug.doing import doing
from cp_debug.errors import ModuleFailed, in_one_line
from cp_debug.probes.arrays import as_numpy, as_torch
from cp_debug.probes.module_state import state_kept
from cp_debug.probes.trace import as_written, flatten_outputs
from cp_debug.recipes.base import Arrays, Component, Model, Sample

Run = Callable[[Component, Arrays], Arrays]
"""Runs a component on its inputs; both by the names that the component has for them."""


class Walk:
    """One sample on its way through a model, in execution order: ``for step in Walk(model, sample): …``.

    ``results`` are outputs by component name. Those given at the start are known before the walk reaches them; a step
    that sets ``step.outputs`` adds its own.
    """

    def __init__(self, model: Model, sample: Sample, results: Mapping[str, Arrays] | None = None) -> None:
        self.model, self.sample = model, sample
        self.results: dict[str, Arrays] = dict(results or {})

    def __iter__(self) -> Iterator[ComponentStep]:
        for place in range(len(self.model.components)):
            yield ComponentStep(self, place)

    def at(self, component: str) -> ComponentStep:
        """The step of one component by its name. Raises KeyError where the model has no such component."""
        return {step.name: step for step in self}[component]


class ComponentStep:
    """One component on a walk."""

    def __init__(self, walk: Walk, place: int) -> None:
        self._walk = walk
        self.place = place
        """Number of components before this one."""
        self.component: Component = walk.model.components[place]
        self.name: str = self.component.name

    @cached_property
    def inputs(self) -> dict[str, np.ndarray]:
        """Inputs that the glue makes of the sample and of the outputs so far; computed when first asked for.

        Name → array in the dtype that the component's graph declares.
        """
        return self._walk.model.feed(self.component, self._walk.sample, self._walk.results)

    @property
    def fed(self) -> bool:
        """Whether every component before this one has outputs, so that its inputs can be known."""
        return all(c.name in self._walk.results for c in self._walk.model.components[: self.place])

    @property
    def last(self) -> bool:
        """Whether this component gives the model's outputs."""
        return self.place == len(self._walk.model.components) - 1

    @property
    def known(self) -> bool:
        """Whether the component has outputs already."""
        return self.name in self._walk.results

    @property
    def outputs(self) -> Arrays:
        """Outputs of the component. Raises KeyError before it has any.

        Name → array in the dtype that the component's graph declares.
        """
        return self._walk.results[self.name]

    @outputs.setter
    def outputs(self, outputs: Arrays) -> None:
        self._walk.results[self.name] = outputs


def walk(model: Model, sample: Sample, run: Run, results: Mapping[str, Arrays] | None = None) -> dict[str, Arrays]:
    """The outputs of all components by component name; each that is not in ``results`` already is run once.

    Component → output name → array in the dtype that the component's graph declares.
    """
    way = Walk(model, sample, results)
    for step in way:
        if not step.known:
            step.outputs = run(step.component, step.inputs)
    return way.results


def example_args(component: Component, inputs: Mapping[str, np.ndarray]) -> tuple[torch.Tensor, ...]:
    """The inputs of a component's module as positional arguments, which it may write to.

    Each tensor has the shape and dtype of its array.
    """
    return tuple(as_torch(inputs[name]).clone() for name in component.input_names)


def run_module(component: Component, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The outputs of a component's module by their names. Raises ModuleFailed when it raises in forward.

    ``inputs`` and outputs: name → array in the dtypes of the module's tensors.
    """
    assert component.module is not None
    try:
        with (
            torch.no_grad(),
            as_written(),
            state_kept(component.module),
            doing(f"{component.name} ran", in_their_folder=True),
        ):
            outputs = flatten_outputs(component.module(*example_args(component, inputs)))
    except Exception as error:
        raise ModuleFailed(f"{component.name} raised in forward: {in_one_line(error)}") from error
    return named_outputs(component, outputs)


def named_outputs(component: Component, outputs: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """Outputs of a component's module, flat as by ``flatten_outputs``, as arrays by output name.

    Shapes and dtypes stay. Raises ModuleFailed where they are not as many as in the first forward.
    """
    if len(outputs) != len(component.output_names):
        returned = f"{len(outputs)} tensors, in its first forward {len(component.output_names)}"
        raise ModuleFailed(f"{component.name} returned {returned}; expected the same in each")
    return {n: as_numpy(t) for n, t in zip(component.output_names, outputs.values(), strict=True)}


def tensors_as_arrays(outputs: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Results of an ``Executor`` as arrays, without sequences of tensors, which no glue reads.

    Shapes and dtypes stay; bfloat16 comes as ml_dtypes has it.
    """
    return {n: as_numpy(t) for n, t in outputs.items() if isinstance(t, torch.Tensor)}
