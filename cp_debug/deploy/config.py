"""What ``cpdebug deploy`` is told: one YAML or TOML file, or another team's configuration through a plug-in.

A plug-in of the group ``cpdebug.configs`` is a callable that takes the file's path and returns the document as the
schema has it, or None for a file that is not its own. AWML's ``deploy_config.py`` is read by one.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

from cp_debug import plugins
from cp_debug.deploy.schema import DeployConfig, validate
from cp_debug.errors import InputError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


_OWN = (".yaml", ".yml", ".toml")


def load_config(path: Path) -> DeployConfig:
    """Read ``.yaml``, ``.toml``, or what a plug-in reads.

    Raises InputError: the file, the key and what was expected.
    """
    if path.suffix in _OWN:
        return validate(DeployConfig, _document(path), path)
    for name in plugins.names(plugins.CONFIGS):
        if (document := plugins.load(plugins.CONFIGS, name)(path)) is not None:
            return validate(DeployConfig, document, path)
    raise InputError(f"{path}: expected a .yaml, .toml or .py file")


def _document(path: Path) -> Any:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    if path.suffix == ".toml":
        try:
            return tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise InputError(f"{path}: not TOML ({error})") from None
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not YAML ({' '.join(str(error).split())})") from None


def override(config: DeployConfig, given: Mapping[str, Any]) -> DeployConfig:
    """What the command line gives (``verify.samples`` → value) over what the file says; None leaves that. Raises
    InputError."""
    document = config.model_dump()
    for key, value in given.items():
        if value is not None:
            *sections, name = key.split(".")
            reduce(getitem, sections, document)[name] = value
    return validate(DeployConfig, document, "command line")
