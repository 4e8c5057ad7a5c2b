"""Results as JSON and back: one encoder and one decoder for every dataclass that a result is made of.

A field stands under its own name, or under ``metadata={"key": …}``; the fields of a part with
``metadata={"inline": True}`` stand beside those of its owner; ``metadata={"omit": True}`` keeps a field out. NaN and
infinities, which JSON lacks, are the strings "NaN", "Infinity", "-Infinity". Keys that a class does not know are left
alone, so files of later versions of a schema can be read.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, TypeVar, get_args, get_origin, get_type_hints

from cp_debug.errors import InputError

if TYPE_CHECKING:
    from cattrs import Converter

T = TypeVar("T")


def json_safe(value: Any) -> Any:
    """The value with NaN and infinities as the strings "NaN", "Infinity", "-Infinity", containers included."""
    if isinstance(value, dict):
        return {k: json_safe(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [json_safe(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    return value


def encode(value: Any, *, json: bool = True) -> Any:
    """A dataclass as a JSON object (containers and their contents likewise), all its fields.

    ``json`` False leaves NaN and infinities numbers.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        document: dict[str, Any] = {}
        for field in dataclasses.fields(value):
            if field.metadata.get("omit"):
                continue
            part = encode(getattr(value, field.name), json=json)
            document |= part if field.metadata.get("inline") else {field.metadata.get("key", field.name): part}
        return document
    if isinstance(value, dict):
        return {str(k): encode(v, json=json) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [encode(v, json=json) for v in value]
    return json_safe(value) if json else value


def decode(kind: type[T], document: Any, source: str, path: str = "") -> T:
    """``document`` as an object of the dataclass ``kind``.

    Raises InputError for what does not fit, with ``source`` and the field's path below ``path``.
    """
    from cattrs import transform_error

    if not isinstance(document, dict):
        raise InputError(f"{source}: {f'field {path!r}' if path else 'the document'} is not a JSON object")
    try:
        return _converter().structure(document, kind)
    except Exception as error:  # cattrs gives groups of whatever was raised inside
        message, _, where = transform_error(error, path="$", format_exception=_said)[0].partition(" @ ")
        steps = [path, re.sub(r"\['(\w+)'\]", r".\1", where.removeprefix("$")).removeprefix(".")]
        raise InputError(f"{source}: field {'.'.join(s for s in steps if s)!r} is {message}") from None


@lru_cache
def _converter() -> Converter:
    from cattrs import Converter

    converter = Converter()
    converter.register_structure_hook(float, _number)
    for kind in (int, str, bool):
        converter.register_structure_hook(kind, _strict)
    converter.register_structure_hook_func(_by_number, partial(_numbered, converter))
    converter.register_structure_hook_factory(dataclasses.is_dataclass, partial(_reader, converter))
    return converter


def _reader(converter: Converter, kind: Any) -> Any:
    """A function that reads a dataclass: its own fields by cattrs, its inline parts from the same object."""
    from cattrs.gen import make_dict_structure_fn, override

    inline = [field.name for field in dataclasses.fields(kind) if field.metadata.get("inline")]
    if inline:
        hints = get_type_hints(kind)
        own_fields = [field for field in dataclasses.fields(kind) if field.name not in inline]
        core = dataclasses.make_dataclass(
            kind.__name__,
            [(f.name, hints[f.name], dataclasses.field(**_default(f), metadata=f.metadata)) for f in own_fields],
            kw_only=True,
        )
        parts = {name: _only(hints[name]) for name in inline}

        def read(document: Any, _: Any) -> Any:
            core_part: Any = converter.structure(document, core)
            inline_parts = {name: converter.structure(document, part) for name, part in parts.items()}
            return kind(**{f.name: getattr(core_part, f.name) for f in own_fields}, **inline_parts)

        return read
    keys = {f.name: override(rename=f.metadata["key"]) for f in dataclasses.fields(kind) if "key" in f.metadata}
    return make_dict_structure_fn(kind, converter, **keys)  # type: ignore[arg-type]


def _by_number(hint: Any) -> bool:
    """Whether a type hint is a dict with integer keys, which JSON turns into text."""
    return get_origin(hint) is dict and get_args(hint)[0] is int


def _numbered(converter: Converter, value: Any, hint: Any) -> dict[int, Any]:
    kind: Any = dict[str, get_args(hint)[1]]  # type: ignore[misc]
    return {int(k): v for k, v in converter.structure(value, kind).items()}


def _only(hint: Any) -> Any:
    """The dataclass in the hint ``Part`` or ``Part | None``."""
    return next((argument for argument in get_args(hint) if dataclasses.is_dataclass(argument)), hint)


def _default(field: dataclasses.Field[Any]) -> dict[str, Any]:
    if field.default is not dataclasses.MISSING:
        return {"default": field.default}
    return {} if field.default_factory is dataclasses.MISSING else {"default_factory": field.default_factory}


def _number(value: Any, _: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise TypeError(f"{json.dumps(value)[:40]}; expected a number")
    try:
        return float(value)
    except (ValueError, OverflowError):
        raise TypeError(f"{json.dumps(value)[:40]}; expected a number") from None


def _strict(value: Any, kind: type) -> Any:
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise TypeError(f"{json.dumps(value, default=str)[:40]}; expected {kind.__name__}")
    return value


def _said(error: BaseException, kind: type | None) -> str:
    if isinstance(error, KeyError):
        return "missing"
    if isinstance(error, TypeError) and "; expected" in str(error):
        return str(error)
    return f"not what was expected ({type(error).__name__})"
