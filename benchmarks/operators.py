"""Every operator test that the ``onnx`` package ships, run through the executor, and counted by outcome.

    python benchmarks/operators.py [--write docs/operators.md]

Outcomes of one test: ``kernel`` (agrees; every node has a kernel here, or is defined by nodes that have one),
``reference`` (agrees; some node runs in ONNX's reference implementation, which in a rounding arithmetic is said to be
not emulated), ``random`` (its numbers are drawn: only types and shapes are compared), ``refused`` (an operator that
nothing here can execute, named), ``differs``.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper

from cp_debug.backends.arithmetic import FP32
from cp_debug.backends.executor import MOVES, Executor, unsupported
from cp_debug.backends.kernels import KERNELS
from cp_debug.errors import InputError
from cp_debug.graph.graph import Graph

RANDOM = {
    "Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike",
}  # fmt: skip
NARROW = {"bfloat16": 2e-2, "float16": 2e-3}
"""Tolerances of types that are held in FP32, so that they differ from a result that was rounded at every step."""


@dataclass(frozen=True)
class Outcome:
    """What came of one test."""

    test: str
    operators: tuple[str, ...]
    outcome: str
    why: str = ""


def node_tests() -> list[Any]:
    """The test cases of ``onnx.backend.test``, generated."""
    from onnx.backend.test.loader import load_model_tests

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return load_model_tests(kind="node")


def outcomes(cases: Iterable[Any]) -> Iterator[Outcome]:
    """Run each case."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for case in cases:
            onnx.save(case.model, Path(folder) / "case.onnx")
            graph = Graph(Path(folder) / "case.onnx")
            operators = tuple(sorted({n.op for n in graph.nodes}))
            yield Outcome(case.name, operators, *_outcome(graph, case))


def _outcome(graph: Graph, case: Any) -> tuple[str, str]:
    if unknown := unsupported(graph):
        return "refused", f"no implementation of {unknown[0].op}"
    kernels = True
    drawn = bool(RANDOM & {n.op_type for n in _all_nodes(graph.proto.graph.node)})
    for inputs, expected in case.data_sets:
        values = dict(zip([v.name for v in graph.proto.graph.input], map(_value, inputs), strict=False))
        executor = Executor(graph, FP32, literal=True)
        try:
            got = executor.run(values)
            for have, want in zip(got.values(), map(_value, expected), strict=False):
                _compare(have, want, case.rtol, drawn=drawn)
        except (InputError, AssertionError) as error:
            return "differs", " ".join(str(error).split())[:200]
        kernels &= not executor.in_reference
    return ("random" if drawn else "kernel" if kernels else "reference"), ""


def _all_nodes(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    for node in nodes:
        yield node
        for attribute in node.attribute:
            yield from _all_nodes(attribute.g.node)


def _value(value: Any) -> Any:
    return numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else value


def _compare(have: Any, want: Any, rtol: float, *, drawn: bool) -> None:
    """Raise AssertionError unless the value is as wanted."""
    if want is None:
        return
    if isinstance(want, list):
        assert len(have) == len(want), f"{len(have)} elements, expected {len(want)}"
        for one, other in zip(have, want, strict=True):
            _compare(one, other, rtol, drawn=drawn)
        return
    if isinstance(have, list) and len(have) == 1:  # an optional holds what it has in a list
        have = have[0]
    have = have.numpy() if isinstance(have, torch.Tensor) else np.asarray(have)
    want = np.asarray(want)
    assert have.shape == want.shape, f"shape {have.shape}, expected {want.shape}"
    if drawn:
        return
    if want.dtype.kind in "OSU":
        assert (have == want).all(), "other strings"
        return
    rtol = NARROW.get(want.dtype.name, rtol)
    atol = 2e-3 if want.dtype.name in NARROW else 1e-5
    np.testing.assert_allclose(have.astype(np.float64), want.astype(np.float64), rtol=rtol, atol=atol)


def not_emulated() -> list[str]:
    """ONNX's operators that have neither a kernel nor a definition by operators, and give numbers."""
    names = []
    for schema in onnx.defs.get_all_schemas():
        name = f"{schema.domain}.{schema.name}" if schema.domain else schema.name
        known = name in KERNELS or schema.has_function or schema.has_context_dependent_function
        if not known and not schema.deprecated and schema.name not in {*MOVES, "Constant", "If", "Loop", "Scan"}:
            names.append(name)
    return sorted(names)


def report(found: list[Outcome]) -> str:
    """The page: counts, what is refused or differs, what runs in the reference implementation."""
    counts = Counter(o.outcome for o in found)
    lines = [
        "# Operators",
        "",
        "This page lists the ONNX operators that the emulation and the oracle can compute, and those that they compute "
        "only in FP32. Look here if a run says that an operator is *not emulated*, or stops at an operator.",
        "",
        f"Written by `python benchmarks/operators.py --write docs/operators.md` with onnx {onnx.__version__}.",
        "",
        f"All {len(found)} operator tests that the `onnx` package ships, through the executor in FP32:",
        "",
        "| outcome | tests | what it means |",
        "|---|---|---|",
        f"| kernel | {counts['kernel']} | agrees; computed by cpdebug's kernels, or by ONNX's definition in terms of "
        "them |",
        f"| reference | {counts['reference']} | agrees; ONNX's reference implementation computes a part of it in "
        "the storage type: in TF32, BF16 and FP16 it is reported as *not emulated* |",
        f"| random | {counts['random']} | random numbers: types and shapes agree |",
        f"| refused | {counts['refused']} | cannot be computed: the run stops and names the operator |",
        f"| differs | {counts['differs']} | |",
        "",
    ]
    for outcome in ("refused", "differs"):
        rows = [o for o in found if o.outcome == outcome]
        lines += [f"- {outcome}: `{o.test}` ({', '.join(o.operators)}): {o.why}" for o in rows] + ([""] if rows else [])
    inside = defaultdict(int)
    for o in found:
        if o.outcome == "reference":
            inside[", ".join(o.operators)] += 1
    lines += ["Operators in tests that use ONNX's reference implementation, with the number of tests:", ""]
    lines += [", ".join(f"{name} ({count})" for name, count in sorted(inside.items())) + ".", ""]
    contrib = sorted(name.removeprefix("com.microsoft.") for name in KERNELS if name.startswith("com.microsoft."))
    lines += [
        "## ONNX Runtime's own operators",
        "",
        f"{len(contrib)} operators of `com.microsoft` have a kernel. Most kernels are compared with ONNX Runtime's on "
        "the CPU (`tests/test_contrib_operators.py` says which): " + ", ".join(contrib) + ".",
        "",
        "## Operators without emulation",
        "",
        "These ONNX operators have no kernel and no definition in terms of other operators, and they do more than move "
        "values. They run in FP32, and their result is rounded once. If they return floats, the last line of an "
        "`emu-*` run, its table and its JSON (`not_emulated`) name them:",
        "",
        ", ".join(not_emulated()) + ".",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """Print or write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, help="the Markdown file to write")
    options = parser.parse_args()
    with contextlib.redirect_stderr(None):
        page = report(list(outcomes(node_tests())))
    if options.write:
        options.write.write_text(page)
    else:
        print(page)


if __name__ == "__main__":
    main()
