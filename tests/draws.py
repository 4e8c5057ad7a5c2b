"""Random numbers for tests, not for constants of their files: every test begins with the same, whichever ran before."""

from __future__ import annotations

import numpy as np

RNG = np.random.default_rng(0)


def begin(seed: int = 0) -> None:
    """Let the generator begin anew; conftest.py does it before each test."""
    RNG.bit_generator.state = np.random.default_rng(seed).bit_generator.state
