"""Runs every command of ``tutorial.md`` again, and complains about lines that are no longer printed.

    python docs/tutorial.py            # check; exit 1 when the page is out of date
    python docs/tutorial.py --write    # put today's numbers into the page

A console block is a command and some lines of its output, in order; ``⋮`` stands for any others. Without any line the
block gets the whole output. Lines are the same when they are alike but for numbers, and none of these is off by more
than a factor of 2; below 1e-6 all are rounding.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

PAGE = Path(__file__).with_name("tutorial.md")
CUT = "⋮"
WIDTH = 130
_BLOCK = re.compile(r"```console\n\$ (?P<command>.*)\n(?P<output>(?:.*\n)*?)```")
_FILE = re.compile(r"```(?:python|yaml)\n# (?P<name>\S+\.(?:py|yaml))\n(?P<text>(?:.*\n)*?)```")
_NUMBER = re.compile(r"(?<![\w.])[-+]?\d+(?:\.\d+)?(?:e[-+]\d+)?(?![\w.]*[A-Za-z_])")


def blocks(page: str) -> list[tuple[str, list[str]]]:
    """(command, lines) of every console block."""
    return [(m["command"], m["output"].splitlines()) for m in _BLOCK.finditer(page)]


def write_files(page: str, folder: Path) -> None:
    """The page's Python files, for its commands to read."""
    for found in _FILE.finditer(page):
        (folder / found["name"]).write_text(found["text"], encoding="utf-8")


def run(command: str, folder: Path) -> list[str]:
    """What a command of the page prints. Raises RuntimeError for an exit code other than 0 and 1."""
    command = re.sub(r"(^|&& )cpdebug\b", rf"\1{sys.executable} -m cp_debug", command)
    command = re.sub(r"(^|&& )python\b", rf"\1{sys.executable}", command)
    root = str(PAGE.resolve().parents[1])
    environment = os.environ | {"COLUMNS": str(WIDTH), "PYTHONPATH": root}
    done = subprocess.run(command, shell=True, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode not in (0, 1):
        raise RuntimeError(f"{command}: exit code {done.returncode}\n{done.stderr}")
    return [line.rstrip() for line in done.stdout.splitlines()]


def updated(lines: list[str], printed: list[str]) -> Iterator[tuple[str, bool]]:
    """Each line of a block as it is printed now, and whether it still holds; a line that is not found is kept."""
    start = 0
    for line in lines or [text for text in printed if text]:
        if line in (CUT, ""):
            yield line, True
            continue
        alike = [i for i in range(start, len(printed)) if _words(printed[i]) == _words(line)]
        if not alike:
            yield line, False
            continue
        place = next((i for i in alike if _close(line, printed[i])), alike[0])
        start = place + 1
        yield printed[place], bool(lines) and _close(line, printed[place])


def _words(line: str) -> str:
    return " ".join(_NUMBER.sub("0", line).split())


def _close(before: str, now: str) -> bool:
    pairs = zip(_NUMBER.finditer(before), _NUMBER.finditer(now), strict=True)
    sizes = ((abs(float(a[0])), abs(float(b[0])), _rounding(before[a.end() :])) for a, b in pairs)
    return all(a <= 2 * b + least and b <= 2 * a + least for a, b, least in sizes)


def _rounding(unit: str) -> float:
    """What another processor may change of a number, by what follows it: metres are differences of coordinates of up to
    54 m, which FP32 rounds to 3.8e-6."""
    return 1e-5 if re.match(" m( in|$|;)", unit) else 1e-6


def main() -> int:
    """Check or rewrite the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--write", action="store_true", help="put today's numbers into the page")
    options = parser.parse_args()
    page, wrong = PAGE.read_text(encoding="utf-8"), 0
    with tempfile.TemporaryDirectory(prefix="tutorial-") as name:
        write_files(page, Path(name))
        for command, lines in blocks(page):
            found = list(updated(lines, run(command, Path(name))))
            for line in (line for line, holds in found if not holds):
                print(f"{command}: {line}")
                wrong += 1
            before, after = ("".join(f"{line}\n" for line in text) for text in (lines, (line for line, _ in found)))
            page = page.replace(f"$ {command}\n{before}```", f"$ {command}\n{after}```")
    if options.write:
        PAGE.write_text(page, encoding="utf-8")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
