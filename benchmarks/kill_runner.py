"""A build whose runner is killed half-way: what the command says, and what it leaves in its cache.

    python benchmarks/kill_runner.py FOLDER COMMAND …      # ``--cache FOLDER/cache`` is added to the command

Kills (SIGKILL) the process that builds the engine once it has told its first progress, then runs the command again
undisturbed. Linux only.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

RUNNER = "tensorrt/runner.py"
AFTER = 8.0
"""Seconds of building before it is killed."""


def runners(parent: int) -> list[int]:
    """Process ids of the runners below ``parent``."""
    found: list[int] = []
    children = Path(f"/proc/{parent}/task")
    for task in children.iterdir() if children.exists() else ():
        for child in map(int, (task / "children").read_text().split()):
            command = Path(f"/proc/{child}/cmdline").read_bytes().decode(errors="replace")
            found += [child] if RUNNER in command else runners(child)
    return found


def main() -> None:
    folder, command = Path(sys.argv[1]), [*sys.argv[2:], "--cache", str(Path(sys.argv[1]) / "cache")]
    folder.mkdir(parents=True, exist_ok=True)
    process = subprocess.Popen(command)
    first: dict[int, float] = {}
    while process.poll() is None:
        now = time.monotonic()
        for runner in runners(process.pid):
            if now - first.setdefault(runner, now) > AFTER:
                os.kill(runner, signal.SIGKILL)
                print(f"-- killed {runner} after {AFTER:.0f} s", flush=True)
                first[runner] = float("inf")
        time.sleep(0.2)
    left = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    print(f"-- exit status {process.returncode}; left: {left}", flush=True)
    again = subprocess.run(command, check=False)
    print(f"-- again: exit status {again.returncode}", flush=True)


if __name__ == "__main__":
    main()
