"""Whether a deployment's configuration fits its model: components, the names of their tensors, profiles."""

from __future__ import annotations

from collections.abc import Sequence

from cp_debug.backends.base import Program
from cp_debug.deploy.schema import ComponentConfig, DeployConfig
from cp_debug.errors import InputError
from cp_debug.graph.graph import ValueInfo, fits_shape
from cp_debug.programs.walk import Walk, run_module
from cp_debug.recipes.base import Component, Model, Sample
from cp_debug.safe_text import did_you_mean


def check_components(config: DeployConfig, components: Sequence[Component], source: str) -> None:
    """Raise InputError where the configuration names components, inputs or outputs that the model lacks.

    ``source`` names the configuration in messages.
    """
    by_name = {component.name: component for component in components}
    for name, configured in config.components.items():
        if name not in by_name:
            hint = did_you_mean(name, by_name)
            raise InputError(f"{source}: components.{name}: {config.model} has no such component{hint}")
        for kind, names, expected in (
            ("inputs", configured.inputs, by_name[name].input_names),
            ("outputs", configured.outputs, by_name[name].output_names),
        ):
            if names is not None and names != list(expected):
                raise InputError(f"{source}: components.{name}.{kind} is {names}; {config.model} has {list(expected)}")


def check_profiles_of_modules(config: DeployConfig, model: Model, sample: Sample, source: str) -> None:
    """Raise InputError where a profile has another fixed size than what a component is fed with ``sample``."""
    for step in Walk(model, sample):
        component = step.component
        configured = config.components.get(component.name, ComponentConfig())
        free = configured.dynamic_axes or component.deployed_axes or component.dynamic_axes or {}
        inputs = [
            ValueInfo(name, array.dtype, tuple(free.get(name, {}).get(axis, n) for axis, n in enumerate(array.shape)))
            for name, array in step.inputs.items()
        ]
        _check(config, component.name, inputs, source, ": this configuration was made for another model")
        if not step.last:
            step.outputs = run_module(component, step.inputs)


def check_profiles(config: DeployConfig, programs: Sequence[Program], source: str) -> None:
    """Raise InputError where a profile has another shape than the graph's input."""
    for program in programs:
        _check(config, program.name, program.graph.inputs, source)


def _check(config: DeployConfig, component: str, inputs: Sequence[ValueInfo], source: str, why: str = "") -> None:
    by_name = {value.name: value for value in inputs}
    for tensor, profile in config.components.get(component, ComponentConfig()).profile.items():
        key = f"{source}: components.{component}.profile.{tensor}"
        if tensor not in by_name:
            raise InputError(f"{key}: there is no such input; expected one of {', '.join(by_name)}")
        for side, sizes in zip(("min", "opt", "max"), profile.shapes, strict=True):
            if not fits_shape(sizes, by_name[tensor].shape):
                raise InputError(f"{key}.{side} is {sizes}; {config.model} takes {by_name[tensor]}{why}")
