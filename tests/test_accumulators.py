"""Sums as an H100 kept them: stored bits against the emulation."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
DATA = json.loads((ROOT / "docs/gpu/data/h100-accumulators.json").read_text())


@pytest.fixture(scope="module")
def bench() -> Any:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import accumulators

        yield accumulators
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))


@pytest.mark.few(4)
@pytest.mark.parametrize("length", [64, 512, 4096])
@pytest.mark.parametrize("kind", ["e4m3", "e5m2", "fp16", "bf16", "tf32"])
def test_the_emulation_gives_the_bits_of_the_hardware(bench: Any, kind: str, length: int) -> None:
    probe = bench.probe
    modes = [m for m in probe.modes(kind) if f"random-{kind}-{m}-{length}-2048-normal-{7 * length}" in DATA["raw"]]
    assert len(modes) >= 1 + (kind == "e5m2") + 3 * (kind == "e4m3")
    types = probe.KINDS[kind][:2]
    a, b = (
        probe.narrowed(probe.random_operand(7 * length + i, probe.SHOWN, length, "normal"), t).float()[: bench.RAW]
        for i, t in enumerate(types)
    )
    exact = (a.double() @ b.double().t()).numpy()
    for mode in modes:
        raw = DATA["raw"][f"random-{kind}-{mode}-{length}-2048-normal-{7 * length}"]
        measured = np.array(raw, np.uint32).view(np.float32)
        emulated = bench.model(kind, mode).matmul(a, b.t().contiguous())
        if mode.startswith(("row", "block")):
            emulated = emulated.bfloat16().float()
        np.testing.assert_array_equal(emulated.numpy(), measured, err_msg=mode)
        assert (measured != exact.astype(np.float32)).any()  # there is something to explain


def test_the_page_says_what_the_data_say() -> None:
    text = (ROOT / "docs/gpu/accumulators.md").read_text()
    whole = [p for p in DATA["products"] if p["size"] == 2048]
    assert {p["identical"] for p in whole} == {1.0}
    assert f"{len(whole)} of {len(whole)} products" in text
    layers = DATA["layers"]
    exact = sum(p["identical"] == 1.0 for p in layers)
    assert f"{exact} of {len(layers)}" in text
    assert min(p["identical"] for p in layers) > 0.999
    for kind, row in (("e4m3 fast", (13, 13)), ("fp16 plain", (25, 23)), ("tf32 plain", (25, 23))):
        assert (DATA["chosen"][kind]["aligned_bits"], DATA["chosen"][kind]["kept_bits"]) == row
    for mode in ("fast", "precise"):
        for length in (64, 1024, 4096, 16384):
            (one,) = (
                p for p in whole if (p["kind"], p["mode"], p["length"], p["spread"]) == ("e4m3", mode, length, "normal")
            )
            assert f"{one['error']:.1e}" in text, (mode, length)
