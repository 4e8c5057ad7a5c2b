"""What fuzz cases share: the case itself, texts that attack whoever shows them, and mutators of bytes and documents."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MARK = "Zq7"
"""Stands on both sides of rich markup in names: ``Zq7[b]Zq7`` that comes out as ``Zq7Zq7`` was interpreted."""

TEXTS = (
    "\x1b[31mred\x1b[0m",
    "\x1b]0;title\x07",
    f"{MARK}[b]{MARK}",
    f"{MARK}[/]{MARK}",
    "[/bold",
    "[link=http://evil.example]x[/link]",
    ":warning:",
    "a\nb",
    "a\r\n::error file=x,line=1::injected",
    "::warning::injected",
    "%0A::error::injected",
    "\u202egnp.exe\u202c",
    "\u2066left\u2069",
    "\u2028next\u2029",
    "\x00",
    "nul\x00in",
    "bell\x07\x08\x7f",
    "\x9b31mC1",
    "=1+cmd|' /C calc'!A0",
    "@SUM(1+1)",
    "+1+1",
    "-1+1",
    "\t=1+1",
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "</script><svg onload=alert(1)>",
    '"onmouseover="alert(1)',
    "a|b`c`*d*_e_#f",
    "](javascript:alert(1))",
    "```\n# heading",
    "../../outside/x",
    "/proc/outside/x",
    "..",
    ".",
    "",
    " ",
    "x" * 300,
    "y" * 5000,
    "ünïcødé 名前",
    "😀" * 50,
    "{{7*7}}{% x %}",
    "a,b;c",
    "'single' \"double\"",
    "a/b/c",
    "a\\b",
    "-",
    "--help",
    "~",
    "$HOME",
    "NaN",
    "None",
)
"""Names for layers, files, keys and classes."""

NUMBERS = (0, -1, 1, 2, 2**31 - 1, 2**31, -(2**31), 2**63 - 1, 2**63, -(2**63), 10**30, 0.5, -0.0, 1e308, 1e-320)
SPECIAL = (float("nan"), float("inf"), -float("inf"))


ANYTHING_NEW = "*"
"""Among what a case may write: whatever was not there before, in the folder where the commands run."""


@dataclass
class Case:
    """What to run: command lines, one after the other, in a folder that holds what they read."""

    kind: str
    commands: list[list[str]]
    writes: Sequence[str] = ()
    """What the commands may create or change in the folder, besides nothing."""
    ascii: bool = False
    """Whether the terminal knows ASCII alone."""
    file_limit: int | None = None
    """Bytes that a file may have, in place of a full disk."""
    program: str = ""
    """A Python script in the folder, to run in place of the command."""
    prints: bool = False
    """Whether its own code prints what it likes: then control characters are no fault."""
    subprocess: bool = False
    """Whether to run the installed command instead of a fork."""
    environment: dict[str, str] = field(default_factory=dict)
    signal: int = 0
    """Signal that the command gets ``signal_after`` seconds; 0: none."""
    signal_after: float = 0.0
    guarded: bool = False
    """Whether the command runs in a copy of the process, as it does when it is typed."""
    unchanged: bool = False
    """Whether the commands leave everything as it was where they fail."""
    streams: str = ""
    """What is wrong with stdout and stderr: ``both closed``, ``stdout full``, ``stdout unread`` …"""
    limits: dict[str, int] = field(default_factory=dict)
    """Limits of the process: ``NOFILE``, ``AS`` → number."""


Make = Callable[[random.Random, Any, Path], Case]
"""Makes a case in a folder, from a seeded generator and the valid files (a ``World``)."""


def damage(data: bytes, rng: random.Random) -> bytes:
    """Bytes cut, flipped, repeated, moved, filled up or exchanged."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5, 20))):
        size = max(len(out), 1)
        at = rng.randrange(size)
        kind = rng.randrange(9)
        if kind == 0:
            out = out[:at]
        elif kind == 1 and out:
            out[at % len(out)] ^= 1 << rng.randrange(8)
        elif kind == 2:
            out[at:at] = rng.randbytes(rng.choice((1, 4, 64)))
        elif kind == 3:
            del out[at : at + rng.choice((1, 4, 64))]
        elif kind == 4:
            out[at : at + 8] = rng.choice((b"\xff" * 8, b"\x00" * 8, (2**63 - 1).to_bytes(8, "little"), b"\xff\xfe"))
        elif kind == 5:
            length = rng.choice((4, 16, 128))
            out[at:at] = out[at : at + length] * 3
        elif kind == 6:
            out = out[at:] + out[:at]
        elif kind == 7:
            text = rng.choice(TEXTS).encode("utf-8", "surrogatepass")
            out[at : at + len(text)] = text
        else:
            out[at : at + 1] = bytes([rng.randrange(256)])
    if rng.random() < 0.03:
        return b""
    return bytes(out)


