"""Control flow that ran: its nodes, and bodies of theirs that no sample reached."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class IdleBody:
    """One body that did not run."""

    path: str
    """Path of its node, without the numbers of passes."""
    op: str
    body: str
    """Name of the attribute that holds it."""

    def __str__(self) -> str:
        what = "body" if self.op in ("Loop", "Scan") else f"{self.body.removesuffix('_branch')} branch"
        return f"the {what} of {self.op} {self.path}"


@dataclass(frozen=True)
class ControlFlow:
    """Control flow of a program on all samples."""

    ran: frozenset[str] = frozenset()
    """Paths of the nodes that ran, without the numbers of passes."""
    idle: tuple[IdleBody, ...] = ()


def idle_on_both(ours: ControlFlow, theirs: ControlFlow) -> list[IdleBody]:
    """The bodies that neither of two sides ran, or that one side alone has."""
    found = [body for body in ours.idle if body in theirs.idle or body.path not in theirs.ran]
    return [*found, *(body for body in theirs.idle if body not in ours.idle and body.path not in ours.ran)]
