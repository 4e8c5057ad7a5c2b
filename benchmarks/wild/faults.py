"""Faults put into the zoo's networks by graph edits, as they go wrong in real exports: ``write_faults``.

A fault is kept where the layer's result really changes (relative L2 of 1e-4 and more), the final outputs change, and
all stays finite. Its record says which layer is faulty and which names of a cause are right or near.
"""

from __future__ import annotations

import collections
import json
import os
import zlib
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from .edits import Net, rename
from .kinds import KINDS, Place
from .networks import PACKAGED, UNUSUAL, base
from .packaged_kinds import PACKAGED_KINDS
from .unusual_kinds import UNUSUAL_KINDS

FAULTY = (
    "resnet.dynamo",
    "unet.torchscript",
    "vit.torchscript",
    "yolo.torchscript",
    "tagger.torchscript",
    "gru.unfolded",
    "decoder.dynamo",
    "ppocr-cls",
    "silero-openvino",
    "resnet.weights16",
    "unet.weights8",
)
"""Networks that faults are put into."""
SMALLEST = 1e-4
"""Relative L2 change of the layer's result below which a fault is none."""
RENAMED = frozenset({"weights-scaled", "channels-swapped", "pads", "epsilon", "dropped", "operator-exchanged"})
"""Kinds that are also put into a copy in which every name is another one."""
PLACES = 8
"""Places that are tried for one kind in one network."""


@dataclass(frozen=True)
class Fault:
    """One fault that is in a file."""

    network: str
    kind: str
    file: str
    nodes: list[str]
    """Names of the faulty node, in the parent's graph; empty where it has none."""
    values: list[str]
    """Names of the values that may be called guilty."""
    what: str
    size: float
    """Relative L2 change of the layer's result on the parent's inputs."""
    right: list[str]
    near: list[str]


def write_faults(folder: Path, seed: int = 0, networks: Collection[str] = FAULTY, each: int | None = None) -> int:
    """Write every kind into every one of ``networks`` that lies in the folder, and ``faults.json``; how many.

    ``each`` is the number of faults that a network gets at most: kinds that were used least come first.
    """
    index = folder / "faults.json"
    known = json.loads(index.read_text()) if index.exists() else []
    done = {fault["network"] for fault in known}
    for network in networks:
        source = folder / f"{network}.onnx"
        if network in done or not source.exists():
            continue
        net, sample = Net(onnx.load(source)), dict(np.load(folder / f"{network}.npz"))
        net.values = net.run(sample) | sample
        count = 0
        for kind in _order(network, known, seed):
            if count == each:
                break
            rng = np.random.default_rng([seed, zlib.crc32(f"{network}:{kind}".encode())])
            if (fault := put(net, kind, network, sample, rng, folder)) is not None:
                known.append(asdict(fault))
                count += 1
        index.write_text(json.dumps(known, indent=1))
    for fault in known:
        renamed = folder / renamed_file(fault["file"])
        if fault["kind"] in RENAMED and not renamed.exists():
            rename(folder / fault["file"], renamed)
    return len(known)


def _order(network: str, known: list[dict[str, Any]], seed: int) -> list[str]:
    """The kinds that suit a network, those of few faults first, else drawn."""
    used = collections.Counter(fault["kind"] for fault in known)
    kinds = _kinds(network)
    np.random.default_rng([seed, zlib.crc32(network.encode())]).shuffle(kinds)
    return sorted(kinds, key=lambda kind: used[kind])


def _kinds(network: str) -> list[str]:
    kind = base(network)
    if kind in PACKAGED:
        return [*KINDS, *UNUSUAL_KINDS, *PACKAGED_KINDS]
    return [*KINDS, *UNUSUAL_KINDS] if kind in UNUSUAL else [*KINDS]


def renamed_file(file: str) -> str:
    """The name of a fault's copy with other names."""
    return file.replace(".onnx", ".renamed.onnx")


def put(
    net: Net, kind: str, network: str, sample: dict[str, np.ndarray], rng: np.random.Generator, folder: Path
) -> Fault | None:
    """Write the network with one fault of a kind; None where no place suits it."""
    about = (KINDS | UNUSUAL_KINDS | PACKAGED_KINDS)[kind]
    places = list(about.places(net, rng))
    for index in rng.permutation(len(places))[:PLACES]:
        place = places[index]
        spoilt = net.copy()
        place.apply(spoilt)
        size = effect(net, spoilt, place, sample)
        if size is None:
            continue
        file = f"{network}.fault-{kind}.onnx"
        onnx.save(spoilt.model, folder / file)
        right, near = about.right, about.near
        nodes = [name for value in place.values if (name := _node_name(net, value))]
        return Fault(network, kind, file, nodes, place.values, place.what, size, sorted(right), sorted(near))
    return None


def effect(net: Net, spoilt: Net, place: Place, sample: dict[str, np.ndarray]) -> float | None:
    """The fault's size; None where it is too small, is not seen in the outputs, or breaks the network."""
    if not _survives(spoilt, sample):
        return None
    try:
        values = spoilt.run(sample)
    except Exception:  # ONNX Runtime refuses the edited graph: no fault, but a broken file
        return None
    outputs = [v.name for v in net.graph.output]
    changed = [distance(net.values[name], values[name]) for name in outputs if name in values]
    if not changed or not all(map(np.isfinite, changed)) or max(changed) == 0:
        return None
    sizes = [distance(net.values[v], values[v]) for v in place.values if v in values and v in net.values]
    if not sizes or not np.isfinite(max(sizes)) or max(sizes) < SMALLEST:
        return None
    return float(f"{max(sizes):.3g}")


def _survives(spoilt: Net, sample: dict[str, np.ndarray]) -> bool:
    """Whether ONNX Runtime does not end the process on the graph: some wrong slices fail an assertion in it."""
    process = os.fork()
    if process == 0:
        try:
            spoilt.run(sample)
        finally:
            os._exit(0)
    return os.waitpid(process, 0)[1] == 0


def distance(reference: np.ndarray, test: np.ndarray) -> float:
    """Relative L2 distance; infinite for another shape and for values that are not finite."""
    if reference.shape != test.shape or not np.isfinite(test.astype(np.float64)).all():
        return np.inf
    exact, other = reference.astype(np.float64), test.astype(np.float64)
    scale = float(np.linalg.norm(exact))
    return float(np.linalg.norm(other - exact)) / scale if scale else float(bool(np.any(other)))


def _node_name(net: Net, value: str) -> str:
    try:
        return str(net.node(value).name)
    except KeyError:
        return ""
