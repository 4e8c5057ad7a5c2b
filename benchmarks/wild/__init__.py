"""cpdebug on networks in the wild: ``run.py`` tells how."""
