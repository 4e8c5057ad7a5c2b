"""Commands: the flags that a user typed, refusal of those that would do nothing, help and messages.

In help options stand in groups, the most important ones described first, and names are never cut. In messages an option
that the command lacks is named with the command that has it.
"""

from __future__ import annotations

import math
import re
import textwrap
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextvars import ContextVar
from functools import cache
from itertools import zip_longest
from typing import Any, ClassVar, TypeVar

import typer
from typer.core import TyperCommand

from cp_debug.cli.console import NO_READER, errors, forget_output, no_library_warnings, results_alone
from cp_debug.cli.given import check_folders, check_outputs, no_empty_folders
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
        for parameter in self.params:  # a comparison with no number, or one without end, is always, or never, true
            value = ctx.params.get(parameter.name or "")
            if isinstance(value, float) and not math.isfinite(value):
                raise InputError(f"{max(parameter.opts, key=len)}: {value:g}; expected a finite number")
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


_SAME = (
    ("--backends", "--backend"),
    ("--tensors-layout", "--layout"),
    ("--inputs", "--data", "--calib-data"),
)
"""Options that mean the same, and are called so in one command or another."""
_OPTION = re.compile(r"(?<![\w`-])(--[a-z][a-z0-9]*(?:-[a-z0-9]+)*)(?![\w-])( [A-Z][A-Z=]*\b)?")
_QUOTED = re.compile(r"(`[^`\n]*`|\b(?:cpdebug|pip|python|dask|polygraphy|trtexec) [^;,:\n]*)")
"""Commands to be typed, whose options are their own."""


def in_own_words(text: str, own: Iterable[str], elsewhere: Mapping[str, str]) -> str:
    """The message, with ``elsewhere``'s command behind options that are none of ``own``: ``--map of `cpdebug bisect```.

    One that the command has under another name gets that; one in front of the whole message, which says whose value is
    wrong, goes. Options of commands that the message quotes stay.
    """
    options = set(own)

    def placed(match: re.Match[str]) -> str:
        flag, value = _own_name(match[1], options), match[2] or ""
        where = "" if flag in options or flag not in elsewhere else f" of `cpdebug {elsewhere[flag]}`"
        return f"{flag}{value}{where}"

    front = re.match(r"(--[a-z][\w-]*): ", text)
    if front and front[1] in elsewhere and _own_name(front[1], options) not in options:
        text = text[front.end() :]
    return "".join(part if i % 2 else _OPTION.sub(placed, part) for i, part in enumerate(_QUOTED.split(text)))


def _own_name(flag: str, options: set[str]) -> str:
    same = next((group for group in _SAME if flag in group), ())
    return flag if flag in options else next((other for other in same if other in options), flag)


@cache
def all_options(application: Callable[[], typer.Typer]) -> dict[str, str]:
    """Option → the command of ``application`` that has it, ``bisect`` before others."""
    from typer.main import get_command

    found: dict[str, str] = {}
    for name, command in sorted(_commands(get_command(application())), key=lambda each: each[0] != "bisect"):
        for parameter in command.params:
            for option in (*parameter.opts, *parameter.secondary_opts):
                found.setdefault(option, name)
    return found


def _commands(command: Any, path: Sequence[str] = ()) -> list[tuple[str, Any]]:
    inner = getattr(command, "commands", None)
    if inner is None:
        return [(" ".join(path), command)]
    return [each for name, below in inner.items() for each in _commands(below, (*path, name))]


