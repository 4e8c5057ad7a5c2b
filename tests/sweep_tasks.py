"""Tasks for the tests of the queue: tiny, slow, failing, deadly."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def tiny(params: Mapping[str, Any]) -> dict[str, Any]:
    """The square."""
    return {"square": params["i"] ** 2}


def slow(params: Mapping[str, Any]) -> dict[str, Any]:
    """The square, after a while; leaves a note of who is at it."""
    Path(params["folder"], f"{params['i']}.pid").write_text(str(os.getpid()))
    time.sleep(params["seconds"])
    return tiny(params)


def failing(params: Mapping[str, Any]) -> dict[str, Any]:
    """Fails for odd numbers."""
    if params["i"] % 2:
        raise ValueError(f"{params['i']} is odd")
    return tiny(params)


def deadly(params: Mapping[str, Any]) -> dict[str, Any]:
    """Kills its worker for those that are ``poison``, and says so before."""
    with Path(params["folder"], f"{params['i']}.tries").open("a") as stream:
        stream.write("x")
    if params["i"] in params["poison"]:
        os.kill(os.getpid(), signal.SIGKILL)
    return tiny(params)
