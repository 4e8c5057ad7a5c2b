"""Exported graphs and their alignments, kept on disk under a hash of the module, its inputs and the settings.

An entry holds the ONNX file, its weights beside it where they are large, the alignment, and ``entry.json``. It is used
only while no file of code that the export had loaded has changed since.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import json
import os
import pickle
import sys
import sysconfig
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch

from cp_debug.backends.base import Program
from cp_debug.files import key_of
from cp_debug.graph.graph import Graph
from cp_debug.probes.alignment import Alignment
from cp_debug.probes.arrays import as_numpy
from cp_debug.reading import read_json, typed
from cp_debug.recipes.base import Component
from cp_debug.store import Store, cache_folder, fill
from cp_debug.version import __version__

LARGEST = 10 << 30
"""Bytes of exports that are kept; beyond it the least recently used are removed."""
ENTRY = "entry.json"
SET_BY_LIBRARIES = ("PYTEST_CURRENT_TEST", "TORCHINDUCTOR_")
"""Beginnings of environment variables that change while a program runs."""
_SIDE_BY_SIDE = 1 << 20
"""Bytes from which on a tensor is hashed in a thread."""
_LARGEST_ENTRY = 16 << 20
"""Bytes of an entry's JSON: a line for each loaded file of code."""


@dataclass
class _Entry:
    """Content of ``entry.json``."""

    name: str
    """Name of the graph's file, which knows that of its weights."""
    code: dict[str, tuple[int, int]]
    """Path of every loaded file of code → its size, and when it was changed, in nanoseconds."""
    digest: str
    """``Graph.digest`` of the kept graph."""


@dataclass(frozen=True)
class ExportCache:
    """Exports in a store."""

    store: Store
    code: str = ""
    """Hash of this project's code, for a store that other machines share, whose files have other times: it is in the
    keys then, and times are not compared."""

    def key(self, component: Component, inputs: Mapping[str, np.ndarray], settings: Mapping[str, Any]) -> str | None:
        """The hash of a component's module with its weights, of its inputs (any shapes and dtypes), of settings, and of
        the user's code with what it may read besides: global values, and the environment where it does.

        ``settings`` are JSON-safe. None for a module whose code or attributes
        cannot be known: of an interactive session, or what pickle refuses.
        """
        module = component.module
        if module is None or not all(_source(type(part)) for part in module.modules()):
            return None
        digest = hashlib.sha256(self.code.encode())
        try:
            pickler = _Pickler(digest)
            pickler.hash_beforehand([*module.parameters(), *module.buffers()])
            pickler.dump(module)
        except Exception:  # pickle raises nearly everything
            return None
        _put_surroundings(digest)
        for name, array in inputs.items():
            digest.update(f"{name} {array.dtype} {array.shape}".encode())
            digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        own = [component.input_names, component.output_names, component.dynamic_axes, component.prefix]
        versions = {"cpdebug": __version__, "torch": str(torch.__version__), "python": sys.version}
        return key_of(
            {"module": digest.hexdigest(), "own": repr(own), "settings": dict(settings), "versions": versions}
        )

    def program(
        self,
        component: Component,
        inputs: Mapping[str, np.ndarray],
        path: Path,
        settings: Mapping[str, Any],
        make: Callable[[], Program],
    ) -> Program:
        """The component's program, whose graph is ``path``: kept with equal ``settings``, else made by ``make``.

        ``inputs`` become the example of a kept program, shapes and dtypes as they are.
        """
        files = path, path.with_name(f"{path.name}.data"), path.with_suffix(".alignment.json")

        def put(entry: Path) -> Program:
            program = make()
            code = {} if self.code else {file: stamp for file in _loaded() if (stamp := _stamp(file)) is not None}
            document = {"name": path.name, "code": code, "digest": program.graph.digest}
            fill(entry, {**{file.name: file for file in files if file.is_file()}, ENTRY: json.dumps(document)})
            return program

        def take(entry: Path) -> Program | None:
            about: _Entry = typed(_Entry, read_json(entry / ENTRY, what="entry", most=_LARGEST_ENTRY), ENTRY)
            if about.name != path.name or any(_stamp(file) != tuple(stamp) for file, stamp in about.code.items()):
                return None
            for file in files:
                if (entry / file.name).is_file():
                    (entry / file.name).replace(file)
            graph = Graph(path, digest=about.digest)
            alignment = Alignment.load(path.with_suffix(".alignment.json"), graph)
            return Program(component.name, graph, component.module, alignment, example=inputs)

        path.parent.mkdir(parents=True, exist_ok=True)
        return self.store.take(self.key(component, inputs, settings), put, take, path.parent)


def own_exports() -> ExportCache:
    """The exports in the user's cache folder."""
    return ExportCache(Store(cache_folder("exports"), most=LARGEST))


