"""Configuration of ``cpdebug deploy``: one YAML, TOML or JSON file, or another team's configuration through a plug-in.

A plug-in of the group ``cpdebug.configs`` is a callable that takes the file's path and returns the document as the
schema has it, with lines for people as ``notes``, or None for a file that is not its own. AWML's ``deploy_config.py``
is read by one.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce
from pathlib import Path
from typing import Any

from cp_debug import plugins
from cp_debug.deploy.awml import awml_document, is_awml
from cp_debug.deploy.documents import SUFFIXES, read_settings
from cp_debug.deploy.schema import DeployConfig, validate
from cp_debug.errors import InputError


def load_config(path: Path) -> DeployConfig:
    """Read a configuration from ``.yaml``, ``.toml``, ``.json``, or a file that a plug-in reads.

    The first three may hold AWML's keys as well as this project's, and ``_base_``; plug-ins of others are asked about
    ``.json`` first. Raises InputError, which names the file, the key and what was expected.
    """
    if path.suffix in SUFFIXES and path.suffix != ".json":
        return _own(path)
    first: InputError | None = None
    for plugin in plugins.names(plugins.CONFIGS).values():
        if path.suffix in SUFFIXES and plugin.own:
            continue
        try:
            read = plugin.load()
            with plugin.running():
                document = read(path)
        except InputError as error:  # another one may know what to do with the file
            first = first or error
            continue
        if document is not None:
            return _with_notes(document, path)
    if path.suffix not in SUFFIXES:
        raise first or InputError(f"{path}: expected a .yaml, .toml, .json or .py file, whose `model` may be that")
    try:
        return _own(path)
    except InputError as error:
        raise first or error from None


def _own(path: Path) -> DeployConfig:
    """The configuration of a file with this project's keys, or AWML's."""
    settings = read_settings(path)
    if not is_awml(settings):
        return validate(DeployConfig, settings, path)
    return _with_notes(awml_document(settings, path), path)


def named_config(path: Path, recipe: str | None) -> DeployConfig:
    """The configuration in a file, which names a model; ``recipe`` replaces it. Raises InputError."""
    config = load_config(path)
    if recipe is not None:
        config = config.model_copy(update={"model": recipe})
    if config.model is None:
        raise InputError(f"{path}: model is missing; name one there or with --model, such as centerpoint:awml-base")
    return config


def _with_notes(document: Any, path: Path) -> DeployConfig:
    """The configuration of a document whose ``notes``, where it has some, are lines for people."""
    notes = document.pop("notes", ()) if isinstance(document, dict) else ()
    return validate(DeployConfig, document, path).with_notes(f"{path}: {note}" for note in notes)


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
