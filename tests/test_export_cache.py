"""Exports that are kept: taken again for an equal module and equal inputs, and for nothing else."""

from __future__ import annotations

import importlib
import json
import os
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from cp_debug.graph.graph import Graph
from cp_debug.programs import pipeline
from cp_debug.programs.align import module_digest
from cp_debug.programs.export_cache import ENTRY, LARGEST, ExportCache, _is_users_file
from cp_debug.programs.pipeline import Export, prepare
from cp_debug.recipes import torch_callable
from cp_debug.recipes.base import Component
from cp_debug.recipes.torch_callable import TorchModel
from cp_debug.store import Store

INPUTS = {"x": np.ones((1, 3), np.float32)}


class Net(nn.Module):
    """A product and a factor that is no parameter."""

    def __init__(self, factor: float = 2.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.factor = nn.Linear(3, 3), factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.linear(x)) * self.factor


def cache_in(folder: Path) -> ExportCache:
    return ExportCache(Store(folder, most=LARGEST))


def prepared(module: nn.Module, tmp_path: Path, place: str, **how: Any) -> Any:
    model = TorchModel("net", module, {"x": torch.ones(1, 3)})
    sample = next(iter(model.samples(1, 0, None)))
    export = Export(exporter="torchscript", **how)
    (program,) = prepare(model, sample, tmp_path / place, how=export, cache=cache_in(tmp_path / "cache"))
    return program


BIAS = 0.0
"""What a forward reads from its file."""


class Reader(Net):
    """Its forward reads a global value, a value of its class, and the environment."""

    gain = 1.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * self.gain * float(os.environ.get("CPDEBUG_TEST_FACTOR", "1")) + BIAS


@pytest.mark.few(1)
@pytest.mark.parametrize("change", ["global", "class", "environment"])
def test_what_a_forward_reads_elsewhere_makes_another_export(
    tmp_path: Path, exports: list[str], monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    prepared(Reader(), tmp_path, "a")
    prepared(Reader(), tmp_path, "again")
    assert exports == ["Reader"]
    if change == "global":
        monkeypatch.setattr(sys.modules[__name__], "BIAS", 0.5)
    elif change == "class":
        monkeypatch.setattr(Reader, "gain", 3.0)
    else:
        monkeypatch.setenv("CPDEBUG_TEST_FACTOR", "3")
    prepared(Reader(), tmp_path, "b")
    assert exports == ["Reader", "Reader"]


def test_an_equal_module_is_exported_once(tmp_path: Path, exports: list[str]) -> None:
    first, second = (prepared(Net(), tmp_path, place) for place in ("a", "b"))
    assert exports == ["Net"]
    assert second.graph.digest == first.graph.digest
    assert second.graph.path.parent == tmp_path / "b"
    assert second.alignment.links == first.alignment.links


def test_another_module_is_exported_anew(tmp_path: Path, exports: list[str]) -> None:
    prepared(Net(), tmp_path, "a")
    prepared(Net(3.0), tmp_path, "b")  # an attribute that is no parameter
    changed = Net()
    with torch.no_grad():
        changed.linear.weight[0, 0] += 1
    prepared(changed, tmp_path, "c")
    prepared(Net(), tmp_path, "d", opset=17)
    assert len(exports) == 4


def test_code_that_changed_and_damaged_files_are_exported_anew(tmp_path: Path, exports: list[str]) -> None:
    prepared(Net(), tmp_path, "a")
    (file,) = (tmp_path / "cache").iterdir()
    with zipfile.ZipFile(file) as opened:
        kept = {name: opened.read(name) for name in opened.namelist()}
    entry = json.loads(kept[ENTRY])
    assert str(Path(__file__)) in entry["code"]
    file.write_bytes(file.read_bytes().replace(kept["Net.onnx"], bytes(len(kept["Net.onnx"]))))
    prepared(Net(), tmp_path, "b")
    assert len(exports) == 2
    entry["code"][str(Path(__file__))][1] -= 1
    with zipfile.ZipFile(file, "w") as opened:
        opened.comment = file.stem.encode()
        for name, content in {**kept, ENTRY: json.dumps(entry)}.items():
            opened.writestr(name, content)
    prepared(Net(), tmp_path, "c")
    assert len(exports) == 3
    prepared(Net(), tmp_path, "d")
    assert len(exports) == 3, "kept anew"


class Wide(Net):
    """A product whose weights onnx writes beside the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 400)


@pytest.mark.slow
def test_weights_that_changed_in_a_kept_file_are_exported_anew(
    tmp_path: Path, exports: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "_LARGEST_FILE", 0)  # as with large weights, which lie beside the graph
    first, second = (prepared(Wide(), tmp_path, place) for place in ("a", "b"))
    assert len(exports) == 1
    assert second.graph.digest == first.graph.digest == Graph(second.graph.path).digest
    name = next(iter(second.graph.initializers))
    np.testing.assert_array_equal(second.graph.initializer(name), first.graph.initializer(name))
    (file,), data = (tmp_path / "cache").iterdir(), (tmp_path / "a/Wide.onnx.data").read_bytes()
    file.write_bytes(file.read_bytes().replace(data, bytes([data[0] ^ 1]) + data[1:]))  # of the same length
    prepared(Wide(), tmp_path, "c")
    assert len(exports) == 2


def test_a_large_module_is_not_run_where_its_export_is_kept(
    tmp_path: Path, exports: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_callable, "_LARGE", 1)
    runs: list[str] = []
    forward = Net.forward

    def counted(self: Net, x: torch.Tensor) -> torch.Tensor:
        runs.append(str(x.device))
        return forward(self, x)

    monkeypatch.setattr(Net, "forward", counted)
    first = prepared(Net(), tmp_path, "a")
    assert runs
    runs.clear()
    second = prepared(Net(), tmp_path, "b")
    assert (runs, len(exports)) == ([], 1)
    assert [v.name for v in second.graph.outputs] == [v.name for v in first.graph.outputs]


def test_what_cannot_be_known_or_kept_is_no_reason_to_stop(tmp_path: Path, exports: list[str]) -> None:
    module = Net()
    module.hook = lambda x: x  # pickle refuses it
    cache = cache_in(tmp_path / "cache")
    assert cache.key(Component("net", ["x"], ["y"], module=module), INPUTS, {}) is None
    made = type("Made", (Net,), {"__module__": "__main__"})
    assert cache.key(Component("net", ["x"], ["y"], module=made()), INPUTS, {}) is None
    assert cache.key(Component("net", ["x"], ["y"], module=Net()), INPUTS, {}) is not None
    (tmp_path / "cache").write_text("a file where the folder should be")
    prepared(Net(), tmp_path, "a")
    prepared(Net(), tmp_path, "b")
    assert len(exports) == 2
    assert not list(tmp_path.glob(".*.partial"))


class Node:
    """A member of a set that knows the set."""

    def __init__(self, name: str, group: set[Any]) -> None:
        self.name, self.group = name, group


def test_the_order_of_a_set_is_no_part_of_the_key(tmp_path: Path) -> None:
    def key(found: Any) -> str | None:
        module = Net()
        module.found = found
        return cache_in(tmp_path).key(Component("net", ["x"], ["y"], module=module), INPUTS, {})

    one, other = {0, 8}, {8, 0}
    assert list(one) != list(other)
    assert key(one) == key(other) == key({8, 0}) != key({0, 16})
    assert key(one) != key(frozenset(one))
    assert key({"a": [frozenset(one)]}) == key({"a": [frozenset(other)]}) != key({"a": [frozenset({8})]})
    group: set[Any] = set()
    group.add(Node("a", group))
    assert key(group) == key(group) is not None


def test_what_pip_put_elsewhere_is_a_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its global values are its own affair; those of a file beside it are the user's."""
    for name in ("cpdebug_put_here", "cpdebug_own_here"):
        (tmp_path / f"{name}.py").write_text("COUNT = 0\n")
    about = tmp_path / "cpdebug_put_here-1.0.dist-info"
    about.mkdir()
    (about / "RECORD").write_text("cpdebug_put_here.py,sha256=x,10\ncpdebug_put_here-1.0.dist-info/RECORD,,\n")
    monkeypatch.syspath_prepend(str(tmp_path))

    def key() -> str | None:
        return cache_in(tmp_path / "cache").key(Component("net", ["x"], ["y"], module=Net()), INPUTS, {})

    put, own = (importlib.import_module(f"cpdebug_{which}_here") for which in ("put", "own"))
    try:
        first = key()
        put.COUNT = 1
        assert key() == first is not None
        own.COUNT = 1
        assert key() != first
    finally:
        for module in (put, own):
            del sys.modules[module.__name__]


def test_what_is_installed_belongs_to_a_library_wherever_it_lies(tmp_path: Path) -> None:
    path = tuple(sys.path)
    for library in (json.__file__, str(tmp_path / "dist-packages" / "part.py"), np.__file__, "part.py"):
        assert not _is_users_file(library, path)
    assert _is_users_file(str(tmp_path / "part.py"), path)
    assert _is_users_file(__file__, path)


def test_a_digest_changes_with_names_values_and_buffers() -> None:
    def net() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))

    first, same, moved, named = net(), net(), net(), nn.Sequential(*reversed([*net()]))
    moved[1].running_mean += 1  # type: ignore[index, union-attr]
    assert module_digest(first) == module_digest(same)
    assert len({module_digest(each) for each in (first, moved, named)}) == 3
    assert len(module_digest(first)) == 64