class _Pickler(pickle.Pickler):
    """Pickles into a hash; tensors as type, shape and bytes, each once; sets without an order.

    A set of strings has another order in every process. ``within``: sets (ids) that this is the content of.
    """

    def __init__(self, digest: Any, within: frozenset[int] = frozenset()) -> None:
        super().__init__(SimpleNamespace(write=digest.update), protocol=4)
        self._within = within
        self._seen: dict[int, tuple[str, torch.Tensor]] = {}

    def persistent_id(self, value: Any) -> str | None:
        """Tensors by what is in them: pickle would write their storages. Sets by the sorted hashes of their members."""
        if type(value) in (set, frozenset):
            return f"{type(value).__name__} {self._members(value)}"
        if not isinstance(value, torch.Tensor):
            return None
        if id(value) not in self._seen:
            self._seen[id(value)] = _tensor_digest(value), value
        return str(self._seen[id(value)][0])

    def hash_beforehand(self, tensors: Sequence[torch.Tensor]) -> None:
        """Hash large tensors side by side, of any shapes and dtypes: hashing lets other threads run."""
        large = list({id(tensor): tensor for tensor in tensors if tensor.nbytes >= _SIDE_BY_SIDE}.values())
        with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
            for tensor, digest in zip(large, pool.map(_tensor_digest, large), strict=True):
                self._seen[id(tensor)] = digest, tensor

    def _members(self, values: Collection[Any]) -> list[str]:
        if id(values) in self._within:  # a member holds the set that it is in
            return ["itself"]
        found = []
        for value in values:
            own = hashlib.sha256()
            _Pickler(own, self._within | {id(values)}).dump(value)
            found.append(own.hexdigest())
        return sorted(found)


def _tensor_digest(tensor: torch.Tensor) -> str:
    kind = f"{type(tensor).__qualname__} {tensor.dtype} {tuple(tensor.shape)} {tensor.requires_grad}"
    own = hashlib.sha256(kind.encode())
    own.update(np.ascontiguousarray(as_numpy(tensor)).reshape(-1).view(np.uint8).data)
    return own.hexdigest()


def _put_surroundings(digest: Any) -> None:
    """Add the user's modules with their global values and classes, and the environment where one of them reads it."""
    reads_environment = False
    for name, module in sorted(sys.modules.items()):
        if not _is_users(name, module):
            continue
        with contextlib.suppress(OSError):
            text = Path(str(module.__file__)).read_text(encoding="utf-8", errors="replace")
            digest.update(text.encode(errors="replace"))
            reads_environment |= "environ" in text or "getenv" in text
        kinds = [kind for kind in list(vars(module).values()) if isinstance(kind, type) and kind.__module__ == name]
        for owner in (module, *kinds):
            for key, value in sorted(vars(owner).items()):
                if not key.startswith("__") and not callable(value) and not isinstance(value, ModuleType):
                    digest.update(f"{name} {getattr(owner, '__qualname__', '')} {key} {_digest_of(value)}".encode())
    if reads_environment:
        given = {name: value for name, value in os.environ.items() if not name.startswith(SET_BY_LIBRARIES)}
        digest.update(repr(sorted(given.items())).encode())


def _is_users(name: str, module: ModuleType) -> bool:
    """Whether a loaded module is the user's own: of no library, and not of this package."""
    file = getattr(module, "__file__", None)
    return bool(name.partition(".")[0] != "cp_debug" and file and _is_users_file(file, tuple(sys.path)))


def _digest_of(value: Any) -> str:
    """The hash of a value, or its type's name where pickle refuses it."""
    own = hashlib.sha256()
    try:
        _Pickler(own).dump(value)
    except Exception:  # pickle raises nearly everything
        return type(value).__qualname__
    return own.hexdigest()


@functools.cache  # a process has thousands of modules, whose files are asked for with every export
def _is_users_file(file: str, path: tuple[str, ...]) -> bool:
    """Whether a file is neither of Python's own library nor of a package that pip put anywhere on ``path``."""
    if not Path(file).is_absolute() or "-packages" in file or file.startswith(sysconfig.get_path("stdlib")):
        return False
    roots = (root.rstrip(os.sep) + os.sep for root in path if root)
    return not any(file.startswith(root) and Path(file[len(root) :]).parts[0] in _installed(root) for root in roots)


@functools.cache
def _installed(folder: str) -> frozenset[str]:
    """First parts of the paths that pip put into a folder, as its ``*.dist-info/RECORD`` have them."""
    found: set[str] = set()
    for record in Path(folder).glob("*.dist-info/RECORD"):
        with contextlib.suppress(OSError, UnicodeError):
            found |= {line.split("/")[0].split(",")[0] for line in record.read_text(encoding="utf-8").splitlines()}
    return frozenset(found)


def _source(kind: type) -> str | None:
    """The file of a class's code; None where there is none."""
    with contextlib.suppress(TypeError, OSError):
        file = inspect.getsourcefile(kind)
        return file if file and Path(file).is_file() else None
    return None


def _loaded() -> Sequence[str]:
    """Files of all loaded code but Python's own library."""
    own = sysconfig.get_path("stdlib")
    files = {getattr(module, "__file__", None) for module in list(sys.modules.values())}
    return sorted(f for f in files if f and not (f.startswith(own) and "-packages" not in f[len(own) :]))


def _stamp(file: str) -> tuple[int, int] | None:
    try:
        found = Path(file).stat()
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns
