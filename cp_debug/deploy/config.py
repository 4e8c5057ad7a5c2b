"""Configuration of ``cpdebug deploy``: one YAML or TOML file, or another team's configuration through a plug-in.

A plug-in of the group ``cpdebug.configs`` is a callable that takes the file's path and returns the document as the
schema has it, with lines for people as ``notes``, or None for a file that is not its own. AWML's ``deploy_config.py``
is read by one.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import reduce
from pathlib import Path
from typing import Any

from cp_debug import plugins
from cp_debug.deploy.schema import DeployConfig, validate
from cp_debug.errors import InputError
from cp_debug.reading import plain, read_text

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


_OWN = (".yaml", ".yml", ".toml")


def load_config(path: Path) -> DeployConfig:
    """Read a configuration from ``.yaml``, ``.toml``, or a file that a plug-in reads.

    Raises InputError, which names the file, the key and what was expected.
    """
    if path.suffix in _OWN:
        return validate(DeployConfig, _document(path), path)
    first: InputError | None = None
    for plugin in plugins.names(plugins.CONFIGS).values():
        try:
            read = plugin.load()
            with plugin.running():
                document = read(path)
        except InputError as error:  # another one may know what to do with the file
            first = first or error
            continue
        if document is not None:
            notes = document.pop("notes", ()) if isinstance(document, dict) else ()
            return validate(DeployConfig, document, path).with_notes(f"{path}: {note}" for note in notes)
    raise first or InputError(f"{path}: expected a .yaml, .toml or .py file")


def _document(path: Path) -> Any:
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


def override(config: DeployConfig, overrides: Mapping[str, Any]) -> DeployConfig:
    """Put values of the command line (``verify.samples`` → value) over those of the file; None leaves the file's.

    Raises InputError for a value that does not fit.
    """
    document = config.model_dump(exclude_unset=True)
    for key, value in overrides.items():
        if value is not None:
            *sections, name = key.split(".")
            reduce(lambda section, key: section.setdefault(key, {}), sections, document)[name] = value
    return validate(DeployConfig, document, "command line").with_notes(config.notes)
