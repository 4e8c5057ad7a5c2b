"""A reader of the team's own deploy files, ``*.team.json``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cp_debug.errors import InputError
from cp_debug.reading import read_text

SUFFIX = ".team.json"


def read(path: Path) -> dict[str, Any] | None:
    """The file as cpdebug's own document (``docs/deploy.md``), or None for a file that is not the team's.

    Raises InputError for one that cannot be read. cpdebug checks what is returned as it checks a file of its own.
    """
    if not path.name.endswith(SUFFIX):
        return None
    try:
        team = json.loads(read_text(path, what="configuration"))
        return {
            "model": team["network"],
            "work_dir": team["output"],
            "verify": {"samples": team.get("frames", 1)},
            "evaluate": {"enabled": False},  # the team's networks classify: there are no boxes to score
        }
    except (ValueError, TypeError) as error:
        raise InputError(f"{path}: not a configuration of the team ({error})") from None
    except KeyError as key:
        raise InputError(f"{path}: {key.args[0]} is missing") from None
