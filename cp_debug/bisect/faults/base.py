"""Seeded faults: their description and their place in a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from cp_debug.recipes.base import Model

if TYPE_CHECKING:
    from cp_debug.backends.base import Backend, Program

Rewrite = Callable[["list[Program]", Path], "list[Program]"]
"""Makes the programs under test from the reference's, and a folder for new files."""


@dataclass
class Seeded:
    """A fault put into a model, ready for ``bisect``."""

    model: Model
    """Reference model; runs under both backends when the fault needs the precision under test to show."""
    where: str
    """Fault and its place, in words."""
    layers: Sequence[str] = ()
    """The names of the layers at fault, as the tables print them."""
    ops: Sequence[str] = ()
    """Every layer of these operators is at fault, instead of ``layers``."""
    test_model: Model | Rewrite | None = None
    backends: str | Sequence[Backend] = "torch,ort"

    def strikes(self, name: str, op: str) -> bool:
        """Whether the layer ``name``, made by the operator ``op``, is one of those at fault."""
        return name in self.layers or op in self.ops


@dataclass(frozen=True)
class Fault:
    """A seeded fault in the built-in model."""

    name: str
    summary: str
    """Fault in a few words."""
    symptom: str
    """Symptom in the field."""
    seed: Callable[[], Seeded] = field(repr=False)
    """Function that puts the fault into a fresh model."""
