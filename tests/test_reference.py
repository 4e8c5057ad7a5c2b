"""The reference pages: every public name and key is on them, and the JSON Schemas fit what is really written."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from extras import module_needs
from nets import NetBuilder

import cp_debug

pytestmark = module_needs("griffe")

import jsonschema  # noqa: E402

DOCS = Path(__file__).parents[1] / "docs"
sys.path.insert(0, str(DOCS))
import reference_pages  # noqa: E402


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Path:
    b = NetBuilder()
    x = b.op("Relu", b.conv("image", 3, 4))
    return b.save(tmp_path_factory.mktemp("net") / "net.onnx", {"image": (1, [1, 3, 8, 8])}, [b.conv(x, 4, 2)])


@pytest.fixture(scope="module")
def worse(net: Path) -> Path:
    """The same with a weight that is 5 % too large."""
    model = onnx.load(net)
    weight = model.graph.initializer[-1 if len(model.graph.initializer[-1].dims) == 4 else -2]
    weight.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(weight) * np.float32(1.05), weight.name))
    onnx.save(model, path := net.with_name("worse.onnx"))
    return path


def documents(net: Path, worse: Path) -> dict[str, Any]:
    """Name of a document → one that is really written."""
    from cp_debug.bisect.import_dump import match_dump
    from cp_debug.graph.graph import Graph

    bad = cp_debug.diagnose(net, "ort,ort", test_model=worse, progress=False)
    good = cp_debug.diagnose(net, "ort,emu-fp16", progress=False)
    graph = Graph(net)
    dump = {graph.outputs[0].name: np.zeros((1, 2, 8, 8), np.float32)}
    return {
        "bisect": bad,
        "diff": cp_debug.diff_results(good, bad),
        "import": match_dump(graph, dump, "dump"),
        "prediction": cp_debug.predict(net, progress=False),
        "search": cp_debug.search(net, "ort,emu-fp16acc", "rel_l2<1e-4", progress=False),
        "verify": cp_debug.verify(net, "ort,ort-all", progress=False),
    }


def missing_keys(schema: dict[str, Any], place: dict[str, Any], document: Any, path: str) -> list[str]:
    """Keys that the schema names and the document lacks, at any depth."""
    if "$ref" in place:
        return missing_keys(schema, schema["$defs"][place["$ref"].rpartition("/")[2]], document, path)
    if isinstance(document, list):
        return [key for item in document[:3] for key in missing_keys(schema, place.get("items", {}), item, path)]
    if not isinstance(document, dict):
        return []
    missing = []
    for kind in place.get("anyOf", ()):
        missing += missing_keys(schema, kind, document, path)
    for key, inner in place.get("properties", {}).items():
        here = f"{path}.{key}"
        missing += missing_keys(schema, inner, document[key], here) if key in document else [here]
    return missing


def test_every_public_name_has_its_place() -> None:
    listed = [name for names in reference_pages.GROUPS.values() for name in names]
    assert sorted([*listed, "__version__"]) == sorted(cp_debug.__all__)
    page = reference_pages.python_page()
    assert all(f"### {name}\n" in page for name in listed)
    assert "test_tensors: str | Path" in page  # a signature
    assert "| `rtol` | `float \\| None` |" in page  # a field


def test_every_command_and_flag_is_on_the_page() -> None:
    page = reference_pages.cli_page()
    for command in ("bisect", "quantize ptq", "import", "ui"):
        assert f"### {command}\n" in page
    assert "--tensors-layout <nchw|nhwc|flat>" in page


@pytest.mark.slow
def test_what_is_written_fits_the_schema(net: Path, worse: Path) -> None:
    for name, result in documents(net, worse).items():
        document = json.loads(json.dumps(result.to_dict()))
        schema = reference_pages.schema(reference_pages.document_class(name))
        jsonschema.Draft202012Validator.check_schema(schema)
        jsonschema.validate(document, schema)
        assert not missing_keys(schema, schema, document, name)
        page = reference_pages.json_page()
        assert f"## {type(result).__name__}\n" in page


@pytest.mark.slow
def test_the_schema_refuses_what_the_reader_refuses(net: Path, worse: Path) -> None:
    document = json.loads(json.dumps(cp_debug.diagnose(net, "ort,ort", test_model=worse, progress=False).to_dict()))
    schema = reference_pages.schema(cp_debug.BisectResult)
    for key, value in (("verdict", "wonderful"), ("within_tolerance", "yes"), ("index", 1.5), ("max_abs", "huge")):
        wrong = json.loads(json.dumps(document))
        wrong["tests"][0]["layers"][0][key] = value
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, schema)
