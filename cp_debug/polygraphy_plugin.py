"""Plug-in of Polygraphy: ``polygraphy run net.onnx … --cpdebug DIR`` has cpdebug judge the runs that Polygraphy made.

Polygraphy loads this module, and nothing else does: loaders, shapes, calibrators and plug-ins are those of its command
line. What ``--onnx-outputs mark all --trt-outputs mark all`` shows is judged layer by layer, else the outputs alone.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from polygraphy.comparator import RunResults
from polygraphy.logger import G_LOGGER
from polygraphy.tools.args import ComparatorCompareArgs, ComparatorRunArgs, ModelArgs, TrtConfigArgs
from polygraphy.tools.args.base import BaseArgs
from polygraphy.tools.script import inline, make_invocable, safe

PRECISIONS = ("int8", "fp8", "bf16", "fp16", "tf32")
"""Flags of Polygraphy for precisions of TensorRT, the coarsest first: an engine may use any that is set."""
CALIBRATED = ("int8", "fp8")
"""Those whose scales an engine may choose itself, where the model has no Q/DQ pairs."""
INSTEAD = "give a model with Q/DQ pairs, or let cpdebug build the engine: cpdebug bisect MODEL -b ort,trt-int8"
INPUTS, RESULTS = "inputs.json", "results.json"


def argument_groups() -> list[BaseArgs]:
    """Groups of options that ``polygraphy run`` gets."""
    return [CpdebugArgs()]


class CpdebugArgs(BaseArgs):
    """
    cpdebug: naming the layer that introduces an error.

    Depends on:

        - ModelArgs
        - ComparatorRunArgs
        - ComparatorCompareArgs
        - TrtConfigArgs
    """

    def add_parser_args_impl(self) -> None:
        """Add ``--cpdebug``."""
        self.group.add_argument(
            "--cpdebug",
            metavar="DIR",
            help="Have cpdebug judge what each runner computed, by the ONNX model in FP32, and write a page for each "
            "to this folder. Use '--onnx-outputs mark all' or '--trt-outputs mark all' to have it name the layer",
            default=None,
        )

    def parse_impl(self, args: Any) -> None:
        """Have the runs saved, and judged after Polygraphy's own comparison. Ends Polygraphy for models but ONNX's."""
        if args.cpdebug is None:
            return
        model, run = self.arg_groups[ModelArgs], self.arg_groups[ComparatorRunArgs]
        if model.path is None or not model.model_type.is_onnx():
            G_LOGGER.critical(f"--cpdebug: {model.path or 'no model'}; expected an ONNX model")
        folder = Path(args.cpdebug)
        folder.mkdir(parents=True, exist_ok=True)
        run.save_inputs_path = run.save_inputs_path or str(folder / INPUTS)
        run.save_outputs_path = run.save_outputs_path or str(folder / RESULTS)
        engine = self.arg_groups[TrtConfigArgs]
        words = {
            "model": str(model.path),
            "inputs": run.save_inputs_path,
            "results": run.save_outputs_path,
            "folder": str(folder),
            "engine": [name for name in PRECISIONS if getattr(engine, name, None)],
        }
        comparison = self.arg_groups[ComparatorCompareArgs]
        compare = comparison.add_to_script_impl

        def compare_and_judge(script: Any, results_name: Any) -> Any:
            success = compare(script, results_name=results_name)
            script.add_import(imports=["judge"], frm=__name__)
            script.append_suffix(safe("\n# Judgement by cpdebug\njudged = {:}", make_invocable("judge", **words)))
            return inline(safe("({success} and judged)", success=success))

        comparison.add_to_script_impl = compare_and_judge


def judge(model: str, inputs: str, results: str, folder: str, engine: Sequence[str]) -> bool:
    """Judge every runner's values against the ONNX model in FP32; say what is found and write a page for each.

    ``inputs`` and ``results`` are files that Polygraphy saved, ``engine`` are the precisions that engines may use
    beside FP32, the coarsest first. Returns whether all agree; False, too, where one cannot be judged, which a sentence
    says. A model with Q/DQ pairs says itself what is quantized.
    """
    import cp_debug
    from cp_debug.graph.graph import Graph

    is_quantized, agree = Graph(Path(model)).precision == "int8", True
    coarsest = next((name for name in engine if not (is_quantized and name in CALIBRATED)), "fp32")
    for name, iterations in RunResults.load(results).items():
        own = Path(folder, re.sub(r"[^\w.-]+", "-", name) + ".json")
        RunResults([(name, iterations)]).save(str(own))
        precision = coarsest if name.startswith("trt") else "fp32"
        try:
            if precision in CALIBRATED:
                raise cp_debug.InputError(f"its results do not hold the scales of {precision.upper()}; {INSTEAD}")
            result = cp_debug.diagnose(model, inputs=inputs, test_tensors=own, tensors_precision=precision)
        except cp_debug.CpdebugError as error:
            G_LOGGER.error(f"cpdebug cannot judge {name}: {error}")
            agree = False
            continue
        page = own.with_suffix(".html")
        result.write_html(page)
        G_LOGGER.info(f"cpdebug, {name}:\n{result}\nreport: {page}")
        agree &= result.agrees
    return agree
