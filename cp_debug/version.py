"""The version of cpdebug, and the commit it was built from."""

from __future__ import annotations

import subprocess
from pathlib import Path

__version__ = "0.1.0"


def commit() -> str:
    """Short hash of the commit, with ``-dirty`` where files were changed; empty where nothing tells.

    An installed package has it in ``commit.txt``, which ``setup.py`` wrote; a checkout asks git.
    """
    package = Path(__file__).parent
    if (written := package / "commit.txt").is_file():
        return written.read_text(encoding="utf-8").strip()
    root = package.parent
    command = ["git", f"--git-dir={root / '.git'}", f"--work-tree={root}", "describe", "--always", "--dirty"]
    try:
        done = subprocess.run([*command, "--abbrev=10"], capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def full() -> str:
    """The version, and the commit in brackets where it is known."""
    built = commit()
    return __version__ + f" (commit {built})" * bool(built)
