"""``python -m cp_debug`` is the command ``cpdebug``."""

from __future__ import annotations

import sys

from cp_debug.cli.guard import guarded


def main() -> None:
    """Run the command line, and end with its exit code, also where a library ends the process."""
    guarded(run)


def run() -> None:
    """Run the command line in this process. Ctrl-C while it is still being loaded ends it as it does later."""
    try:
        from cp_debug.cli.main import main as command_line
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    command_line()


if __name__ == "__main__":
    main()
