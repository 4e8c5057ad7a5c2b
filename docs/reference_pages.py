"""The reference pages of the site, made from the code when the site is built: Python, command line, JSON results."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import re
import types
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

NUMBER = {"anyOf": [{"type": "number"}, {"enum": ["NaN", "Infinity", "-Infinity"]}]}
PLAIN = {str: {"type": "string"}, bool: {"type": "boolean"}, int: {"type": "integer"}, float: NUMBER}
DOCUMENTS = {
    "bisect": ("bisect.result.BisectResult", "`cpdebug bisect --json`, `result.json` of `--save`"),
    "diff": ("bisect.result_diff.ResultDiff", "`cpdebug diff --json`"),
    "import": ("bisect.import_dump.ImportedDump", "`cpdebug import --json`"),
    "prediction": ("prediction.result.Prediction", "`cpdebug predict --json`"),
    "search": ("mixed_precision.result.MixedPrecisionResult", "`cpdebug search --json`"),
    "sensitivity": ("mixed_precision.sensitivity.SensitivityProfile", "`cpdebug quantize sensitivity --json`"),
    "verify": ("deploy.verify.VerifyResult", "`cpdebug verify --json`"),
    "evaluation": ("detection.evaluation.EvaluationResult", "`cpdebug eval --json`"),
    "ptq": ("deploy.quantize_output.PtqResult", "`cpdebug quantize ptq --json`"),
    "qat": ("quantization.qat.QatResult", "`cpdebug quantize qat --json`"),
    "sweep": ("sweep.run.SweepResult", "`cpdebug sweep --json`"),
}
"""Name of a document → the dataclass behind it, in the package, and what writes it."""
GROUPS = {
    "Find a layer": ["diagnose", "assert_agree", "compare_tensors", "compare"],
    "Before and after": ["predict", "search", "verify", "evaluate", "quantize"],
    "Results that were kept": ["open_result", "diff_results", "Capture"],
    "Results": [
        "BisectResult",
        "Prediction",
        "MixedPrecisionResult",
        "VerifyResult",
        "EvaluationResult",
        "PtqResult",
    ],
    "Options": [
        "Options",
        "Reading",
        "PredictOptions",
        "MixedPrecisionOptions",
        "VerifyOptions",
        "EvaluationOptions",
        "ExportOptions",
    ],
    "Errors": ["CpdebugError", "InputError", "BackendUnavailable", "MissingPackage"],
}
"""Section of the Python page → the public names in it, in the order in which they are met."""


INTERNAL = {"derived", "fields_from", "completed"}
"""Methods by which a result is written and read."""


def pages() -> dict[str, str]:
    """Path in the site → text: the three pages, and a JSON Schema for each document."""
    made = {"reference/python.md": python_page(), "reference/cli.md": cli_page(), "reference/json.md": json_page()}
    return made | {
        f"reference/{name}.schema.json": json.dumps(schema(document_class(name)), indent=1) for name in DOCUMENTS
    }


def python_page() -> str:
    """Signature and docstring of every public name, and of what belongs to it."""
    import cp_debug

    lines = ["# Python", "", "`import cp_debug` has all of these. [From Python](../python.md) explains them.", ""]
    for title, names in GROUPS.items():
        lines += [f"## {title}", ""]
        for name in names:
            home = getattr(cp_debug, name)
            lines += _definition(_module(home.__module__)[home.__qualname__], f"### {name}")
    return "\n".join(lines)


def _definition(item: Any, heading: str) -> list[str]:
    """A function, class or property: heading, signature, docstring; the members of a class below it."""
    lines = [heading, ""]
    if item.is_function:
        lines += ["```python", _signature(item), "```", ""]
    if item.docstring:
        lines += [item.docstring.value, ""]
    if not item.is_class:
        return lines
    fields = [each for each in item.attributes.values() if _is_field(each)]
    if fields:
        lines += ["| field | type | what it says |", "|---|---|---|"]
        for each in fields:
            about = " ".join(each.docstring.value.split()) if each.docstring else ""
            default = f" Default: `{each.value}`." if each.value is not None and "field(" not in str(each.value) else ""
            lines.append(f"| `{each.name}` | `{_cell(each.annotation)}` | {_cell(about + default)} |")
        lines.append("")
    for each in item.attributes.values():
        if "property" in each.labels and not each.name.startswith("_"):
            about = " ".join(each.docstring.value.split()) if each.docstring else ""
            lines += [f"- **`.{each.name}`** → `{each.annotation}`: {about}"]
    lines.append("")
    for each in item.functions.values():
        if not each.name.startswith("_") and each.name not in INTERNAL:
            lines += _definition(each, f"#### {item.name}.{each.name}")
    return lines


def _is_field(item: Any) -> bool:
    return not item.name.startswith("_") and item.annotation is not None and "property" not in item.labels


def _signature(item: Any) -> str:
    """The signature with a parameter a line, where it is long."""
    parts: list[str] = []
    for parameter in item.parameters:
        if parameter.name in ("self", "cls"):
            continue
        if parameter.kind.value == "keyword-only" and "*" not in parts and not any(p.startswith("*") for p in parts):
            parts.append("*")
        stars = {"variadic positional": "*", "variadic keyword": "**"}.get(parameter.kind.value, "")
        text = f"{stars}{parameter.name}"
        text += f": {parameter.annotation}" if parameter.annotation is not None else ""
        text += f" = {parameter.default}" if parameter.default is not None and not stars else ""
        parts.append(text)
    returns = f" -> {item.returns}" if item.returns is not None else ""
    short = f"{item.name}({', '.join(parts)}){returns}"
    if len(short) <= 100:
        return short
    return "\n".join([f"{item.name}(", *(f"    {part}," for part in parts), f"){returns}"])


def _cell(text: Any) -> str:
    return str(text).replace("|", "\\|")


COMMANDS = {
    "Find the layer": ("demo", "bisect", "capture", "import", "compare"),
    "Before a run": ("check", "predict", "search", "export"),
    "INT8": ("quantize",),
    "Deployment": ("deploy", "build", "verify", "eval", "bench"),
    "Many samples": ("sweep",),
    "Results": ("report", "ui", "diff", "bundle"),
    "This installation": ("models", "cache", "doctor"),
}
"""Section of the page of commands → its commands, in the order in which they are met."""


def cli_page() -> str:
    """A table of all commands, then each with its arguments and options in the groups of its help.

    Raises ValueError where ``COMMANDS`` and the command line differ.
    """
    import click
    import typer

    from cp_debug.cli.main import app

    whole = typer.main.get_command(app)
    top = click.Context(whole, info_name="cpdebug")
    if sorted(whole.commands) != sorted(name for names in COMMANDS.values() for name in names):
        raise ValueError(f"COMMANDS of {__file__} are not those of cpdebug: {', '.join(sorted(whole.commands))}")
    tables, sections = list[str](), list[str]()
    for title, names in COMMANDS.items():
        sections += [f"## {title}", ""]
        for name in names:
            for context in _contexts(whole.commands[name], click.Context(whole.commands[name], top, name)):
                path = context.command_path.removeprefix("cpdebug ")
                about = _prose(context.command.get_short_help_str(200))
                tables.append(f"| {title} | [`{path}`](#{path.replace(' ', '-')}) | {about} |")
                sections += _command(context, path)
                title = ""
    return "\n".join(
        [
            "# Command line",
            "",
            "`cpdebug COMMAND --help` shows what matters most, `--help-all` everything, as it stands here.",
            "Exit codes: 0 agree, 1 a divergence, 2 bad usage or input, 3 a backend is missing, 70 an internal error.",
            "",
            "| | command | what it does |",
            "|---|---|---|",
            *tables,
            "",
            "`cpdebug --version` names the version and the commit; `cpdebug --verbose COMMAND` lets ONNX Runtime log.",
            "",
            *sections,
        ]
    )


def _contexts(command: Any, context: Any) -> Iterator[Any]:
    """The context of a command, or of each below a group of commands."""
    inner = getattr(command, "commands", None)
    if inner is None:
        yield context
        return
    for name, below in inner.items():
        yield from _contexts(below, type(context)(below, context, name))


def _command(context: Any, path: str) -> Iterator[str]:
    """Heading, text, usage, arguments and options of one command."""
    from cp_debug.cli.typed import grouped

    command = context.command
    usage = " ".join(command.collect_usage_pieces(context))
    yield from (f"### {path}", "", _prose(command.help or ""), "", "```sh", f"cpdebug {path} {usage}", "```", "")
    parameters = [p for p in command.get_params(context) if not getattr(p, "hidden", False) and p.name != "help"]
    arguments = [p for p in parameters if p.param_type_name == "argument"]
    options = grouped([p for p in parameters if p.param_type_name == "option"])
    for title, members in ({"Arguments": arguments} | options).items():
        records = [record for p in members if (record := p.get_help_record(context)) is not None]
        if records:
            yield from (f"| {title} | |", "|---|---|")
            yield from (f"| `{name}` | {_cell(_prose(text))} |" for name, text in records)
            yield ""


def _prose(text: str) -> str:
    """A help's text on one line as Markdown: outside of code, signs that Markdown or HTML would read stand as they
    are."""
    parts = " ".join(text.split()).split("`")
    plain = [re.sub(r"([*_\[\]])", r"\\\1", part).replace("<", "&lt;") for part in parts[::2]]
    parts[::2] = plain
    return "`".join(parts)


def json_page() -> str:
    """A table of keys for every object in the documents."""
    lines = [
        "# JSON results",
        "",
        "A result's JSON is its dataclass: a field is a key. `NaN`, `Infinity` and `-Infinity`, which JSON lacks, are",
        "strings. Documents also hold figures that follow from their fields; readers of a file need not expect them",
        "in another version, the keys below they may. `cp_debug.open_result` reads what `bisect --save` wrote.",
        "",
        "| document | written by | JSON Schema |",
        "|---|---|---|",
    ]
    shown: dict[type, None] = {}
    for name, (_, written) in DOCUMENTS.items():
        kind = document_class(name)
        lines.append(
            f"| [{kind.__name__}](#{kind.__name__.lower()}) | {written} | [{name}.schema.json]({name}.schema.json) |"
        )
        shown |= dict.fromkeys(parts_of(kind))
    for kind in shown:
        lines += [
            "",
            f"## {kind.__name__}",
            "",
            first_paragraph(kind),
            "",
            "| key | type | what it says |",
            "|---|---|---|",
        ]
        for key, field, hint in entries(kind):
            about = " ".join(field_texts(kind).get(field.name, "").split()).replace("|", "\\|")
            lines.append(f"| `{key}` | {in_words(hint, field)} | {about} |")
    return "\n".join([*lines, ""])


def document_class(name: str) -> type:
    """The dataclass behind a document."""
    module, _, kind = f"cp_debug.{DOCUMENTS[name][0]}".rpartition(".")
    found: type = getattr(importlib.import_module(module), kind)
    return found


def schema(kind: type) -> dict[str, Any]:
    """The JSON Schema (2020-12) of a result's document: its fields; figures that follow from them are allowed."""
    parts = parts_of(kind)
    names = {part.__name__: part for part in parts}
    assert len(names) == len(parts), "two dataclasses of one name"
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": kind.__name__,
        "$ref": f"#/$defs/{kind.__name__}",
        "$defs": {name: _object(part) for name, part in names.items()},
    }


