"""``python -m cp_debug`` is the command ``cpdebug``."""

from cp_debug.cli.main import main

main()
