"""Flags that a user typed, and the refusal of those that would do nothing."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from contextvars import ContextVar
from typing import Any, ClassVar, TypeVar

import typer
from typer.core import TyperCommand

from cp_debug.cli.console import NO_READER, errors, forget_output, results_alone
from cp_debug.cli.help import write_options
from cp_debug.cli.library_log import no_library_warnings
from cp_debug.cli.own_words import all_options, in_own_words
from cp_debug.cli.saving import check_folders, check_outputs, no_empty_folders
from cp_debug.errors import CpdebugError, InputError, Terminated

_TYPED: ContextVar[Mapping[str, str] | None] = ContextVar("typed", default=None)


T = TypeVar("T")
INTERRUPTED = 130
"""Exit code after Ctrl-C, as in shells."""


class Command(TyperCommand):
    """A command that remembers which of its flags were typed, while it runs; a default is not.

    Ctrl-C and a reader that has gone have exit codes of their own: the library's is 1, here a divergence.
    """

    whole: ClassVar[Any] = None
    """Makes the whole command line, which is asked what options other commands have."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        for parameter in self.params:
            if parameter.param_type_name == "argument":  # as messages name it
                parameter.metavar = parameter.metavar or (parameter.name or "").upper()

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]
        """Parse the words of the command line; ``--help-all`` is ``--help`` with every option described."""
        ctx.meta[_EVERY] = "--help-all" in args
        return super().parse_args(ctx, ["--help" if word == "--help-all" else word for word in args])

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the options in groups; see ``help.write_options``."""
        write_options(self, ctx, formatter, every=ctx.meta[_EVERY])

    def invoke(self, ctx: typer.Context) -> Any:  # type: ignore[override]
        """Run the command, with its typed flags remembered meanwhile.

        Raises InputError for numbers without end, and for an output that would replace what is read or another output.
        """
        check_numbers(self, ctx.params)
        flags = {p.name: _flag(p.opts) for p in self.params if p.name}
        check_outputs(ctx.params, flags)
        if ctx.params.get("config") is None:  # else its work folder may be made, and hold what is written
            check_folders(ctx.params, flags)
        token = _TYPED.set(_spelled(self, ctx))
        try:
            with results_alone(), no_library_warnings(), no_empty_folders(ctx.params):
                return super().invoke(ctx)
        except CpdebugError as error:
            if self.whole is not None and error.args and "--" in str(error.args[0]):
                own = [option for p in self.params for option in (*p.opts, *p.secondary_opts)]
                error.args = (in_own_words(str(error.args[0]), own, all_options(self.whole)), *error.args[1:])
            raise
        except Terminated as end:
            raise typer.Exit(end.code) from None
        except KeyboardInterrupt:
            errors.print("interrupted")
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:
            forget_output()
            raise typer.Exit(NO_READER) from None
        finally:
            _TYPED.reset(token)


_EVERY = "cp_debug.help_all"


class JsonCommand(Command):
    """A command whose ``--json`` may stand alone, which is ``--json -``: what follows may be an argument."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]
        """Parse the words of the command line, with a value for every ``--json``."""
        given, left = list[str](), list(args)
        while left and left[0] != "--":
            word = left.pop(0)
            if word == "--json":
                word = f"--json={left.pop(0) if left and self._is_target(ctx, given, left) else '-'}"
            given.append(word)
        return super().parse_args(ctx, [*given, *left])

    def _is_target(self, ctx: typer.Context, given: list[str], left: list[str]) -> bool:
        """Whether the first word of ``left`` says where JSON goes: else it is a flag, or an argument that is wanted."""
        word = left[0]
        if word == "-" or word.startswith("-"):
            return word == "-"
        if word.endswith(".json"):
            return True
        rest = ["--json=-" if each == "--json" else each for each in left]
        try:
            _, too_many, _ = self.make_parser(ctx).parse_args([*given, *rest])
        except Exception as error:
            if not hasattr(error, "format_message"):
                raise
            return False  # what the parser raises: it is told when all is parsed
        return bool(too_many)


