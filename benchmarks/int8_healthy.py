"""Healthy files in INT8, as other people's quantizers write them: the excess of layers that do what they must.

A layer whose first emulation leaves a doubt is emulated with other scales, too, and the largest error counts; here
every layer is, so that no figure is small because nobody asked. Networks are split by name: limits are chosen on one
half (``tuning``) and judged on the other. A file is compared with the one that it was made from, in ONNX Runtime
without and with its optimizations.

    python benchmarks/int8_healthy.py --zoo FOLDER --json docs/data/int8_healthy.json   # made by benchmarks/wild/run.py
    python benchmarks/int8_healthy.py --file net.onnx net.int8.onnx net.npz             # any number besides
"""

from __future__ import annotations

import argparse
import collections
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent))
from wild.networks import base, half

from cp_debug.bisect import replay
from cp_debug.bisect.engine import Options, bisect
from cp_debug.errors import InputError

BACKENDS = ("ort,ort-int8", "ort,ort-all")


@dataclass(frozen=True)
class Case:
    """A quantized file, the file that it was made from, and an input."""

    network: str
    quantizer: str
    source: Path
    quantized: Path
    inputs: Path


def cases(zoo: Path | None, given: list[list[str]]) -> Iterator[Case]:
    """The zoo's variants in INT8, then the files given."""
    if zoo is not None:
        for name, about in json.loads((zoo / "variants.json").read_text()).items():
            inputs = next((p for n in (name, about["parent"]) if (p := zoo / f"{n}.npz").exists()), None)
            if about["group"] == "int8" and (zoo / f"{name}.onnx").exists() and inputs is not None:
                source = zoo / f"{about['parent']}.onnx"
                yield Case(about["parent"], about["kind"], source, zoo / f"{name}.onnx", inputs)
    for source, quantized, inputs in given:
        kind = Path(quantized).stem.removeprefix(Path(source).stem).strip(".-_") or "given"
        yield Case(Path(source).stem, kind, Path(source), Path(quantized), Path(inputs))


def layers(case: Case, backends: str) -> Iterator[dict[str, Any]]:
    """What every quantized layer of one case introduces, and what the verdict on it is."""
    options = Options(inputs=case.inputs, explain=False)
    (result,) = bisect(str(case.source), backends, test_model=case.quantized, options=options).tests
    for row in result.rows:
        figures = row.replay
        if figures is None or figures.excess is None or figures.deviation_from_scales is None:
            continue
        yield {
            "network": case.network,
            "half": half(case.network),
            "quantizer": case.quantizer,
            "test": backends.partition(",")[2],
            "layer": row.name,
            "op": row.op,
            "elements": int(np.prod(row.stats.shape)),
            "excess": figures.excess,
            "channel_excess": figures.channel_excess,
            "guilty": row.verdict == "guilty" and row.side == "test",
            "why": row.why,
        }


def figures(values: list[float]) -> dict[str, float]:
    """Count, median, 99th percentile, the three largest."""
    least = {"n": len(values), "median": float(np.median(values)), "p99": float(np.quantile(values, 0.99))}
    return least | {"largest": [round(v, 3) for v in sorted(values)[-3:][::-1]]}  # type: ignore[dict-item]


def main() -> None:
    """Run the cases, print the tables, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--zoo", type=Path, help="folder that benchmarks/wild/run.py made")
    parser.add_argument("--file", nargs=3, action="append", default=[], metavar=("ONNX", "INT8", "NPZ"))
    parser.add_argument("--only", default="", help="part of a network's name")
    parser.add_argument("--backends", action="append", help=f"pairs to compare in, instead of {' and '.join(BACKENDS)}")
    parser.add_argument("--json", type=Path, help="write the figures and every layer beyond 1.5 here")
    options = parser.parse_args()
    replay.ASKED = 0.0  # type: ignore[misc]
    rows: list[dict[str, Any]] = []
    runs: collections.Counter[str] = collections.Counter()
    for case in cases(options.zoo, options.file):
        if options.only not in f"{case.network}.{case.quantizer}":
            continue
        for backends in options.backends or BACKENDS:
            before = len(rows)
            try:
                rows += layers(case, backends)
                runs[half(case.network)] += 1
            except InputError as error:
                print(f"{case.network} {case.quantizer} {backends}: {error}", flush=True)
            else:
                worst = max((max(r["excess"], r["channel_excess"] or 0.0) for r in rows[before:]), default=0.0)
                print(
                    f"{case.network} {case.quantizer} {backends}: {len(rows) - before} layers, {worst:.2f}", flush=True
                )
    console = Console(width=140)
    tables: dict[str, dict[str, Any]] = {}
    for figure in ("excess", "channel_excess"):
        groups = collections.defaultdict(list)
        for row in rows:
            if not row["guilty"] and row[figure]:
                for group in (row["half"], f"{row['half']}, {row['quantizer']}"):
                    groups[group].append(row[figure])
        table = Table(f"{figure} of innocent layers", "n", "median", "99 %", "largest", box=None)
        tables[figure] = {name: figures(values) for name, values in sorted(groups.items())}
        for name, found in tables[figure].items():
            table.add_row(name, str(found["n"]), f"{found['median']:.2f}", f"{found['p99']:.2f}", str(found["largest"]))
        console.print(table)
    accused = [row for row in rows if row["guilty"]]
    console.print(
        f"{dict(runs)} runs of {len({base(r['network']) for r in rows})} networks; {len(accused)} layers accused"
    )
    for row in accused:
        console.print({k: row[k] for k in ("network", "quantizer", "test", "layer", "op", "excess", "channel_excess")})
    if options.json:
        near = [row for row in rows if max(row["excess"], row["channel_excess"] or 0.0) > 1.5]
        document = {"command": sys.argv, "runs": dict(runs), "figures": tables, "beyond_1.5": near, "accused": accused}
        options.json.write_text(json.dumps(document, indent=1, default=str) + "\n")


if __name__ == "__main__":
    main()
