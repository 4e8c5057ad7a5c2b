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
from typing import Any, ParamSpec, TypeVar

from cp_debug.display import OnStep, in_notebook
from cp_debug.errors import CpdebugError, InputError, module_of
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
    signature = inspect.signature(function)
    parameters = signature.parameters
    options = parameters["options"].default if "options" in parameters else None
    fields = {field.name for field in dataclasses.fields(options)} if dataclasses.is_dataclass(options) else set()

    @functools.wraps(function)
    def called(*args: P.args, **kwargs: P.kwargs) -> R:
        __tracebackhide__ = True  # in pytest the test's own line is what matters
        given = signature.bind(*args, **kwargs)
        for name, value in given.arguments.items():
            _check_type(name, value, str(parameters[name].annotation))
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


_TYPES: dict[str, Any] = {
    "str": str,
    "Path": PurePath,
    "int": Integral,
    "float": Real,
    "bool": bool,
    "None": type(None),
    "Sequence": Sequence,
    "Mapping": Mapping,
    "tuple": tuple,
    "OnStep": Callable,
    "Shapes": Mapping,
    "ImageLayout": str,
}
"""Types behind the names in annotations; classes of this package are known by their own names."""


def _check_type(name: str, value: Any, annotation: str) -> None:
    """Raise InputError for a value of none of an annotation's types; those with Any or a model in it take all."""
    expected = [part.strip() for part in annotation.split("|")]
    if not any(part in ("Any", "ModelLike") or _fits(value, part) for part in expected):
        raise InputError(
            f"{name}: {type(value).__name__}; expected {' or '.join(_SPOKEN.get(part, part) for part in expected)}"
        )


def _fits(value: Any, annotation: str) -> bool:
    kind, _, inner = annotation.partition("[")
    if kind not in _TYPES:
        return kind in (base.__name__ for base in type(value).__mro__)
    if kind == "Shapes":
        return isinstance(value, Mapping) and all(
            isinstance(key, str) and _fits(shape, "Sequence[int]") for key, shape in value.items()
        )
    if not isinstance(value, _TYPES[kind]) or (kind in ("int", "float") and isinstance(value, bool)):
        return False
    if inner == "str, float]":
        return all(isinstance(key, str) and _fits(number, "float") for key, number in value.items())
    if kind == "tuple":
        return len(value) == inner.count("float") and all(_fits(number, "float") for number in value)
    if kind != "Sequence":
        return True
    element = inner.partition("]")[0]
    return not isinstance(value, str | bytes) and all(
        _fits(each, element) if element in _TYPES else hasattr(each, "open") for each in value
    )


_SPOKEN = {
    "str": "text",
    "Path": "a path",
    "int": "a whole number",
    "float": "a number",
    "bool": "True or False",
    "Sequence[str]": "a list of texts",
    "Sequence[Backend]": "a list of backends",
    "Mapping[str, Any]": "a mapping by name",
    "Mapping[str, float]": "numbers by name",
    "tuple[float, float, float, float]": "a tuple of four numbers",
    "Sequence[float]": "a list of numbers",
    "Shapes": "a list of whole numbers by input",
    "ImageLayout": "text",
    "OnStep": "a function",
}


def _is_settings(value: Any) -> bool:
    """Whether a value is one of this package's groups of settings."""
    return dataclasses.is_dataclass(value) and module_of(type(value)).startswith("cp_debug.")


def _checked(name: str, options: Any) -> Any:
    """The settings with paths where their fields are paths and text was given, those in them too.

    Raises InputError for fields of plain types that hold something else.
    """
    changed: dict[str, Any] = {}
    for field in dataclasses.fields(options):
        value, annotation = getattr(options, field.name), str(field.type)
        if "Path" in annotation and isinstance(value, str):
            changed[field.name] = Path(value)
        elif {part.strip().partition("[")[0] for part in annotation.split("|")} <= {*_TYPES, *_SETTINGS}:
            _check_type(f"{name}.{field.name}", value, annotation)
        if _is_settings(value):
            changed[field.name] = _checked(f"{name}.{field.name}", value)
    return dataclasses.replace(options, **changed) if changed else options


_SETTINGS = {"Reading", "Calibration", "ImageFormat"}
"""Classes of this package among the options' fields."""


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