def entries(kind: type, inside: bool = True) -> Iterator[tuple[str, dataclasses.Field[Any], Any]]:
    """Key, field and type of everything that is written of a dataclass, those of its inline parts included."""
    hints = get_type_hints(kind)
    for field in dataclasses.fields(kind):
        if field.metadata.get("omit") or not field.metadata.get("written", True):
            continue
        if not field.metadata.get("inline"):
            yield field.metadata.get("key", field.name), field, hints[field.name]
        elif inside:
            yield from ((key, each, hint | None) for key, each, hint in entries(_only(hints[field.name])))


def parts_of(kind: type) -> list[type]:
    """The dataclass, and all that its fields hold, each once."""
    found: dict[type, None] = {}

    def visit(hint: Any) -> None:
        if dataclasses.is_dataclass(hint) and isinstance(hint, type) and hint not in found:
            found[hint] = None
            for _, _, inner in entries(hint):
                visit(inner)
        for inner in get_args(hint):
            visit(inner)

    visit(kind)
    return list(found)


def _object(kind: type) -> dict[str, Any]:
    properties: dict[str, Any] = {}
    own = {field.name for field in dataclasses.fields(kind) if not field.metadata.get("inline")}
    required = []
    for key, field, hint in entries(kind):
        value = _type(hint)
        if "one_of" in field.metadata:
            value = {"enum": list(field.metadata["one_of"])}
        if "absent" in field.metadata:
            value = {}  # written in place of None
        if about := " ".join(field_texts(kind).get(field.name, "").split()):
            value = {**value, "description": about}
        place, *rest = key.split(".")
        if rest:
            section = properties.setdefault(place, {"type": "object", "properties": {}})
            section["properties"][".".join(rest)] = value
        else:
            properties[place] = value
        no_default = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if field.name in own and no_default and place not in required:
            required.append(place)
    return {"type": "object", "description": first_paragraph(kind), "properties": properties, "required": required}


