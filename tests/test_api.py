"""``import cp_debug`` gives every name, however often it is asked."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from nets import second_like

import cp_debug


@pytest.mark.parametrize("name", cp_debug.__all__)
def test_a_name_is_the_same_the_second_time(name: str) -> None:
    """In a fresh process: an import in between must not put a folder in the place of a function."""
    code = f"import cp_debug; a = cp_debug.{name}; b = cp_debug.{name}; assert a is b, (a, b); print(type(b).__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() != "module"


def test_diagnose_and_open_result(tmp_path: Path) -> None:
    path = second_like(tmp_path / "net.onnx", depth=1, size=8)
    result = cp_debug.diagnose(str(path), "ort-none,ort-basic", options=cp_debug.Options(save=tmp_path / "kept"))
    assert isinstance(result, cp_debug.BisectResult)
    assert result.agrees
    with pytest.raises(cp_debug.InputError, match="no such file"):
        cp_debug.open_result(tmp_path / "nothing")


def test_the_package_is_typed() -> None:
    assert (Path(cp_debug.__file__).parent / "py.typed").exists()
