"""Holds that nothing is skipped silently: ``python .ci/skips.py [--allow REASON]… JUNIT.xml…`` for the runs of .ci/run.

A test that is skipped in one run must have passed in another, or its reason begin as a line of ``skips.txt`` says.
Prints what passed and what was skipped; exit 1 for a skip that is not allowed.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from xml.etree import ElementTree

TABLE = Path(__file__).with_name("skips.txt")


def cases(report: Path) -> Iterator[tuple[str, str | None]]:
    """(test, why it was skipped or None) for each test of a JUnit file; a module that is skipped as a whole is one."""
    for case in ElementTree.parse(report).iter("testcase"):
        skipped = case.find("skipped")
        name = "::".join(filter(None, (case.get("classname"), case.get("name"))))
        yield name, None if skipped is None else skipped.get("message", "").removeprefix("Skipped: ")


def never_run(found: Iterable[tuple[str, str | None]]) -> dict[str, str]:
    """Test → why, for those that no run passed."""
    skipped, passed = {}, set()
    for name, reason in found:
        if reason is None:
            passed |= {name, name.partition("::")[0]}
        else:
            skipped[name] = reason
    return {name: reason for name, reason in skipped.items() if name not in passed}


def table(text: str) -> tuple[str, ...]:
    """How the reasons of ``skips.txt`` begin."""
    return tuple(line for line in text.splitlines() if line and not line.startswith("#"))


def complaints(skipped: dict[str, str], allowed: tuple[str, ...]) -> Iterator[str]:
    """A sentence for each reason that is not allowed, with the tests."""
    grouped: dict[str, list[str]] = {}
    for name, reason in skipped.items():
        if not reason.startswith(allowed):
            grouped.setdefault(reason, []).append(name)
    for reason, names in grouped.items():
        yield f"{len(names)} skipped everywhere, and {TABLE.name} does not allow it: {reason}: {', '.join(names)}"


def main() -> int:
    """Check the reports."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--allow", action="append", default=[], metavar="REASON", help="how an allowed reason begins")
    parser.add_argument("reports", nargs="+", type=Path, metavar="JUNIT.xml")
    options = parser.parse_args()
    found = []
    for report in options.reports:
        run = list(cases(report))
        skips = sum(why is not None for _, why in run)
        print(f"{report.stem}: {len(run) - skips} run, {skips} skipped")
        found += run
    skipped = never_run(found)
    for reason, count in Counter(skipped.values()).items():
        print(f"skipped everywhere: {count} × {reason}")
    wrong = list(complaints(skipped, (*table(TABLE.read_text(encoding="utf-8")), *options.allow)))
    print("\n".join(wrong), end="\n" * bool(wrong))
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