FIRST = "backends model inputs goal precision target test_model output html save data checkpoint json samples"
"""Options that matter most, wherever a command has them; ``SHOWN`` of them are described in a short help."""
SHOWN = 5
LONGEST = 58
"""Lines of a help that describes every option; a longer one describes ``SHOWN``, and names the others."""
NAME = "Options"
COLUMN = 26
"""Characters of the widest name beside which a description begins."""
GROUPS = {
    "Model": (
        "backends model checkpoint test_model test_checkpoint test_train_mode test_out_of_place onnx_dir "
        "exporter unfolded keep_fp32 opset simplify rot_y_axis_reference precision"
    ),
    "Inputs": (
        "inputs samples seed shape image data data_root sweeps skip_missing min_points draws batch batches scenes"
    ),
    "Dumped tensors": "test_tensors tensors_precision tensors_layout maps",
    "Judgement": (
        "rtol atol oracle oracle_device replay explain knobs memory max_builds goal scenario tolerance max_abs max_drop"
    ),
    "Report": "level show_all quiet json csv html save output overwrite junit plot log",
    "INT8": "calib_data calib_samples calib_method method skip_layers",
    "TensorRT": (
        "trt_python strongly_typed probes profile workspace timing_cache calibration_cache trt_calibrator "
        "trt_calib_data trt_loader no_cache builder_level tactic_sources build_timeout"
    ),
}
"""Group → its options, by their names in Python; one whose name means something else elsewhere declares its panel."""


def write_options(command: Any, ctx: Any, formatter: Any, *, every: bool) -> None:
    """Write a command's arguments and options into a formatter of click.

    ``every``: describe all of them; else a help of more than ``LONGEST`` lines describes the most important ones alone.
    """
    parameters = [parameter for parameter in command.get_params(ctx) if not getattr(parameter, "hidden", False)]
    records = {parameter: record for parameter in parameters if (record := _record(parameter, ctx)) is not None}
    groups = {"Arguments": [p for p in records if p.param_type_name == "argument"]}
    groups |= grouped([p for p in records if p.param_type_name == "option"])
    sections = {name: [records[p] for p in members] for name, members in groups.items() if members}
    text = "".join(_section(name, rows, formatter.width) for name, rows in sections.items())
    if not every and text.count("\n") > LONGEST - 6:
        own = [p for name in ("Arguments", NAME) for p in groups.get(name, ())]
        options = [p for members in groups.values() for p in members if p.name in FIRST.split() and p not in own]
        first = sorted(options, key=lambda option: FIRST.split().index(option.name))[:SHOWN]
        text = _section("Arguments", sections.get("Arguments", []), formatter.width)
        text += _section(NAME, [records[p] for p in (*first, *groups.get(NAME, ()))], formatter.width)
        left = {name: [p for p in members if p not in (*own, *first)] for name, members in groups.items()}
        rest = [(name, " ".join(max(p.opts, key=len) for p in members)) for name, members in left.items() if members]
        text += _section("More options, which --help-all describes", rest, formatter.width)
    formatter.write(text)


def grouped(options: list[Any]) -> dict[str, list[Any]]:
    """Group → options, in the order of ``GROUPS``; other panels and ``NAME``, which has the rest, stand behind."""
    place = {name: group for group, names in GROUPS.items() for name in names.split()}
    found: dict[str, list[Any]] = defaultdict(list)
    for option in options:
        found[getattr(option, "rich_help_panel", None) or place.get(option.name or "", NAME)].append(option)
    order = (*GROUPS, *(panel for panel in found if panel not in GROUPS and panel != NAME), NAME)
    return {group: found[group] for group in order if group in found}


def _record(parameter: Any, ctx: Any) -> tuple[str, str] | None:
    """(names, description) as plain text: code is quoted where a help is drawn with markup."""
    record = parameter.get_help_record(ctx)
    return None if record is None else (record[0], " ".join(record[1].replace("`", "").split()))


def _section(title: str, rows: list[tuple[str, str]], width: int) -> str:
    """A heading and a list of (name, text); a name is never cut, nor broken at a hyphen."""
    if not rows:
        return ""
    column = min(max(len(name) for name, _ in rows), COLUMN) + 4
    lines = ["", f"{title}:"]
    for name, text in rows:
        wrapped = textwrap.wrap(text, width - column, break_on_hyphens=False, break_long_words=False) or [""]
        if len(name) > column - 4:
            lines.append(f"  {name}")
            name = ""
        lines += [
            f"  {start:<{column - 2}}{part}".rstrip() for start, part in zip_longest([name], wrapped, fillvalue="")
        ]
    return "\n".join(lines) + "\n"