def _type(hint: Any) -> dict[str, Any]:
    origin, arguments = get_origin(hint) or hint, get_args(hint)
    if hint in PLAIN:
        return dict(PLAIN[hint])
    if origin in (Union, types.UnionType):
        return {"anyOf": [_type(each) for each in arguments]}
    if hint is type(None):
        return {"type": "null"}
    if dataclasses.is_dataclass(origin) and isinstance(origin, type):
        return {"$ref": f"#/$defs/{origin.__name__}"}
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return {"type": "object", "additionalProperties": _type(arguments[1]) if arguments else {}}
    if isinstance(origin, type) and issubclass(origin, list | frozenset | set | Sequence):
        uniform = len(arguments) == 1 or (len(arguments) == 2 and arguments[1] is Ellipsis)
        return {"type": "array", "items": _type(arguments[0])} if uniform else {"type": "array"}
    return {}


def in_words(hint: Any, field: dataclasses.Field[Any] | None = None) -> str:
    """A type as the table of keys shows it, with links to the objects."""
    if field is not None and "one_of" in field.metadata:
        return " \\| ".join(f"`{each}`" for each in field.metadata["one_of"])
    origin, arguments = get_origin(hint) or hint, get_args(hint)
    if hint in PLAIN:
        return {str: "text", bool: "true, false", int: "integer", float: "number"}[hint]
    if origin in (Union, types.UnionType):
        kinds = [in_words(each) for each in arguments if each is not type(None)]
        return " or ".join([*kinds, *(["null"] if type(None) in arguments else [])])
    if dataclasses.is_dataclass(origin) and isinstance(origin, type):
        return f"[{origin.__name__}](#{origin.__name__.lower()})"
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return f"object of {in_words(arguments[1])}" if arguments else "object"
    if isinstance(origin, type) and issubclass(origin, list | tuple | frozenset | set | Sequence):
        kinds = list(dict.fromkeys(in_words(each) for each in arguments if each is not Ellipsis))
        return f"list of {', '.join(kinds)}" if kinds else "list"
    return "anything"


