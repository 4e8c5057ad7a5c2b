"""OpenVINO's IR (``.xml`` beside ``.bin``) as the test model of an ONNX file, whose values have the same names."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
from onnx import ModelProto, numpy_helper

from cp_debug.backends.base import Backend, Program
from cp_debug.backends.openvino_backend import words
from cp_debug.errors import InputError
from cp_debug.graph.graph import Graph
from cp_debug.graph.surgery import save
from cp_debug.optional import require
from cp_debug.programs.ir_quantizers import Quantizers
from cp_debug.safe_text import did_you_mean

IR = ".xml"
"""Suffix of such files."""


def ir_program(program: Program, path: Path, folder: Path) -> Program:
    """The program that runs the IR at ``path``. Its graph, written to ``folder``, is the one of ``program`` with the
    weights that the IR has under the same names, as a converter may have rounded them to FP16, and with Q/DQ pairs for
    the quantizers that NNCF put in.

    Raises InputError for a file that OpenVINO does not read, one without an output of the graph, and one with a
    quantizer that has no place in it.
    """
    with words(path, "cannot read it"):
        model, graph = require("openvino", "openvino").Core().read_model(str(path)), program.graph
    outputs = {name for port in model.outputs for name in port.get_names()}
    if lost := [value.name for value in graph.outputs if value.name not in outputs]:
        hint = did_you_mean(lost[0], outputs) or f"; it has {', '.join(sorted(outputs))}"
        raise InputError(f"--test-model: {path} has no output that is called {lost[0]!r}{hint}")
    stored = {
        name: operation.data
        for operation in model.get_ops()
        if operation.get_type_name() == "Constant"
        for name in operation.output(0).get_names()
    }
    proto = ModelProto()
    proto.CopyFrom(graph.proto)
    changed = False
    for weight in proto.graph.initializer:
        own, theirs = graph.initializer(weight.name), stored.get(weight.name)
        if theirs is not None and theirs.shape == own.shape and theirs.dtype.kind == own.dtype.kind == "f":
            theirs = np.asarray(theirs, own.dtype)
            if not np.array_equal(own, theirs, equal_nan=True):
                weight.CopyFrom(numpy_helper.from_array(theirs, weight.name))
                changed = True
    quantizers = Quantizers(proto, graph)
    changed |= quantizers.add(model)
    if lost := quantizers.unplaced:
        raise InputError(f"--test-model: {path} has the quantizer {lost[0]!r}, which has no place in {graph}")
    if not changed:
        return replace(program, ir=path)
    file = folder / f"{program.name}.ir.onnx"
    save(proto, graph, file)
    return Program(program.name, Graph(file, source=graph), example=program.example, ir=path)


def check_run_irs(backends: Iterable[Backend], programs: Iterable[Program]) -> None:
    """Raise InputError where a backend does not run the IR of a program as it is."""
    irs = [program.ir for program in programs if program.ir is not None]
    for backend in backends if irs else ():
        if backend.spec.family != "openvino" or backend.precision == "int8":
            others = "openvino, openvino-fp16 and openvino-bf16"
            raise InputError(f"--test-model: {irs[0]} is an IR of OpenVINO, which {others} run, not {backend.spec}")
