"""Tests that need more than ``.[dev]`` has: one marker, one sentence where it is missing.

``.ci/run`` runs them in an environment that has all of it, and holds that none of them is skipped there.
"""

from __future__ import annotations

from importlib.util import find_spec

import pytest

HOW = {
    "mmengine": "pip install '.[eval]' addict termcolor yapf, then pip install --no-deps mmengine==0.10.7",
    "axe_playwright_python": "pip install --no-deps axe-playwright-python==0.1.8",
    "griffe": "pip install '.[docs]'",
    "mkdocs": "pip install '.[docs]'",
    "nbclient": "pip install '.[docs]'",
    "openvino": "pip install '.[openvino]'",
    "modelopt": "pip install '.[quant]'",
    "transformers": "pip install '.[transformers]'",
    "nuscenes": "pip install '.[eval]', then pip install --no-deps nuscenes-devkit==1.2.0",
    "shapely": "pip install '.[eval]'",
}
"""Package → how to get it, in a checkout."""


def needs(package: str) -> pytest.MarkDecorator:
    """A mark for a test, or a module's ``pytestmark``: skipped where ``package``, one of ``HOW``, is not installed."""
    return pytest.mark.needs_extra(package, reason_of(package))


def module_needs(package: str) -> pytest.MarkDecorator:
    """The same for a module that imports the package at its top: it ends here where that is not installed."""
    if not installed(package):
        pytest.skip(reason_of(package), allow_module_level=True)
    return needs(package)


def installed(package: str) -> bool:
    """Whether the package can be found; it is not imported."""
    return find_spec(package) is not None


def reason_of(package: str) -> str:
    """The sentence that a skipped test gives."""
    return f"needs the package {package!r}: {HOW[package]}"
