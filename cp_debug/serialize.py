"""Results as JSON and back: one encoder and one decoder for every dataclass that a result is made of.

A field stands under its own name, or under ``metadata={"key": …}``, where dots lead into objects (``"a.b"``).
Further metadata: ``"inline": True`` puts the fields of a part beside those of its owner; ``"absent": …`` is written in
place of None, and read as None; ``"written": False`` leaves a field out of what is written, ``JsonForm`` supplies it to
the reader; ``"omit": True`` keeps it out of both; ``"one_of"`` lists the values that may be read. Figures that follow
from the fields are written, never read: ``JsonForm.derives``. NaN and infinities, which JSON lacks, are the strings
"NaN", "Infinity", "-Infinity". Keys that a class does not know are left alone, so files of later versions of a schema
can be read.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from types import NoneType, UnionType
from typing import Any, ClassVar, TypeVar, Union, get_args, get_origin, get_type_hints

from cp_debug.errors import InputError
from cp_debug.reading import excerpt

T = TypeVar("T")
_ARRAYS = (list, tuple, frozenset, Sequence)
"""Kinds of fields that are arrays in JSON."""


class JsonForm:
    """Base of dataclasses that are results, or parts of them: what their JSON holds besides their fields."""

    derives: ClassVar[tuple[str, ...]] = ()
    """Properties that are written, for readers of the file."""

    def to_dict(self) -> dict[str, Any]:
        """The JSON document; numbers that JSON lacks are the strings "NaN", "Infinity" and "-Infinity".

        ``float()`` in Python and ``Number()`` in JavaScript read them back.
        """
        document: dict[str, Any] = encode(self)
        return document

    def derived(self) -> dict[str, Any]:
        """Key → what is written of ``derives``, and figures of other names. A key may have dots, as in metadata."""
        return {name: getattr(self, name) for name in self.derives}

    def completed(self, document: dict[str, Any]) -> dict[str, Any]:
        """``document``, which holds the fields and the figures, with what repeats parts of it. Never read either."""
        return document

    @classmethod
    def fields_from(cls, document: dict[str, Any]) -> dict[str, Any]:
        """The document with everything under the keys of the fields: what other parts of it hold, and older forms.

        Values may be objects already. Raises BadField.
        """
        return document


class BadField(InputError):
    """A field of a document that does not fit: its path, and what it is instead."""

    def __init__(self, path: str, problem: str) -> None:
        super().__init__(f"field {path!r} is {problem}" if path else problem)
        self.path, self.problem = path, problem


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
    """A dataclass as a JSON object (containers and their contents likewise): all its fields, then what follows of them.

    ``json`` False leaves NaN and infinities numbers.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        document: dict[str, Any] = {}
        derived: dict[str, Any] = {}
        for key, figure in _entries(value, derived, json):
            _put(document, key, figure)
        for key, figure in derived.items():
            _put(document, key, figure)
        return value.completed(document) if isinstance(value, JsonForm) else document
    if isinstance(value, Mapping):
        return {str(k): encode(v, json=json) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [encode(v, json=json) for v in value]
    if isinstance(value, frozenset):
        return [encode(v, json=json) for v in sorted(value)]
    return json_safe(value) if json else value


def decode(kind: type[T], document: Any, source: str, path: str = "") -> T:
    """``document`` as an object of the dataclass ``kind``.

    Raises InputError for what does not fit, with ``source`` and the field's path below ``path``.
    """
    if not isinstance(document, dict):
        raise InputError(f"{source}: {f'field {path!r}' if path else 'the document'} is not a JSON object")
    try:
        return _at(path, kind, document)
    except BadField as bad:
        raise InputError(f"{source}: field {bad.path!r} is {bad.problem}") from None


def part(kind: type[T], document: Mapping[str, Any], key: str) -> T:
    """One field of a document, of any type that a field may have. Raises BadField, also where it is missing."""
    if not isinstance(document, Mapping):
        raise BadField("", f"a document is a JSON object; this is of type {type(document).__name__}")
    if key not in document:
        raise BadField(key, "missing")
    return _at(key, kind, document[key])


def check_entries(document: Mapping[str, Any], key: str, kinds: Mapping[str, Any], *, needed: bool = False) -> None:
    """Check a field, where it is there, that maps names to objects of which only some keys are read.

    ``kinds``: key → type; a key may be missing unless ``needed``. Raises BadField with the path of what does not fit.
    """
    if key not in document:
        return
    for name, entry in part(dict[str, dict[str, Any]], document, key).items():
        for inner, kind in kinds.items():
            if inner in entry or needed:
                try:
                    part(kind, entry, inner)
                except BadField as bad:
                    raise BadField(_join(_join(key, name), bad.path), bad.problem) from None


def number_keys(kind: type[Any]) -> list[str]:
    """Keys of the numbers that a dataclass holds, those of its inline parts included, also where they may be None."""
    keys: list[str] = []
    hints = get_type_hints(kind)
    for field in dataclasses.fields(kind):
        if field.metadata.get("inline"):
            keys += number_keys(_only(hints[field.name]))
        elif {*(get_args(hints[field.name]) or [hints[field.name]])} <= {int, float, NoneType}:
            keys.append(_key(field))
    return keys


def _entries(value: Any, derived: dict[str, Any], json: bool) -> Iterator[tuple[str, Any]]:
    """Key and value of every field that is written, those of inline parts included; ``derived`` gets the rest."""
    for field in dataclasses.fields(value):
        if field.metadata.get("omit") or not field.metadata.get("written", True):
            continue
        content = getattr(value, field.name)
        if content is None:
            content = field.metadata.get("absent")
        if not field.metadata.get("inline"):
            yield _key(field), encode(content, json=json)
        elif content is not None:
            yield from _entries(content, derived, json)
        else:
            yield from (
                (_key(each), None) for each in dataclasses.fields(_only(get_type_hints(type(value))[field.name]))
            )
    if isinstance(value, JsonForm):
        derived |= {key: encode(figure, json=json) for key, figure in value.derived().items()}


def _put(document: dict[str, Any], key: str, value: Any) -> None:
    *sections, last = key.split(".")
    for section in sections:
        document = document.setdefault(section, {})
    document[last] = value


def _key(field: dataclasses.Field[Any]) -> str:
    key: str = field.metadata.get("key", field.name)
    return key


def _at(step: str, hint: Any, value: Any) -> Any:
    """``value`` as what a type hint says. Raises BadField, whose path begins with ``step``."""
    if type(value) is hint:  # most fields
        return value
    try:
        return _read(hint, value)
    except Exception as error:  # older forms are read by code that expects nothing else, and classes check themselves
        problem = "missing" if isinstance(error, KeyError) else f"not what was expected ({type(error).__name__})"
        bad = error if isinstance(error, BadField) else BadField("", problem)
        raise BadField(_join(step, bad.path), bad.problem) from None


def _join(path: str, step: str) -> str:
    return f"{path}{step}" if step.startswith("[") or not path or not step else f"{path}.{step}"


def _wrong(value: Any, expected: str) -> BadField:
    return BadField("", f"{excerpt(value)}; expected {expected}")


def _read(hint: Any, value: Any) -> Any:
    """``value`` as what a type hint says, by the kinds of fields that results have. Raises BadField."""
    origin, kinds = _parts(hint)
    if origin in (Union, UnionType):
        some = [kind for kind in kinds if kind is not NoneType]
        if value is None and len(some) < len(kinds):
            return None
        is_array = isinstance(value, list | tuple)  # of a number and an array JSON tells which it is
        return _read(next((k for k in some if (_parts(k)[0] in _ARRAYS) == is_array), some[0]), value)
    if origin is float:
        return _number(value)
    if origin in (int, str, bool):
        if not isinstance(value, origin) or (isinstance(value, bool) and origin is not bool):
            raise _wrong(value, origin.__name__)
        return value
    if origin in _ARRAYS:
        return _items(origin, kinds, value)
    if origin in (dict, Mapping):  # JSON turns whole numbers that are keys into text
        if not isinstance(value, dict):
            raise _wrong(value, "a JSON object")
        key_kind, kind = kinds or (str, Any)
        return {int(k) if key_kind is int else k: _at(str(k), kind, v) for k, v in value.items()}
    if dataclasses.is_dataclass(origin):
        return _dataclass(origin, value)
    if hasattr(origin, "_fields"):  # a named tuple, from a list of its values or from an object of them
        if isinstance(value, dict):
            value = [_inside(value, name)[0] for name in origin._fields if name in value]
        hints = get_type_hints(origin)
        return origin(*_items(tuple, tuple(hints[name] for name in origin._fields), value))
    if hint in (Any, object) or getattr(hint, "_is_protocol", False):
        return value
    raise TypeError(f"{hint}: no type that is read")


@lru_cache(None)
def _parts(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    """A generic type, or the type itself, and what it is made of."""
    return get_origin(hint) or hint, get_args(hint)


def _items(origin: Any, kinds: tuple[Any, ...], value: Any) -> Any:
    """A list, tuple or frozenset of anything; a sequence becomes a list."""
    if not isinstance(value, list | tuple):
        raise _wrong(value, "list")
    if origin is tuple and kinds and kinds[-1] is not Ellipsis:
        if len(value) != len(kinds):
            raise _wrong(value, f"{len(kinds)} entries")
    else:
        kinds = (kinds[0] if kinds else Any,) * len(value)
    made = (_at(f"[{i}]", kind, item) for i, (kind, item) in enumerate(zip(kinds, value, strict=True)))
    return (list if origin is Sequence else origin)(made)


def _number(value: Any) -> float:
    if isinstance(value, int | float | str) and not isinstance(value, bool):
        with suppress(ValueError, OverflowError):
            return float(value)
    raise _wrong(value, "a number")


@lru_cache(None)
def _plan(kind: type) -> list[tuple[dataclasses.Field[Any], str, Any]]:
    """The fields of a dataclass that are read, each with its key and its type hint."""
    hints = get_type_hints(kind)
    fields = [field for field in dataclasses.fields(kind) if not field.metadata.get("omit")]
    return [(field, _key(field), hints[field.name]) for field in fields]


def _dataclass(kind: Any, document: Any) -> Any:
    """A dataclass: each field from under its key, its inline parts from the same object."""
    if isinstance(document, kind):
        return document
    if not isinstance(document, dict):
        raise _wrong(document, "a JSON object")
    if issubclass(kind, JsonForm):
        document = kind.fields_from(document)
    values: dict[str, Any] = {}
    for field, key, hint in _plan(kind):
        if field.metadata.get("inline"):
            absent = NoneType in get_args(hint) and _is_absent(document, field, _only(hint))
            values[field.name] = None if absent else _read(_only(hint), document)
        elif found := _inside(document, key) or ([document[key]] if key in document else []):
            none = "absent" in field.metadata and found[0] == _for_none(field)
            value = values[field.name] = _at(key, hint, None if none else found[0])
            if value not in (allowed := field.metadata.get("one_of", (value,))):
                raise BadField(key, _wrong(value, ", ".join(allowed)).problem)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise BadField(key, "missing")
    return kind(**values)


def _inside(document: dict[str, Any], key: str) -> list[Any]:
    """The value that a key with dots leads to, in a list; empty where it is missing."""
    *sections, last = key.split(".")
    for i, section in enumerate(sections):
        if section not in document:
            return []
        document = document[section]
        if not isinstance(document, dict):
            raise BadField(".".join(sections[: i + 1]), _wrong(document, "a JSON object").problem)
    return [document[last]] if last in document else []


def _is_absent(document: dict[str, Any], field: dataclasses.Field[Any], kind: Any) -> bool:
    """Whether an inline part is None: what is written for None is there, or nothing but null."""
    if field.metadata.get("absent") is not None:
        return all(document.get(key) == value for key, value in _for_none(field).items())
    return all(document.get(_key(each)) is None for each in dataclasses.fields(kind))


@lru_cache(None)
def _for_none(field: dataclasses.Field[Any]) -> Any:
    """JSON that is written in place of None."""
    return encode(field.metadata["absent"])


def _only(hint: Any) -> Any:
    """The dataclass in the hint ``Part`` or ``Part | None``."""
    return next((argument for argument in get_args(hint) if dataclasses.is_dataclass(argument)), hint)
