"""The version of cpdebug."""

__version__ = "0.1.0"
