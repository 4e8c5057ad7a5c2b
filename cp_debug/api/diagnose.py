"""``diagnose`` and ``assert_agree``: a bisect of any model that a Python program holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from cp_debug.api.dumps import DEFAULT_REFERENCE, with_dump
from cp_debug.api.models import ModelLike, modes_kept, samples_in, to_model
from cp_debug.api.words import about, in_python_words, shown_steps
from cp_debug.backends.base import Backend
from cp_debug.bisect.engine import Options, bisect
from cp_debug.bisect.result import BisectResult
from cp_debug.display import OnStep
from cp_debug.errors import InputError
from cp_debug.reading import RESULT
from cp_debug.recipes.registry import is_folder
from cp_debug.reports.files import write_json
from cp_debug.reports.summary import disagreement

DEFAULTS = Options()


class _Default(str):
    """A default that is told from the same text given by the caller."""

    __slots__ = ()


DEFAULT_BACKENDS = _Default("torch,ort")
"""With ``test_tensors``, which are the test, the reference alone."""


@in_python_words
def diagnose(
    model: ModelLike,
    backends: str | Sequence[str] | Sequence[Backend] = DEFAULT_BACKENDS,
    *,
    inputs: Any = None,
    test_model: ModelLike | None = None,
    test_tensors: str | Path | Mapping[str, Any] | None = None,
    tensors_precision: str = "fp32",
    channels_last: bool = False,
    flat: bool = False,
    options: Options = DEFAULTS,
    progress: bool | None = None,
    on_step: OnStep | None = None,
) -> BisectResult:
    """Run a model on several backends, compare them layer by layer, and name the layers that introduce an error.

    ``model`` and ``test_model`` (another model for the tests): the path of an ``.onnx``, ``.pt2`` or TorchScript file,
    or of a folder of transformers; an ``onnx.ModelProto``, a ``torch.nn.Module``, ``ScriptModule`` or
    ``ExportedProgram``, a function of tensors, a recipe's name (``centerpoint:tiny``) or ``file.py:callable``.
    ``backends``: the reference and the tests, as on the command line. ``inputs``: tensors or arrays (a tuple, or a
    mapping by name; for ONNX files also a list of mappings, one a sample), or the path of a file of them; None has an
    ONNX file's made up from ``options.seed``.
    ``test_tensors`` are the test's values instead of a run: a mapping by the names of an ONNX file's values, or the
    path of a dump (``.npy`` files in a folder, ``.npz``, safetensors, Polygraphy's JSON, ``.pb``). They were computed
    elsewhere in ``tensors_precision``, from ``inputs`` or from the inputs that the dump holds; ``channels_last``: as
    NHWC; ``flat``: row by row, without the graph's axes. ``backends`` is then the reference alone.
    ``options.save`` is a folder for the result and its tensors, which ``open_result`` reads.
    ``progress`` None shows what is being done in a terminal or notebook; ``on_step`` is told it instead.

    Raises InputError for unusable models, inputs and options, BackendUnavailable and MissingPackage for what is not
    here; never for a divergence.
    """
    with modes_kept(model, test_model), shown_steps(progress, on_step) as step:
        prepared, path = to_model(model, inputs if inputs is not None else options.inputs, reading=options.reading)
        options = replace(options, inputs=path, samples=samples_in(inputs, options.samples))
        if test_tensors is not None:
            if test_model is not None:
                raise InputError("test_tensors: given together with test_model; expected one of them")
            reference = DEFAULT_REFERENCE if backends is DEFAULT_BACKENDS else backends
            if not isinstance(reference, str):
                raise InputError("backends: with test_tensors expected the reference's name")
            tensors = Path(test_tensors) if isinstance(test_tensors, str) else test_tensors
            prepared, backends, taken = with_dump(
                prepared,
                reference,
                tensors,
                tensors_precision,
                channels_last=channels_last,
                flat=flat,
                inputs_given=inputs is not None or path is not None,
                inputs=path,
            )
            options = replace(options, samples=taken)
        prepared_test = None if test_model is None else _test_model(test_model, inputs)
        made = cast("str | Sequence[Backend]", backends)  # names in a list are one text by now
        result = bisect(prepared, made, test_model=prepared_test, options=options, on_step=step)
        if options.save is not None:
            write_json(result, options.save / RESULT)
        return result


@in_python_words
def assert_agree(
    model: ModelLike,
    backends: str | Sequence[str] | Sequence[Backend] = DEFAULT_BACKENDS,
    *,
    inputs: Any = None,
    test_model: ModelLike | None = None,
    test_tensors: str | Path | Mapping[str, Any] | None = None,
    tensors_precision: str = "fp32",
    channels_last: bool = False,
    flat: bool = False,
    options: Options = DEFAULTS,
    progress: bool | None = False,
    on_step: OnStep | None = None,
) -> BisectResult:
    """Check that every test backend agrees with the reference: no guilty layer, every output within the tolerance.

    The arguments are those of ``diagnose``, but progress is not shown unless it is asked for. Returns its result.
    Raises AssertionError of at most ten lines, which name the guilty layer first, then the cause, the fix and how to
    see more, when they do not agree; its attribute ``result`` is the result. Raises the errors of ``diagnose``.
    """
    __tracebackhide__ = True  # in pytest the test's own line is what matters
    result = diagnose(
        model,
        backends,
        inputs=inputs,
        test_model=test_model,
        test_tensors=test_tensors,
        tensors_precision=tensors_precision,
        channels_last=channels_last,
        flat=flat,
        options=options,
        progress=progress,
        on_step=on_step,
    )
    if not result.agrees:
        more = "see more: cp_debug.diagnose(…).show(), or `cpdebug bisect … --html`"
        error = AssertionError(f"{disagreement(result)}\n{more}")
        error.result = result  # type: ignore[attr-defined]
        raise error
    return result


def _test_model(test_model: ModelLike, inputs: Any) -> Any:
    """The test model in a form that ``bisect`` takes: the path of an ONNX file as it is, else a model."""
    folder = isinstance(test_model, str | Path) and is_folder(Path(test_model))
    is_path = isinstance(test_model, str | Path) and not folder
    if is_path and (str(test_model).endswith((".onnx", ".xml")) or Path(test_model).is_dir()):
        if not Path(test_model).exists():
            raise InputError(f"test_model: no such file {test_model}")
        return Path(test_model)
    with about("test_model"):
        return to_model(test_model, None if folder else inputs, what="test_model")[0]
