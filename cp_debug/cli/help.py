"""Help of a command: options in groups, the most important ones described first, names never cut."""

from __future__ import annotations

import textwrap
from collections import defaultdict
from itertools import zip_longest
from typing import Any

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
