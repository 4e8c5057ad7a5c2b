"""The emulated backends as backends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_executor import conv_net, graph, random

from cp_debug.backends.base import Program
from cp_debug.backends.emulated import EmulatedBackend
from cp_debug.backends.spec import BackendSpec
from cp_debug.errors import BackendUnavailable, InputError

SPECS = ["emu-tf32", "emu-bf16", "emu-fp16", "emu-fp16acc"]


@pytest.mark.parametrize("spec", SPECS)
def test_runs_are_repeatable_and_describe_themselves(tmp_path: Path, spec: str) -> None:
    backend = EmulatedBackend(BackendSpec.parse(spec))
    session = backend.open(Program("net", conv_net(tmp_path)))
    inputs, values = {"x": random(1, 8, 16, 16)}, dict[str, Any]()
    first = session.run(inputs, lambda n, v: values.update({n: v.clone()}))
    second = session.run(inputs)
    assert first["y"].tobytes() == second["y"].tobytes()
    assert list(values) == list(session.exposed)
    assert backend.emulated
    assert backend.precision == session.settings["arithmetic"] == spec.removeprefix("emu-")
    assert session.settings["tile"] == (64 if spec == "emu-fp16acc" else None)
    assert backend.versions()["torch"] == torch.__version__


def test_the_tile_is_a_parameter(tmp_path: Path) -> None:
    net = graph(tmp_path, "g (float[1,96,4,4] x) => (float[A,B,C,D] y) { y = Conv(x, w) }", {"w": random(4, 96, 3, 3)})
    x = {"x": random(1, 96, 4, 4, seed=1)}
    results = []
    for tile in (32, None):
        session = EmulatedBackend(BackendSpec.parse("emu-fp16acc"), tile=tile).open(Program("net", net))
        assert session.settings["tile"] == (tile or 64)
        results.append(session.run(x)["y"])
    assert not np.array_equal(*results)


def test_bad_inputs_and_missing_devices(tmp_path: Path) -> None:
    session = EmulatedBackend(BackendSpec.parse("emu-fp16")).open(Program("net", conv_net(tmp_path)))
    with pytest.raises(InputError, match="missing input 'x'"):
        session.run({})
    with pytest.raises(BackendUnavailable, match="emu-fp16@cpu"):
        EmulatedBackend(BackendSpec.parse("emu-fp16@cuda:99"))
    unknown = graph(tmp_path, "g (float[2] x) => (float[2] y) { y = own.Mystery(x) }")
    with pytest.raises(InputError, match=r"own\.Mystery"):
        EmulatedBackend(BackendSpec.parse("emu-fp16")).open(Program("net", unknown))
