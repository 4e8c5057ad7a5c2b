"""Flags that several commands share, declared once as the fields of a dataclass."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from functools import wraps
from typing import Any, get_type_hints

MOST = 100_000
"""Largest count that a flag takes (samples, passes, draws): a larger one is a slip, and would never end."""
LAST_SEED = (1 << 32) - 1

Command = Callable[..., None]


def grouped(command: Command) -> Command:
    """The command with a flag for each field of every parameter that is a dataclass, as Typer needs it."""
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {name: hint for name, hint in hints.items() if is_dataclass(hint)}

    @wraps(command)
    def ungrouped(**given: Any) -> None:
        arguments = {
            name: group(**{f.name: given.pop(f.name) for f in fields(group)}) for name, group in groups.items()
        }
        command(**given, **arguments)

    parameters = []
    for name, parameter in inspect.signature(command).parameters.items():
        if name in groups:
            field_types = get_type_hints(groups[name], include_extras=True)
            parameters += [
                parameter.replace(name=f.name, default=f.default, annotation=field_types[f.name])
                for f in fields(groups[name])
            ]
        else:
            parameters.append(parameter.replace(annotation=hints[name]))
    ungrouped.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    ungrouped.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return ungrouped
