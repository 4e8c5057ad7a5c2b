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
_OPTION = r"--[a-z][a-z0-9]*(?:-[a-z0-9]+)*(?![\w-])(?: [A-Z][A-Z=]*\b)?"
_OPTIONS = re.compile(rf"(?<![\w`-]){_OPTION}(?:(?:, | or | and ){_OPTION})*")
_QUOTED = re.compile(r"`[^`\n]*`|\b(?:cpdebug|pip|python|dask|polygraphy|trtexec) [^;,:\n]*")
"""Commands to be typed, whose options are their own."""


def in_own_words(text: str, own: Iterable[str], elsewhere: Mapping[str, str]) -> str:
    """The message, with ``elsewhere``'s command behind options that are none of ``own``: ``--map of `cpdebug bisect```.

    One that the command has under another name gets that; one in front of the whole message, which says whose value is
    wrong, goes. Options of commands that the message quotes stay.
    """
    options = set(own)

    def renamed(match: re.Match[str]) -> str:
        flag, space, value = match[0].partition(" ")
        return _own_name(flag, options) + space + value

    def placed(match: re.Match[str]) -> str:
        said = re.sub(_OPTION, renamed, match[0])
        flags = re.findall(r"--[\w-]+", said)
        lacking = [flag for flag in flags if flag not in options and flag in elsewhere]
        if len(lacking) == len(flags) and len({elsewhere[flag] for flag in flags}) == 1:
            return f"{said} of `cpdebug {elsewhere[flags[0]]}`"
        if not lacking:
            return said
        words = re.findall(_OPTION, said)
        here = [word for word in words if word.partition(" ")[0] not in lacking]
        if not here:
            return re.sub(_OPTION, lambda word: f"{word[0]} of `cpdebug {elsewhere[word[0].partition(' ')[0]]}`", said)
        there: dict[str, list[str]] = {}
        for word in words:
            if word not in here:
                there.setdefault(elsewhere[word.partition(" ")[0]], []).append(word)
        also = "; ".join(f"in `cpdebug {command}` also {', '.join(those)}" for command, those in there.items())
        return f"{' or '.join(here)} ({also})"

    front = re.match(r"(--[a-z][\w-]*): ", text)
    if front and front[1] in elsewhere and _own_name(front[1], options) not in options:
        text = text[front.end() :]
    parts, end = [], 0
    for quoted in _QUOTED.finditer(text):
        parts += [_OPTIONS.sub(placed, text[end : quoted.start()]), quoted[0]]
        end = quoted.end()
    return "".join([*parts, _OPTIONS.sub(placed, text[end:])])


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
