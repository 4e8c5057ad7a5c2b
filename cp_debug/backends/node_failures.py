"""Reasons why a node could not be computed, in words about the file: which rule of its operator it breaks."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from torch import Tensor

from cp_debug.backends.kernels import KERNELS
from cp_debug.backends.kernels.registry import schema_of
from cp_debug.errors import CpdebugError, library_reason
from cp_debug.graph.graph import Node
from cp_debug.safe_text import amount

_OPTION = onnx.defs.OpSchema.FormalParameterOption
_KINDS = {"b": "booleans", "i": "integers", "u": "integers", "f": "floats", "c": "complex numbers"}
_TYPES = {"bool": "booleans", "string": "strings", "complex64": "complex numbers", "complex128": "complex numbers"}


def described(value: Any) -> str:
    """A node's input as messages tell it: ``float32[2, 3]``, ``sequence of 2``, ``absent``."""
    if value is None:
        return "absent"
    if isinstance(value, list):
        return f"sequence of {len(value)}"
    name = "string" if _kind(value) == "strings" else str(value.dtype).removeprefix("torch.")
    return f"{name}{list(value.shape)}"


def reason(node: Node, opsets: Mapping[str, int], inputs: Sequence[Any], error: Exception) -> str:
    """Reason why ``node`` could not be computed on ``inputs`` (None for an absent one; none where it did not run).

    The first rule of the operator that the node breaks; else what ``error`` says, unless it speaks of Python's objects.
    """
    if isinstance(error, CpdebugError):
        return library_reason(error)
    broken = next(_broken(node, opsets, inputs), "")
    return broken or _in_words(error) or "its inputs, attributes and bodies do not fit together"


def _in_words(error: Exception) -> str:
    text = str(error)
    if "size of tensor" in text or "broadcast" in text:
        return "the shapes of its inputs do not fit together"
    return library_reason(error).partition(", schema.has_function")[0]


def _broken(node: Node, opsets: Mapping[str, int], inputs: Sequence[Any]) -> Iterator[str]:
    """The rules that ``node`` breaks, one sentence each."""
    domain = "" if node.proto.domain == "ai.onnx" else node.proto.domain
    if not onnx.defs.has(node.proto.op_type, domain):
        yield from _missing(node, inputs)
        return
    schema = schema_of(node.proto, opsets.get(domain, 1))
    if schema is None:
        return
    given = len(node.proto.input)
    if not schema.min_input <= given <= schema.max_input:
        low, high = schema.min_input, min(schema.max_input, 2**31 - 1)
        least = f"{low}" if low == high else f"{low} or more" if high == 2**31 - 1 else f"{low} to {high}"
        yield f"it has {amount(given, 'input')}; expected {least}"
    for place, (name, formal) in enumerate(zip(node.proto.input, _formals(schema, given), strict=False)):
        if not name and formal.option == _OPTION.Single:
            yield f"its input {place} ({formal.name}) is absent; expected one"
        elif place < len(inputs) and inputs[place] is not None:
            yield from _wrong_type(place, formal, inputs[place])
    yield from _wrong_attributes(node.proto, schema)
    yield from _differing(schema, inputs)


def _missing(node: Node, inputs: Sequence[Any]) -> Iterator[str]:
    """Inputs that an operator without a schema lacks, as its kernel says."""
    kernel = KERNELS.get(node.op)
    if kernel is None or not inputs:
        return
    for place, value in enumerate(inputs):
        if value is not None and not isinstance(value, Tensor):
            yield f"its input {place} is {described(value)}; expected numbers that torch computes with"
    wanted = [*inspect.signature(kernel.function).parameters.values()][1:]
    if not any(p.kind is p.VAR_POSITIONAL for p in wanted) and len(inputs) > len(wanted):
        yield f"it has {amount(len(inputs), 'input')}; expected {len(wanted)} at most"
    for place, parameter in enumerate(wanted):
        needed = parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        optional = "None" in str(parameter.annotation)
        if needed and not optional and (place >= len(inputs) or inputs[place] is None):
            yield f"its input {place} ({parameter.name}) is absent; expected one"


def _formals(schema: onnx.defs.OpSchema, count: int) -> list[Any]:
    """The schema's input at each place; the last one of a variadic operator is repeated."""
    formals = list(schema.inputs)
    if formals and formals[-1].option == _OPTION.Variadic:
        formals += formals[-1:] * (count - len(formals))
    return formals


def _wrong_type(place: int, formal: Any, value: Any) -> Iterator[str]:
    if any(text.startswith("optional(") for text in formal.types):
        return
    allowed = {_said(text) for text in formal.types}
    if _kind(value) not in allowed:
        wanted = " or ".join(sorted(allowed))
        yield f"its input {place} ({formal.name}) is {described(value)}; expected {wanted}"


def _differing(schema: onnx.defs.OpSchema, inputs: Sequence[Any]) -> Iterator[str]:
    """Inputs that should be of one type and are not. Types are those in which values are held."""
    first: dict[str, tuple[int, Any]] = {}
    for place, (formal, value) in enumerate(zip(_formals(schema, len(inputs)), inputs, strict=False)):
        if value is None or isinstance(value, list) or not formal.is_homogeneous:
            continue
        before, other = first.setdefault(formal.type_str, (place, value))
        if str(other.dtype) != str(value.dtype) and _kind(value) != "strings":
            yield f"its inputs {before} and {place} are of different types; expected one"


def _wrong_attributes(proto: onnx.NodeProto, schema: onnx.defs.OpSchema) -> Iterator[str]:
    given = {attribute.name: attribute for attribute in proto.attribute}
    kinds = onnx.AttributeProto.AttributeType
    for name, wanted in schema.attributes.items():
        if name not in given:
            if wanted.required:
                yield f"its attribute {name!r} is missing"
        elif given[name].type and given[name].type != wanted.type.value and not given[name].ref_attr_name:
            is_, expected = kinds.Name(given[name].type).lower(), wanted.type.name.lower()
            yield f"its attribute {name!r} is of the type {is_}; expected {expected}"


def _kind(value: Any) -> str:
    """Contents of a value, in the words of ``_said``."""
    if isinstance(value, list):
        return "a sequence"
    if isinstance(value, Tensor):
        if value.is_complex():
            return "complex numbers"
        name = str(value.dtype).removeprefix("torch.")
        return "booleans" if name == "bool" else "floats" if value.is_floating_point() else "integers"
    dtype = np.asarray(value).dtype
    if dtype.kind in "OSU":
        return "strings"
    return _KINDS.get(dtype.kind) or ("integers" if "int" in dtype.name else "floats")


def _said(text: str) -> str:
    """A type of a schema, such as ``tensor(float16)``, in words: floats."""
    if not text.startswith("tensor("):
        return f"a {text.partition('(')[0].replace('seq', 'sequence')}"
    name = text.removeprefix("tensor(").removesuffix(")")
    return _TYPES.get(name) or ("integers" if "int" in name else "floats")
