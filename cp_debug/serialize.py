"""Results as JSON and back: one encoder and one decoder for every dataclass that a result is made of.

A field stands under its own name, or under ``metadata={"key": …}``, where dots lead into objects (``"a.b"``).
Further metadata: ``"inline": True`` puts the fields of a part beside those of its owner; ``"absent": …`` is written in
place of None, and read as None; ``"written": False`` leaves a field out of what is written, ``JsonForm`` supplies it to
the reader; ``"omit": True`` keeps it out of both; ``"one_of"`` lists the values that may be read. Figures that follow
from the fields are written, never read: ``JsonForm.derived``. NaN and infinities, which JSON lacks, are the strings
"NaN", "Infinity", "-Infinity". Keys that a class does not know are left alone, so files of later versions of a schema
can be read.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache, partial
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, TypeVar, Union, get_args, get_origin, get_type_hints

from cp_debug.errors import InputError

if TYPE_CHECKING:
    from cattrs import Converter

T = TypeVar("T")


class JsonForm:
    """Base of dataclasses that are results, or parts of them: what their JSON holds besides their fields."""

    def to_dict(self) -> dict[str, Any]:
        """The JSON document; numbers that JSON lacks are the strings "NaN", "Infinity" and "-Infinity".

        ``float()`` in Python and ``Number()`` in JavaScript read them back.
        """
        document: dict[str, Any] = encode(self)
        return document

    def derived(self) -> dict[str, Any]:
        """Key → figure that follows from the fields, for readers of the file. A key may have dots, as in metadata."""
        return {}

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
        return _structure(kind, document, path)
    except BadField as bad:
        raise InputError(f"{source}: field {bad.path!r} is {bad.problem}") from None


def part(kind: type[T], document: Mapping[str, Any], key: str) -> T:
    """One field of a document, of any type that a field may have. Raises BadField, also where it is missing."""
    if not isinstance(document, Mapping):
        raise BadField("", f"a document is a JSON object; this is of type {type(document).__name__}")
    if key not in document:
        raise BadField(key, "missing")
    return _structure(kind, document[key], key)


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


def _structure(kind: Any, document: Any, path: str) -> Any:
    try:
        return _converter().structure(document, kind)
    except Exception as error:  # cattrs gives groups of whatever was raised inside
        raise _bad_field(error, path) from None


def _bad_field(error: BaseException, path: str) -> BadField:
    """The first field that does not fit, in what cattrs raised."""
    from cattrs import BaseValidationError, ClassValidationError

    if isinstance(error, BadField):
        return BadField(_join(path, error.path), error.problem)
    if not isinstance(error, BaseValidationError):
        return BadField(path, _problem(error))
    cause = error.exceptions[0]
    step = ""
    if isinstance(error, ClassValidationError):
        keys = {field.name: _key(field) for field in dataclasses.fields(error.cl)}
        noted = [(inner, keys[note.name]) for inner, note in error.group_exceptions()[0]]
        cause, step = noted[0] if noted else (cause, "")
    return _bad_field(cause, _join(path, step))


def _join(path: str, step: str) -> str:
    return f"{path}{step}" if step.startswith("[") or not path or not step else f"{path}.{step}"


@lru_cache
def _converter() -> Converter:
    from cattrs import Converter

    converter = Converter()
    converter.register_structure_hook(float, _number)
    for kind in (int, str, bool):
        converter.register_structure_hook(kind, _strict)
    converter.register_structure_hook_func(
        lambda hint: _origin(hint) in (list, tuple, frozenset, Sequence), partial(_items, converter)
    )
    converter.register_structure_hook_func(lambda hint: _origin(hint) in (dict, Mapping), partial(_mapping, converter))
    converter.register_structure_hook_func(_is_named_tuple, partial(_named_tuple, converter))
    converter.register_structure_hook_func(_is_choice, partial(_choice, converter))
    converter.register_structure_hook_func(lambda hint: getattr(hint, "_is_protocol", False), lambda value, _: value)
    converter.register_structure_hook_factory(dataclasses.is_dataclass, partial(_reader, converter))
    return converter


def _reader(converter: Converter, kind: Any) -> Any:
    """A function that reads a dataclass: its own fields by cattrs, its inline parts from the same object."""
    from cattrs.gen import make_dict_structure_fn, override

    hints = get_type_hints(kind)
    fields = [field for field in dataclasses.fields(kind) if not field.metadata.get("omit")]
    own = [field for field in fields if not field.metadata.get("inline")]
    inline = [field for field in fields if field.metadata.get("inline")]
    core = dataclasses.make_dataclass(
        kind.__name__,
        [(f.name, hints[f.name], dataclasses.field(**_default(f), metadata=f.metadata)) for f in own],
        kw_only=True,
    )
    renamed = {f.name: override(rename=f.metadata["key"]) for f in own if "key" in f.metadata}
    read_core: Any = make_dict_structure_fn(core, converter, **renamed)  # type: ignore[arg-type]
    nested = [f.metadata["key"] for f in own if "." in f.metadata.get("key", "")]
    absent = {_key(f): encode(f.metadata["absent"]) for f in own if "absent" in f.metadata}

    def read(document: Any, _: Any) -> Any:
        if isinstance(document, kind):
            return document
        if not isinstance(document, dict):
            raise TypeError(f"{json.dumps(document, default=str)[:40]}; expected a JSON object")
        if issubclass(kind, JsonForm):
            document = kind.fields_from(document)
        document = document | {key: value for key in nested for value in _inside(document, key)}
        document |= {key: None for key, value in absent.items() if document.get(key) == value}
        values = vars(read_core(document, core))
        for field in own:
            allowed = field.metadata.get("one_of", (values[field.name],))
            if values[field.name] not in allowed:
                given = json.dumps(values[field.name], default=str)[:40]
                raise BadField(_key(field), f"{given}; expected {', '.join(allowed)}")
        for field in inline:
            hint = hints[field.name]
            absent_part = NoneType in get_args(hint) and _is_absent(document, field, _only(hint))
            values[field.name] = None if absent_part else converter.structure(document, _only(hint))
        return kind(**values)

    return read


def _inside(document: dict[str, Any], key: str) -> list[Any]:
    """The value that a key with dots leads to, in a list; empty where it is missing."""
    *sections, last = key.split(".")
    for i, section in enumerate(sections):
        if section not in document:
            return []
        document = document[section]
        if not isinstance(document, dict):
            problem = f"{json.dumps(document, default=str)[:40]}; expected a JSON object"
            raise BadField(".".join(sections[: i + 1]), problem)
    return [document[last]] if last in document else []


def _is_absent(document: dict[str, Any], field: dataclasses.Field[Any], kind: Any) -> bool:
    """Whether an inline part is None: what is written for None is there, or nothing but null."""
    if (written := field.metadata.get("absent")) is not None:
        return all(document.get(key) == value for key, value in encode(written).items())
    return all(document.get(_key(each)) is None for each in dataclasses.fields(kind))


def _origin(hint: Any) -> Any:
    return get_origin(hint) or hint


def _items(converter: Converter, value: Any, hint: Any) -> Any:
    """A list, tuple or frozenset of anything; a sequence becomes a list."""
    origin, kinds = list if _origin(hint) is Sequence else _origin(hint), get_args(hint)
    if not isinstance(value, list | tuple):
        raise TypeError(f"{json.dumps(value, default=str)[:40]}; expected list")
    if origin is tuple and kinds and kinds[-1] is not Ellipsis:
        if len(value) != len(kinds):
            raise TypeError(f"{json.dumps(value, default=str)[:40]}; expected {len(kinds)} entries")
    else:
        kinds = (kinds[0] if kinds else Any,) * len(value)
    return origin(
        _entry(converter, item, kind, f"[{i}]") for i, (item, kind) in enumerate(zip(value, kinds, strict=True))
    )


def _mapping(converter: Converter, value: Any, hint: Any) -> Any:
    """A dict of anything, whose keys may be whole numbers, which JSON turns into text."""
    key_kind, kind = get_args(hint) or (str, Any)
    if not isinstance(value, dict):
        raise TypeError(f"{json.dumps(value, default=str)[:40]}; expected a JSON object")
    entries = {k: _entry(converter, v, kind, str(k)) for k, v in value.items()}
    return {int(k): v for k, v in entries.items()} if key_kind is int else entries


def _is_named_tuple(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, tuple) and hasattr(hint, "_fields")


def _named_tuple(converter: Converter, value: Any, kind: Any) -> Any:
    """A named tuple, from a list of its values or from an object of them."""
    if isinstance(value, dict):
        value = [_inside(value, name)[0] for name in kind._fields if name in value]
    hints = get_type_hints(kind)
    return kind(*_items(converter, value, tuple[tuple(hints[name] for name in kind._fields)]))  # type: ignore[misc]


def _is_choice(hint: Any) -> bool:
    """Whether a hint is a union in which one kind is an array."""
    return get_origin(hint) in (UnionType, Union) and any(_origin(kind) in (list, tuple) for kind in get_args(hint))


def _choice(converter: Converter, value: Any, hint: Any) -> Any:
    """A union of a number and an array: which of them it is, JSON tells."""
    kinds = [kind for kind in get_args(hint) if kind is not NoneType]
    if value is None and len(kinds) < len(get_args(hint)):
        return None
    is_array = isinstance(value, list | tuple)
    return converter.structure(value, next(kind for kind in kinds if (_origin(kind) in (list, tuple)) == is_array))


def _entry(converter: Converter, value: Any, kind: Any, step: str) -> Any:
    try:
        return converter.structure(value, kind)
    except Exception as error:  # see ``_structure``
        raise _bad_field(error, step) from None


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


def _problem(error: BaseException) -> str:
    if isinstance(error, KeyError):
        return "missing"
    if isinstance(error, TypeError) and "; expected" in str(error):
        return str(error)
    return f"not what was expected ({type(error).__name__})"