def places(document: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value in nested lists and dictionaries."""
    items: Any = ()
    if isinstance(document, dict):
        items = document.items()
    elif isinstance(document, list):
        items = enumerate(document[:20])
    for key, value in items:
        yield (*path, key)
        yield from places(value, (*path, key))


def nested(depth: int, rng: random.Random) -> Any:
    """Lists or dictionaries in each other."""
    value: Any = 1
    for _ in range(depth):
        value = [value] if rng.random() < 0.5 else {"a": value}
    return value


def odd_value(old: Any, rng: random.Random) -> Any:
    """Something else than was there: of another type, beyond a limit, or with a text that attacks."""
    kind = rng.randrange(13)
    if kind == 0:
        return None
    if kind == 1:
        return rng.choice((True, False))
    if kind == 2:
        return rng.choice(NUMBERS)
    if kind == 3:
        return rng.choice(SPECIAL)
    if kind in (4, 5):
        return rng.choice(TEXTS)
    if kind == 6:
        return []
    if kind == 7:
        return {}
    if kind == 8:
        return [old]
    if kind == 9:
        return {rng.choice(TEXTS): old}
    if kind == 10:
        return nested(rng.choice((3, 50)), rng)
    if kind == 11 and isinstance(old, str):
        return old + rng.choice(TEXTS)
    if kind == 12 and isinstance(old, list) and old:
        return old * rng.choice((2, 10))
    return 10**400


def mutated(document: Any, rng: random.Random) -> Any:
    """A copy with some values exchanged, removed, added, renamed or doubled."""
    document = copy.deepcopy(document)
    if rng.random() < 0.04:
        return odd_value(document, rng)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        found = list(places(document))
        if not found:
            return odd_value(document, rng)
        # A place at random depth first: a long table would else get nearly all of it.
        depth = rng.choice(sorted({len(path) for path in found}))
        path = rng.choice([path for path in found if len(path) == depth])
        holder = document
        for key in path[:-1]:
            holder = holder[key]
        key = path[-1]
        kind = rng.randrange(6)
        if kind == 0:
            del holder[key]
        elif kind == 1 and isinstance(holder, dict):
            holder[rng.choice(TEXTS)] = holder.pop(key)
        elif kind == 2 and isinstance(holder, list):
            holder.insert(rng.randrange(len(holder) + 1), copy.deepcopy(holder[key]))
        else:
            holder[key] = odd_value(holder[key], rng)
    return document


def json_bytes(document: Any, rng: random.Random) -> bytes:
    """The document as JSON; now and then text that is none, nests too deep, or is in another encoding."""
    kind = rng.randrange(30)
    if kind == 0:
        depth = rng.choice((900, 5000, 200_000))
        return b"[" * depth + b"]" * depth
    if kind == 1:
        return b'{"a":' * 50_000 + b"1" + b"}" * 50_000
    text = json.dumps(document)
    if kind == 2:
        return text.encode("utf-16")
    if kind == 3:
        return damage(text.encode(), rng)
    if kind == 4:
        return b"9" * 10_000
    if kind == 5:
        return text.replace("1", "1" * 5000, 1).encode()
    if kind == 6:
        return b"\xef\xbb\xbf" + text.encode()
    return text.encode()
