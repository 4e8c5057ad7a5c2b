"""YAML, TOML and JSON files as plain documents."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

from cp_debug.errors import DAMAGED, Damage, InputError, library_reason
from cp_debug.reading import parse_json, plain, read_text

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_OF_FILE = re.compile(r"\{\{\s*(?P<name>fileDirname|fileBasenameNoExtension|fileBasename|fileExtname)\s*\}\}")
_OF_ENVIRONMENT = re.compile(r"\{\{['\"]?\s*\$(?P<name>\w+)\s*(?::\s*(?P<default>[^\s}]*?))?\s*['\"]?\}\}")
SUFFIXES = (".yaml", ".yml", ".toml", ".json")


def settings_text(path: Path, what: str = "configuration") -> str:
    """The text of a file of settings, in which mmengine's variables in double braces have their values.

    They are ``{{ fileDirname }}``, ``fileBasename``, ``fileBasenameNoExtension``, ``fileExtname``, and
    ``{{$NAME:default}}`` of the environment. Raises InputError as ``read_text`` does, and for a variable that the
    environment lacks and that has no default.
    """
    text = read_text(path, what=what)
    whole = path.expanduser().absolute()
    values = {
        "fileDirname": str(whole.parent),
        "fileBasename": whole.name,
        "fileBasenameNoExtension": whole.stem,
        "fileExtname": whole.suffix,
    }

    def of_environment(found: re.Match[str]) -> str:
        value = os.environ.get(found["name"]) or found["default"]
        if not value:
            raise InputError(f"{path}: {found[0]}: the environment has no {found['name']}, and no default is given")
        return value

    text = _OF_FILE.sub(lambda found: values[found["name"]], text)
    return _OF_ENVIRONMENT.sub(of_environment, text)


def read_document(path: Path, what: str = "configuration") -> Any:
    """The document in a YAML, TOML or JSON file, of text, numbers, lists and tables; ``what`` names it in messages.

    Raises InputError, which names the file, for anything else, and for a key that stands twice in one table.
    """
    text = settings_text(path, what)
    if path.suffix == ".json":
        return plain(parse_json(text, str(path), unique=True), str(path))
    kind = "TOML" if path.suffix == ".toml" else "YAML"
    try:
        document = tomllib.loads(text) if kind == "TOML" else _yaml(text)
    except RecursionError:
        raise InputError(f"{path}: not {kind} that can be read (nested too deep)") from None
    except Damage as error:
        raise InputError(f"{path}: not {kind} ({error})") from None
    except Exception as error:  # PyYAML lets through what dates, numbers and keys raise that are none
        raise InputError(f"{path}: not {kind} ({library_reason(error) or DAMAGED})") from None
    return plain(document, str(path))


def _yaml(text: str) -> Any:
    """Plain YAML in which a date is the text that it looks like, and no key of a table stands twice."""
    import yaml

    try:
        return _load(text)
    except yaml.MarkedYAMLError as error:
        raise Damage(" ".join(str(error).replace('"<unicode string>", ', "").split())[:300]) from None


def _load(text: str) -> Any:
    import yaml

    class Loader(yaml.SafeLoader):
        def compose_mapping_node(self, anchor: Any) -> Any:
            node = super().compose_mapping_node(anchor)
            keys = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
            seen: set[str] = set()
            for key in keys:
                if key.value in seen:
                    raise yaml.MarkedYAMLError(problem=f"{key.value!r} is set twice", problem_mark=key.start_mark)
                seen.add(key.value)
            return node

    Loader.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    return yaml.load(text, Loader)  # a SafeLoader
