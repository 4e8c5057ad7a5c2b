"""Parts that other distributions add: recipes, backends and readers of deploy files, found by entry point.

A distribution declares them in its ``pyproject.toml`` (``[project.entry-points."cpdebug.recipes"]``). Parts that
cpdebug brings itself stand in ``BUILT_IN``, so that a checkout that is not installed has them, too.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import lru_cache
from importlib.metadata import entry_points
from typing import Any

from cp_debug.errors import InputError

RECIPES, BACKENDS, CONFIGS = "cpdebug.recipes", "cpdebug.backends", "cpdebug.configs"
BUILT_IN: dict[str, dict[str, str]] = {CONFIGS: {"awml": "cp_debug.deploy.awml:read_awml"}}


@lru_cache
def names(group: str) -> dict[str, str]:
    """Name → ``module:attribute`` of every plug-in of a group. A plug-in cannot take the name of a built-in one."""
    declared = {entry.name: entry.value for entry in entry_points(group=group)}
    return declared | BUILT_IN.get(group, {})


def load(group: str, name: str) -> Callable[..., Any]:
    """The object that a plug-in names. Raises InputError when it cannot be imported."""
    target = names(group)[name]
    module, _, attribute = target.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise InputError(f"plug-in {name!r} of {group}: {target} cannot be imported ({error})") from error
