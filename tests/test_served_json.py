"""Requests and answers of inference servers, as dumps and as inputs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from nets import second_like

import cp_debug
from cp_debug.backends.executor import Executor
from cp_debug.graph.graph import Graph
from cp_debug.graph.made_up import MadeUp
from cp_debug.probes.arrays import as_numpy
from cp_debug.probes.dumps import read_dump


def kserve(name: str, value: np.ndarray, datatype: str = "FP32", *, nested: bool = False) -> dict[str, Any]:
    """A tensor as KServe's protocol V2 has it."""
    data = value.tolist() if nested else value.ravel().tolist()
    return {"name": name, "shape": list(value.shape), "datatype": datatype, "data": data}


def written(folder: Path, document: object, name: str = "answer.json") -> Path:
    """``document`` as a file."""
    (folder / name).write_text(json.dumps(document))
    return folder / name


@pytest.mark.slow
@pytest.mark.parametrize("nested", [False, True])
def test_a_request_and_its_answer_are_a_dump(tmp_path: Path, nested: bool) -> None:
    path = second_like(tmp_path / "net.onnx", depth=1, size=8)
    graph = Graph(path)
    given = dict(MadeUp(graph).sample([0]))
    results = {name: as_numpy(value) for name, value in Executor(graph).run(given).items()}
    (tmp_path / "dump").mkdir()
    request = {"id": "7", "inputs": [kserve(name, value, nested=nested) for name, value in given.items()]}
    answer = {"model_name": "net", "outputs": [kserve(o.name, results[o.name], nested=nested) for o in graph.outputs]}
    written(tmp_path / "dump", request, "request.json")
    written(tmp_path / "dump", answer)
    assert cp_debug.diagnose(path, "ort", test_tensors=tmp_path / "dump").agrees
    inputs = tmp_path / "dump" / "request.json"
    assert cp_debug.diagnose(path, "ort", inputs=inputs, test_tensors=tmp_path / "dump" / "answer.json").agrees
    wrong = {"outputs": [kserve(o.name, results[o.name] * np.float32(1.03)) for o in graph.outputs]}
    told = written(tmp_path, wrong)
    assert not cp_debug.diagnose(path, "ort", inputs=inputs, test_tensors=told).agrees


@pytest.mark.parametrize(
    ("datatype", "dtype"), [("FP16", "float16"), ("BF16", "bfloat16"), ("UINT8", "uint8"), ("BOOL", "bool")]
)
def test_types_are_those_that_the_server_states(tmp_path: Path, datatype: str, dtype: str) -> None:
    found = read_dump(written(tmp_path, {"outputs": [kserve("y", np.array([[0, 1]]), datatype)]}))
    assert found["y"].dtype.name == dtype
    assert found["y"].astype(int).tolist() == [[0, 1]]


def test_tensorflow_serving_has_columns_rows_and_plain_rows(tmp_path: Path) -> None:
    columns = read_dump(written(tmp_path, {"outputs": {"scores": [[0.5, 1.0]], "labels": [[3, 4]]}}))
    rows = read_dump(written(tmp_path, {"predictions": [{"scores": [0.5, 1.0], "labels": [3, 4]}]}))
    for found in (columns, rows):
        assert {name: (value.dtype.name, value.tolist()) for name, value in found.items()} == {
            "scores": ("float32", [[0.5, 1.0]]),
            "labels": ("int64", [[3, 4]]),
        }
    assert read_dump(written(tmp_path, {"predictions": [[1.5], [2.5]]}))["predictions"].shape == (2, 1)


@pytest.mark.parametrize(
    ("document", "says"),
    [
        ({"outputs": [{"name": "y", "shape": [2], "datatype": "FP32", "data": [1.0]}]}, "1 numbers for the shape [2]"),
        ({"outputs": [{"name": "y", "shape": [1], "datatype": "BYTES", "data": ["cat"]}]}, "datatype is 'BYTES'"),
        ({"outputs": [{"name": "y", "shape": [1], "datatype": "FP32", "data": ["x"]}]}, "something other than numbers"),
        (
            {"outputs": [{"name": "y", "shape": [1], "datatype": "FP32", "data": [None]}]},
            "something other than numbers",
        ),
        ({"outputs": [{"name": "y", "shape": [1], "datatype": "UINT8", "data": [300]}]}, "that are not UINT8"),
        ({"outputs": [{"name": "y", "shape": [-1], "datatype": "FP32", "data": [1]}]}, "1 numbers for the shape [-1]"),
        ({"outputs": [{"name": "y", "shape": [2], "datatype": "FP32", "data": [[1], [1, 2]]}]}, "different lengths"),
        ({"outputs": [{"shape": [1], "datatype": "FP32", "data": [1]}]}, "outputs[0]"),
        (
            {"outputs": [{"name": "y", "shape": [1], "datatype": "FP32", "parameters": {"binary_data_size": 4}}]},
            "has no data in the JSON (binary_data_size)",
        ),
        ({"predictions": [{"a": 1.5}, {"b": 1.5}]}, "something other than numbers"),
        ({"outputs": []}, "an answer of an inference server"),
    ],
)
def test_an_answer_that_cannot_be_read_is_told_in_a_sentence(
    tmp_path: Path, document: dict[str, Any], says: str
) -> None:
    with pytest.raises(cp_debug.InputError, match=f"answer.json.*{re.escape(says)}"):
        read_dump(written(tmp_path, document))
