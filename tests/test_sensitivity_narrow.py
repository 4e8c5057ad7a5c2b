"""``quantize sensitivity --precision``: what each layer costs in FP8 and INT4, emulated."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_cli import run
from test_search_narrow import net

from cp_debug.backends.arithmetic import ARITHMETICS
from cp_debug.backends.executor import Executor
from cp_debug.graph.graph import Graph
from cp_debug.graph.made_up import MadeUp
from cp_debug.probes.distance import relative_l2


def test_each_layer_has_a_share_and_is_left_out(tmp_path: Path) -> None:
    file, target = net(tmp_path), tmp_path / "result.json"
    flags = ["--precision", "int4:g32", "-n", 1, "--json", target, "--auto", "0.1"]
    code, text = run("quantize", "sensitivity", file, *flags)
    assert code in (0, 1), text
    document = json.loads(target.read_text())
    assert document["precision"] == "int4:g32"
    layers = {row["layer"]: row for row in document["layers"]}
    assert layers.keys() == {f"node_product_{i}" for i in range(3)}
    graph, inputs = Graph(file), MadeUp(Graph(file)).sample([0, 0])
    exact = Executor(graph).run(inputs)
    for name, row in layers.items():
        test = Executor(graph, overrides=dict.fromkeys(layers.keys() - {name}, ARITHMETICS["int4:g32"])).run(inputs)
        apart = relative_l2(*(next(iter(r.values())) for r in (test, exact)))
        assert row["left_out"]["error"] == pytest.approx(apart)
        # A chain of products: what leaving a layer out takes away is what it has a share of, but for cross terms.
        assert row["share"] == pytest.approx(1 - (apart / document["int8"]["error"]) ** 2, abs=0.2)
    assert document["layers"][0]["layer"] == "node_product_1"
    assert document["auto"]["skipped"]
    assert document["auto"]["loss"][0] <= 0.1


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--precision", "fp7"], "--precision: 'fp7'; expected int8 or one of fp8"),
        (["--precision", "fp8", "--method", "max"], "--method: it would do nothing here: scales of fp8"),
        (["--precision", "fp8", "--skip-layers", "*"], "--skip-layers: it would do nothing here"),
    ],
)
def test_flags_without_effect_are_refused(tmp_path: Path, flags: list[str], says: str) -> None:
    code, text = run("quantize", "sensitivity", net(tmp_path), *flags)
    assert code == 2
    assert says in " ".join(text.split())