def first_paragraph(kind: type) -> str:
    """The start of a class's docstring, on one line."""
    return " ".join((inspect.getdoc(kind) or "").split("\n\n")[0].split())


def field_texts(kind: type) -> dict[str, str]:
    """Field → the docstring below it, in the class or in those that are inline or inherited."""
    from griffe import Attribute

    texts: dict[str, str] = {}
    for base in [*reversed(kind.__mro__), *(_only(hint) for hint in _inline(kind))]:
        if dataclasses.is_dataclass(base) and isinstance(base, type):
            members = _module(base.__module__)[base.__qualname__].members
            texts |= {
                name: member.docstring.value
                for name, member in members.items()
                if isinstance(member, Attribute) and member.docstring
            }
    return texts


@cache
def _module(name: str) -> Any:
    """The text of a module, as griffe reads it."""
    import griffe

    file = Path(str(importlib.import_module(name).__file__))
    return griffe.visit(name, filepath=file, code=file.read_text(encoding="utf-8"))


def _inline(kind: type) -> list[Any]:
    hints = get_type_hints(kind)
    return [hints[field.name] for field in dataclasses.fields(kind) if field.metadata.get("inline")]


def _only(hint: Any) -> Any:
    """The dataclass in the hint ``Part`` or ``Part | None``."""
    return next((argument for argument in get_args(hint) if dataclasses.is_dataclass(argument)), hint)
