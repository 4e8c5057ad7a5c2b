"""A command on this processor and on poorer ones: without VNNI, and without AVX-512 too.

    python benchmarks/processors/run.py vnni python benchmarks/healthy.py --json healthy.json

``hide.c`` says how; it takes gcc, and an Intel processor whose CPUID can be trapped (Linux: flag ``cpuid_fault``).
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

HIDDEN = ("nothing", "vnni", "avx512")


def environment(hidden: str, folder: Path) -> dict[str, str]:
    """Variables with which programs do not see an instruction set; the library is built into ``folder``."""
    if hidden == "nothing":
        return dict(os.environ)
    source, library = Path(__file__).with_name("hide.c"), folder / "hide.so"
    subprocess.run(["gcc", "-O1", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    return {**os.environ, "HIDE": hidden, "LD_PRELOAD": str(library)}


def main() -> int:
    """Run the command; returns its exit code."""
    if len(sys.argv) < 3 or sys.argv[1] not in HIDDEN:
        sys.exit(f"usage: run.py {'|'.join(HIDDEN)} COMMAND …")
    with tempfile.TemporaryDirectory() as folder:
        return subprocess.run(sys.argv[2:], env=environment(sys.argv[1], Path(folder)), check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
