"""Whether a deployment's configuration fits its model: components, the names of their tensors, profiles."""

from __future__ import annotations

from collections.abc import Sequence

from cp_debug.backends.base import Program
from cp_debug.deploy.schema import ComponentConfig, DeployConfig
from cp_debug.errors import InputError
from cp_debug.graph.graph import fits_shape
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
        configured = config.components.get(component.name)
        if configured is None:
            configured = ComponentConfig()
        free = configured.dynamic_axes or component.deployed_axes or component.dynamic_axes or {}
        for tensor, profile in configured.profile.items():
            key = f"{source}: components.{component.name}.profile.{tensor}"
            if tensor not in step.inputs:
                raise InputError(f"{key}: there is no such input; expected one of {', '.join(step.inputs)}")
            shape = step.inputs[tensor].shape
            axes = free.get(tensor, {})
            for side, sizes in zip(("min", "opt", "max"), profile.shapes, strict=True):
                if len(sizes) != len(shape) or any(
                    n != d for axis, (n, d) in enumerate(zip(sizes, shape, strict=True)) if axis not in axes
                ):
                    named = [axes.get(axis, size) for axis, size in enumerate(shape)]
                    raise InputError(
                        f"{key}.{side} is {sizes}; {config.model} takes {tensor} {_listed(named)}: this "
                        "configuration was made for another model"
                    )
        if not step.last:
            step.outputs = run_module(component, step.inputs)


def check_profiles(config: DeployConfig, programs: Sequence[Program], source: str) -> None:
    """Raise InputError where a profile has another shape than the graph's input."""
    inputs = {value.name: value for program in programs for value in program.graph.inputs}
    for name, configured in config.components.items():
        for tensor, profile in configured.profile.items():
            key = f"{source}: components.{name}.profile.{tensor}"
            if tensor not in inputs:
                raise InputError(f"{key}: there is no such input; expected one of {', '.join(inputs)}")
            shape = inputs[tensor].shape or ()
            for side, sizes in zip(("min", "opt", "max"), profile.shapes, strict=True):
                if not fits_shape(sizes, shape):
                    raise InputError(f"{key}.{side} is {sizes}; {config.model} takes {inputs[tensor]}")


def _listed(sizes: Sequence[object]) -> str:
    return f"[{', '.join(map(str, sizes))}]"
