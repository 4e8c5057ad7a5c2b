"""Messages in a command's own words: an option that it lacks is named with the command that has it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from typing import Any

import typer

_SAME = (
    ("--backends", "--backend"),
    ("--tensors-layout", "--layout"),
    ("--inputs", "--data", "--calib-data"),
)
"""Options that mean the same, and are called so in one command or another."""
_OPTION = re.compile(r"(?<![\w`-])(--[a-z][a-z0-9]*(?:-[a-z0-9]+)*)(?![\w-])( [A-Z][A-Z=]*\b)?")
_QUOTED = re.compile(r"(`[^`\n]*`|\b(?:cpdebug|pip|python|dask|polygraphy|trtexec) [^;,:\n]*)")
"""Commands to be typed, whose options are their own."""


def in_own_words(text: str, own: Iterable[str], elsewhere: Mapping[str, str]) -> str:
    """The message, with ``elsewhere``'s command behind options that are none of ``own``: ``--map of `cpdebug bisect```.

    One that the command has under another name gets that; one in front of the whole message, which says whose value is
    wrong, goes. Options of commands that the message quotes stay.
    """
    options = set(own)

    def placed(match: re.Match[str]) -> str:
        flag, value = _own_name(match[1], options), match[2] or ""
        where = "" if flag in options or flag not in elsewhere else f" of `cpdebug {elsewhere[flag]}`"
        return f"{flag}{value}{where}"

    front = re.match(r"(--[a-z][\w-]*): ", text)
    if front and front[1] in elsewhere and _own_name(front[1], options) not in options:
        text = text[front.end() :]
    return "".join(part if i % 2 else _OPTION.sub(placed, part) for i, part in enumerate(_QUOTED.split(text)))


def _own_name(flag: str, options: set[str]) -> str:
    same = next((group for group in _SAME if flag in group), ())
    return flag if flag in options else next((other for other in same if other in options), flag)


@cache
def all_options(application: Callable[[], typer.Typer]) -> dict[str, str]:
    """Option → the command of ``application`` that has it, ``bisect`` before others."""
    from typer.main import get_command

    found: dict[str, str] = {}
    for name, command in sorted(_commands(get_command(application())), key=lambda each: each[0] != "bisect"):
        for parameter in command.params:
            for option in (*parameter.opts, *parameter.secondary_opts):
                found.setdefault(option, name)
    return found


def _commands(command: Any, path: Sequence[str] = ()) -> list[tuple[str, Any]]:
    inner = getattr(command, "commands", None)
    if inner is None:
        return [(" ".join(path), command)]
    return [each for name, below in inner.items() for each in _commands(below, (*path, name))]
