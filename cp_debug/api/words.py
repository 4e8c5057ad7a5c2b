"""Words of a call in a Python program: errors by its arguments' names instead of flags, and progress."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Integral, Real
from pathlib import Path, PurePath
from types import NoneType, UnionType
from typing import Any, Literal, ParamSpec, TypeVar, Union, get_args, get_origin, get_type_hints

from cp_debug.backends.base import Backend
from cp_debug.display import OnStep, in_notebook
from cp_debug.errors import CpdebugError, InputError, module_of
from cp_debug.recipes.input_files import ImageLayout
from cp_debug.safe_text import message

P = ParamSpec("P")
R = TypeVar("R")

_FLAG = re.compile(r"--([a-z][a-z0-9]*(?:-[a-z0-9]+)*)(?![\w-])")
_ELSEWHERE = {
    "map": "maps",
    "knobs": "optimizer_blame",
    "shape": "reading.shapes",
    "image": "reading.images",
}
"""Flags whose field of the options has another name."""


def in_python_words(function: Callable[P, R]) -> Callable[P, R]:
    """The function, whose InputErrors name its own arguments: ``--test-model`` becomes ``test_model``.

    A flag that is a field of its ``options`` becomes ``options.field``; one without an argument in Python stays.
    Arguments of other types than the signature says are refused by InputError, too. What others wrote into a message
    is made safe, as Python prints it as it is.
    """
    signature, hints = inspect.signature(function), get_type_hints(function)
    parameters = signature.parameters
    options = parameters["options"].default if "options" in parameters else None
    fields = {field.name for field in dataclasses.fields(options)} if dataclasses.is_dataclass(options) else set()

    @functools.wraps(function)
    def called(*args: P.args, **kwargs: P.kwargs) -> R:
        __tracebackhide__ = True  # in pytest the test's own line is what matters
        given = signature.bind(*args, **kwargs)
        for name, value in given.arguments.items():
            _check_type(name, value, hints[name])
            if name == "backends" and not isinstance(value, str) and all(isinstance(each, str) for each in value):
                given.arguments[name] = ",".join(value)
            if name in ("options", "export", "data") and name in kwargs and _is_settings(value):
                given.arguments[name] = _checked(name, value)
        try:
            return function(*given.args, **given.kwargs)
        except CpdebugError as error:
            text = _translated(str(error), set(parameters), fields) if isinstance(error, InputError) else str(error)
            error.args = (message(text), *error.args[1:])
            raise

    return called


def _check_type(name: str, value: Any, hint: Any) -> None:
    """Raise InputError for a value that is not of the hint's type."""
    if not _fits(value, hint):
        kinds = get_args(hint) if get_origin(hint) in _UNIONS else [hint]
        expected = " or ".join(_SPOKEN.get(kind, getattr(kind, "__name__", str(kind))) for kind in kinds)
        raise InputError(f"{name}: {type(value).__name__}; expected {expected}")


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is of a hint's type, with what it holds; words of a ``Literal`` are checked where they serve."""
    kind, inner = get_origin(hint) or hint, get_args(hint)
    if kind in _UNIONS:
        return any(_fits(value, each) for each in inner)
    if kind is Mapping:
        return isinstance(value, Mapping) and all(_fits(n, inner[0]) and _fits(v, inner[1]) for n, v in value.items())
    if kind is Sequence:
        several = isinstance(value, Sequence) and not isinstance(value, str | bytes)
        return several and all(_fits(each, inner[0]) for each in value)
    if kind is tuple:
        return isinstance(value, tuple) and len(value) == len(inner) and all(map(_fits, value, inner))
    if kind is Backend:
        return hasattr(value, "open")
    is_number = kind in (int, float)
    return kind is Any or (isinstance(value, _WIDER.get(kind, kind)) and not (is_number and isinstance(value, bool)))


_UNIONS = (Union, UnionType)
_WIDER: dict[Any, Any] = {int: Integral, float: Real, Path: PurePath, Literal: str}
"""Types for which others serve as well."""
_SPOKEN: dict[Any, str] = {
    str: "text",
    Path: "a path",
    int: "a whole number",
    float: "a number",
    bool: "True or False",
    NoneType: "None",
    Sequence[str]: "a list of texts",
    Sequence[Backend]: "a list of backends",
    Sequence[float]: "a list of numbers",
    Mapping[str, Any]: "a mapping by name",
    Mapping[str, float]: "numbers by name",
    Mapping[str, Sequence[int]]: "a list of whole numbers by input",
    tuple[float, float, float, float]: "a tuple of four numbers",
    OnStep: "a function",
    ImageLayout: "text",
}


def _is_settings(value: Any) -> bool:
    """Whether a value is one of this package's groups of settings."""
    return dataclasses.is_dataclass(value) and module_of(type(value)).startswith("cp_debug.")


def _checked(name: str, options: Any) -> Any:
    """The settings with paths where their fields are paths and text was given, those in them too.

    Raises InputError for fields that hold something else.
    """
    changed: dict[str, Any] = {}
    for field, hint in get_type_hints(type(options)).items():
        value = getattr(options, field)
        if Path in get_args(hint) and isinstance(value, str):
            changed[field] = Path(value)
        else:
            _check_type(f"{name}.{field}", value, hint)
        if _is_settings(value):
            changed[field] = _checked(f"{name}.{field}", value)
    return dataclasses.replace(options, **changed) if changed else options


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

    if "overwrite" in parameters:
        text = text.replace("--overwrite", "overwrite=True")
    if "channels_last" in parameters:
        text = text.replace("--tensors-layout nhwc", "channels_last=True")
        text = text.replace("--tensors-layout flat", "flat=True")
    return _FLAG.sub(word, re.sub(r"^MODEL(?=: )", "model", text))


@contextmanager
def shown_steps(progress: bool | None, on_step: OnStep | None) -> Iterator[OnStep]:
    """Context that gives the function called at each step.

    ``progress`` None shows the steps only in a terminal or a notebook.
    """
    if on_step is not None:
        yield on_step
        return
    if progress is None:
        progress = sys.stderr.isatty() or "ipykernel" in sys.modules
    if not progress:
        yield lambda text, done, total: None
        return
    if in_notebook():
        with _notebook_line() as on_line:
            yield on_line
        return
    from rich.console import Console

    from cp_debug.reports.progress_bar import progress_bar

    # The stream as it is now: an export puts another in its place, and a bar there draws itself again.
    with progress_bar(Console(file=sys.stderr, markup=False)) as bar:
        task = bar.add_task("", total=None)
        yield lambda text, done, total: bar.update(task, description=text, completed=done, total=total or None)


@contextmanager
def _notebook_line() -> Iterator[OnStep]:
    """One line below a notebook's cell, by IPython alone; it is gone at the end."""
    from IPython.display import display

    line = display({"text/plain": ""}, raw=True, display_id=True)

    def show(text: str, done: int, total: int) -> None:
        line.update({"text/plain": f"{text} ({done} of {total})" if total else text}, raw=True)

    try:
        yield show
    finally:  # HTML takes no room where it is empty; text leaves an empty <pre>
        line.update({"text/html": "", "text/plain": ""}, raw=True)
