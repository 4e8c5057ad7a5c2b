"""YAML and TOML files as plain documents."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from cp_debug.errors import InputError
from cp_debug.reading import plain, read_text

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

SUFFIXES = (".yaml", ".yml", ".toml")


def read_document(path: Path) -> Any:
    """The document in a YAML or TOML file, of text, numbers, lists and tables.

    Raises InputError, which names the file, for anything else.
    """
    text = read_text(path, what="configuration")
    kind = "TOML" if path.suffix == ".toml" else "YAML"
    try:
        document = tomllib.loads(text) if kind == "TOML" else _yaml(text)
    except RecursionError:
        raise InputError(f"{path}: not {kind} that can be read (nested too deep)") from None
    except Exception as error:  # PyYAML lets through what dates, numbers and keys raise that are none
        raise InputError(f"{path}: not {kind} ({' '.join(str(error).split())[:300]})") from None
    return plain(document, str(path))


def _yaml(text: str) -> Any:
    """Plain YAML in which a date is the text that it looks like."""
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    Loader.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    return yaml.load(text, Loader)  # a SafeLoader