def _flag(spellings: list[str]) -> str:
    """A parameter as messages name it: an option by its long form, an argument in capitals."""
    name = max(spellings, key=len)
    return name if name.startswith("-") else name.upper()


def check_numbers(command: TyperCommand, given: Mapping[str, Any]) -> None:
    """Raise InputError for a number that is none or has no end: a comparison with either is always, or never, true."""
    for parameter in command.params:
        value = given.get(parameter.name or "")
        if isinstance(value, float) and not math.isfinite(value):
            raise InputError(f"{max(parameter.opts, key=len)}: {value:g}; expected a finite number")


def typed(parameters: Iterable[str]) -> list[str]:
    """Flags among ``parameters`` that were typed, as they are spelled; none outside of a command line."""
    spelled = _TYPED.get() or {}
    return [spelled[name] for name in parameters if name in spelled]


def refuse(parameters: Iterable[str], *, unless: bool, why: str) -> None:
    """Raise InputError for the first of ``parameters`` that was typed, as it would do nothing, ``unless`` it would.

    ``why`` says what is missing, or what decides instead.
    """
    if not unless and (flags := typed(parameters)):
        raise InputError(f"{flags[0]}: it would do nothing here: {why}")


def _spelled(command: TyperCommand, ctx: typer.Context) -> dict[str, str]:
    flags = {}
    for parameter in command.params:
        source = ctx.get_parameter_source(parameter.name or "")
        if parameter.name and source is not None and source.name == "COMMANDLINE":
            negated = ctx.params.get(parameter.name) is False and parameter.secondary_opts
            options = parameter.secondary_opts if negated else parameter.opts
            flags[parameter.name] = max(options, key=len)
    return flags


def refuse_export_flags(models: Iterable[str]) -> None:
    """Refuse --exporter and --unfolded where every model is an ONNX file, which nobody exports."""
    names = list(models)
    onnx = bool(names) and all(name.endswith(".onnx") for name in names)
    refuse(("exporter", "unfolded"), unless=not onnx, why=f"{', '.join(names)} is exported already")


def once(pairs: Iterable[tuple[str, T]], flag: str) -> dict[str, T]:
    """The (name, value) pairs of a repeatable flag. Raises InputError for a name that is given twice."""
    found: dict[str, T] = {}
    for name, value in pairs:
        if name in found:
            raise InputError(f"{flag}: {name!r} is given twice; expected it once")
        found[name] = value
    return found


def refuse_export_folder(model: str) -> None:
    """Refuse --onnx-dir where the model is an ONNX file, which is run itself."""
    refuse(("onnx_dir",), unless=not model.endswith(".onnx"), why=f"{model} is exported already")


def refuse_seed(models: Iterable[str], inputs: object, samples: int | None = None) -> None:
    """Refuse --seed where nothing is made up: each model has weights of its own, and ``inputs`` are given, or one
    sample is taken of models that come with an example. ``samples`` None: the command takes one, and no --samples."""
    if not typed(("seed",)):
        return
    from cp_debug.recipes.registry import kind_of

    kinds = {kind_of(model) for model in models}
    own = kinds <= {"onnx", "program", "callable"}
    refuse(("seed",), unless=inputs is None or not own, why=f"the inputs are those of {inputs}")
    why = "the first sample is the model's own example; expected --samples 2 or more"
    if samples is None:
        why = "the one sample is the model's own example"
    refuse(("seed",), unless=(samples or 1) > 1 or not kinds <= {"program", "callable"}, why=why)


def refuse_data_flags(data: object) -> None:
    """Refuse the flags about an info file where there is none."""
    why = "without --data, the samples are synthetic scenes"
    refuse(("data_root", "sweeps", "skip_missing"), unless=data is not None, why=why)
