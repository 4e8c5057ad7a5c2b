"""Words of errors in a Python program: arguments by their names here, where the command line has flags."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

from cp_debug.errors import InputError

P = ParamSpec("P")
R = TypeVar("R")

_FLAG = re.compile(r"--([a-z][a-z0-9]*(?:-[a-z0-9]+)*)(?![\w-])")
_ELSEWHERE = {
    "map": "maps",
    "knobs": "optimizer_blame",
    "shape": "reading.shapes",
    "image-mean": "reading.images.mean",
    "image-std": "reading.images.std",
    "image-scale": "reading.images.scale",
    "image-layout": "reading.images.layout",
}
"""Flags whose field of the options has another name."""


def in_python_words(function: Callable[P, R]) -> Callable[P, R]:
    """The function, whose InputErrors name its own arguments: ``--test-model`` becomes ``test_model``.

    A flag that is a field of its ``options`` becomes ``options.field``; one without an argument in Python stays.
    """
    parameters = inspect.signature(function).parameters
    options = parameters["options"].default if "options" in parameters else None
    fields = {field.name for field in dataclasses.fields(options)} if dataclasses.is_dataclass(options) else set()

    @functools.wraps(function)
    def called(*args: P.args, **kwargs: P.kwargs) -> R:
        __tracebackhide__ = True  # in pytest the test's own line is what matters
        try:
            return function(*args, **kwargs)
        except InputError as error:
            error.args = (_translated(str(error), set(parameters), fields), *error.args[1:])
            raise

    return called


@contextmanager
def about(argument: str) -> Iterator[None]:
    """Context in which an InputError about the model is one about ``argument``, which is another model."""
    try:
        yield
    except InputError as error:
        error.args = (re.sub(r"^MODEL(?=: )", argument, str(error)), *error.args[1:])
        raise


def _translated(text: str, parameters: set[str], fields: set[str]) -> str:
    def word(flag: re.Match[str]) -> str:
        name = flag[1].replace("-", "_")
        if name in parameters:
            return name
        name = _ELSEWHERE.get(flag[1], name)
        return f"options.{name}" if name.partition(".")[0] in fields else flag[0]

    if "channels_last" in parameters:
        text = text.replace("--tensors-layout nhwc", "channels_last=True")
    return _FLAG.sub(word, re.sub(r"^MODEL(?=: )", "model", text))
