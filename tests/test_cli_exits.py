"""How commands end when nothing was decided: unexpected errors, Ctrl-C, no reader, flags that would do nothing."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import numpy as np
import pytest
from nets import NetBuilder, second_like
from onnx import numpy_helper
from states import until
from test_cli import run
from test_trt_runner import install
from typer.main import get_command
from typer.testing import CliRunner

import cp_debug
from cp_debug.cli import crash
from cp_debug.cli.given import has_result, replacing
from cp_debug.cli.main import app, main

FAILING = """
import sys
from cp_debug.cli import installation, main
def known_models():
    raise {error}
import cp_debug.recipes.registry as registry
registry.known_models = known_models
sys.argv = ["cpdebug", "models"]
main.main()
"""


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return second_like(tmp_path_factory.mktemp("net") / "net.onnx", depth=1, size=16)


def failing(error: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """``cpdebug models`` where what it lists raises."""
    return subprocess.run(
        [sys.executable, "-c", FAILING.format(error=error)],
        capture_output=True,
        text=True,
        env=os.environ | environment,
    )


@pytest.mark.few(1)
@pytest.mark.parametrize(
    "error", ["ValueError('a [bold]strange\\x1b[31m\\nvalue')", "KeyError('x')", "RecursionError()"]
)
def test_an_unexpected_error_is_told_kept_and_no_verdict(tmp_path: Path, error: str) -> None:
    done = failing(error, XDG_STATE_HOME=str(tmp_path))
    assert done.returncode == 70
    assert not done.stdout
    assert "Traceback" not in done.stderr
    assert "\x1b" not in done.stderr
    assert len(done.stderr.splitlines()) <= 4
    (log,) = (tmp_path / "cpdebug").glob("*.log")
    assert f"log: {log}" in done.stderr
    text = log.read_text()
    assert "command   cpdebug models" in text
    assert f"cpdebug   {cp_debug.__version__}" in text
    assert "known_models" in text
    assert f"error: an unexpected error, so nothing was decided: {error.partition('(')[0]}" in done.stderr


def test_without_a_folder_for_logs_the_error_is_told_all_the_same(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    done = failing("ValueError('x')", XDG_STATE_HOME=str(blocked), TMPDIR=str(tmp_path))
    assert done.returncode == 70
    assert "ValueError: x" in done.stderr
    assert "log:" in done.stderr


def test_few_logs_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    folder = crash.log_folder()
    folder.mkdir()
    for place in range(crash.KEPT + 3):
        (folder / f"2020-01-{place:02d}.log").write_text("")
    newest = crash.write_log(ValueError("x"))
    assert len(list(folder.glob("*.log"))) == crash.KEPT
    assert newest.is_file()


def test_version() -> None:
    code, said = run("--version")
    assert code == 0
    assert re.fullmatch(rf"cpdebug {re.escape(cp_debug.__version__)}( \(commit [0-9a-f]{{7,}}(-dirty)?\))?\n", said)


@pytest.mark.process
def test_ctrl_c_says_so_and_is_no_verdict(tmp_path: Path) -> None:
    """It comes while a model's forward runs."""
    (tmp_path / "nets.py").write_text(
        "import pathlib, time, torch\n"
        "class Net(torch.nn.Linear):\n"
        "    def forward(self, x):\n"
        "        pathlib.Path(__file__).with_name('runs').touch()\n"
        "        time.sleep(1000)\n"
        "def build(): return Net(4, 4), torch.ones(1, 4)\n"
    )
    command = [sys.executable, "-m", "cp_debug", "bisect", f"{tmp_path / 'nets.py'}:build", "-b", "torch,emu-tf32"]
    started = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    until((tmp_path / "runs").exists)
    started.send_signal(signal.SIGINT)
    _, said = started.communicate()
    assert started.returncode in (130, -signal.SIGINT)  # Python ends so inside exec(); a shell calls both 130
    assert said.strip().splitlines()[-1] == "interrupted"
    assert "Traceback" not in said


def test_ctrl_c_while_the_command_is_loaded_says_so_too() -> None:
    script = """
import sys
class Interrupted:
    def find_spec(self, name, *rest):
        if name == "typer":
            raise KeyboardInterrupt
sys.meta_path.insert(0, Interrupted())
from cp_debug.__main__ import main
main()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


@pytest.mark.slow
@pytest.mark.parametrize("arguments", ["demo", pytest.param("doctor --json", marks=pytest.mark.slow)])
def test_a_reader_that_has_gone_is_no_verdict(arguments: str) -> None:
    command = f"{sys.executable} -m cp_debug {arguments} | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.stdout.strip() == "141"
    assert not done.stderr


NO_EFFECT = [
    "-b ort,ort-all --probes boundaries",
    "-b ort,ort-all --strongly-typed",
    "-b ort,ort-all --trt-python python3",
    "-b ort,ort-all --workspace 100",
    "-b ort,ort-all --timing-cache cache",
    "-b ort,ort-all --tactic-sources +CUDNN",
    "-b ort,ort-all --trt-loader loader.py",
    "-b ort,ort-all --profile x:1x1:1x1:1x1",
    "-b ort,emu-fp16 --trt-calibrator entropy",
    "-b ort,emu-fp16 --trt-calib-data x",
    "-b ort,emu-fp16 --calibration-cache x",
    "-b ort,emu-fp16 --skip-layers a",
    "-b ort,emu-fp16 --calib-samples 8",
    "-b ort,emu-fp16 --calib-method mse",
    "-b ort,emu-fp16 --calib-data x",
    "-b ort,ort-all --keep-fp32 a",
    "-b ort,emu-fp32 --keep-fp32 a",
    "-b ort,ort-all --exporter dynamo",
    "-b ort,ort-all --unfolded",
    "-b torch,ort --test-out-of-place",
    "-b torch,ort --test-train-mode",
    "-b ort,ort-all --no-replay --oracle fp64",
    "-b ort,ort-all --level stages --all",
]


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ("CUDNN", "--tactic-sources: expected +NAME or -NAME, as -JIT_CONVOLUTIONS,+CUBLAS; got 'CUDNN'"),
        ("-CUDNN,", "--tactic-sources: expected +NAME or -NAME, as -JIT_CONVOLUTIONS,+CUBLAS; got ''"),
        ("-CUDNN,+CUDNN", "--tactic-sources: 'CUDNN' is given twice; expected it once"),
    ],
)
def test_tactic_sources_are_read_before_anything_is_built(net: Path, sources: str, message: str) -> None:
    code, text = run("bisect", net, "-b", "ort,trt-fp16", "--trt-python", sys.executable, f"--tactic-sources={sources}")
    assert code == 2
    assert message in " ".join(text.split())


@pytest.mark.parametrize("flags", NO_EFFECT)
def test_a_flag_that_would_do_nothing_is_refused(net: Path, flags: str) -> None:
    code, text = run("bisect", net, *flags.split())
    assert code == 2
    flag = next(f for f in reversed(flags.split()) if f.startswith("--"))
    assert text.startswith(f"{flag}: it would do nothing here: ")


def test_other_commands_refuse_them_too(net: Path, tmp_path: Path) -> None:
    for command in (
        ["capture", net, "-b", "ort", "-o", tmp_path / "out", "--workspace", "9"],
        ["capture", net, "-b", "ort", "-o", tmp_path / "out", "--unfolded"],
        ["search", net, "-b", "ort,emu-fp16acc", "--trt-python", "python3"],
        ["search", net, "-b", "ort,emu-fp16acc", "--data", "infos.pkl"],
        ["eval", "-b", "torch,ort", "--sweeps", "3"],
        ["eval", "-b", "torch,ort", "--skip-layers", "a"],
        ["bench", "-b", "torch,ort", "--trt-python", "python3"],
        ["bench", "centerpoint:tiny", "-b", "torch,ort", "--model", "centerpoint:tiny"],
        ["verify", "centerpoint:tiny", "-s", "torch,ort", "--trt-python", "python3"],
        ["sweep", "bisect", net, "-b", "ort,emu-fp16", "--calib-samples", "4"],
        ["sweep", "bisect", net, "-b", "ort,emu-fp16", "--unfolded"],
        ["sweep", "eval", "-b", "torch,ort", "--data-root", "."],
        ["quantize", "ptq", "-o", tmp_path / "q", "--cache", "x", "--method", "max"],
        ["quantize", "sensitivity", "--from", "q", "--batches", "4"],
        ["quantize", "qat", "--from", "q", "-o", "x", "--epochs", "1", "--steps", "4"],
        ["demo", "--json", "x"],
    ):
        code, text = run(*command)
        assert (code, "it would do nothing here" in text) == (2, True), (command, text)
    assert not list(tmp_path.iterdir())


def test_flags_at_their_default_are_no_mistake_unless_typed(net: Path) -> None:
    assert run("bisect", net, "-b", "ort,ort-all")[0] == 0
    assert run("bisect", net, "-b", "ort,ort-all", "--explain")[0] == 0


def test_an_earlier_run_is_replaced_when_asked_for(net: Path, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    assert run("bisect", net, "-b", "ort,ort-all", "--save", kept)[0] == 0
    before = (kept / "result.json").read_text()
    code, text = run("bisect", net, "-b", "ort,ort-basic", "--save", kept)
    assert (code, text) == (2, f"--save: {kept} holds an earlier run; --overwrite replaces it")
    assert (kept / "result.json").read_text() == before
    assert run("bisect", net, "-b", "ort,ort-basic", "--save", kept, "--overwrite")[0] == 0
    assert sorted(path.name for path in (kept / "sample-0").iterdir() if path.is_dir()) == ["ort", "ort-basic"]
    code, _ = run("bisect", net, "-b", "ort,ort-all", "--inputs", tmp_path / "no.npz", "--save", kept, "--overwrite")
    assert code == 2
    assert (kept / "sample-0" / "ort-basic").is_dir()
    assert run("report", kept, "-f", "markdown")[0] == 0
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


PRINTS = """
import sys, logging, threading
def make():
    print("\\x1b[31mloading\\r100 %")
    sys.stdout.writelines(["::error::", "x"])
    print("written", file=sys.stdout.buffer and sys.stdout, flush=True)
    logging.warning("\\x1b[31mlogged")
    thread = threading.Thread(target=lambda: 1 / 0)
    thread.start()
    thread.join()
    raise ValueError("too far")
"""


def test_what_a_users_module_prints_is_never_among_the_results(tmp_path: Path) -> None:
    (tmp_path / "nets.py").write_text(PRINTS)
    done = CliRunner().invoke(app, ["check", f"{tmp_path / 'nets.py'}:make", "--json"])
    assert "too far" in str(done.exception)
    assert done.stdout == ""
    assert "\\x1b[31mloading\n100 %\n" in done.stderr
    assert "note: ZeroDivisionError was raised in a thread or a finalizer" in done.stderr
    assert "Traceback" not in done.stderr
    assert "\x1b" not in done.stderr
    assert not any(line.startswith("::") for line in done.stderr.splitlines())


@pytest.mark.slow
def test_json_on_stdout_is_json_though_the_module_prints(tmp_path: Path) -> None:
    (tmp_path / "nets.py").write_text(
        "import torch\nclass Net(torch.nn.Module):\n    def forward(self, x):\n"
        "        print('here')\n        return x * 2\n"
        "def make():\n    return Net(), (torch.ones(2),)\n"
    )
    model = f"{tmp_path / 'nets.py'}:make"
    sweep = ["sweep", "bisect", model, "-b", "torch,emu-fp16", "--workers", "1", "--log", str(tmp_path / "l.jsonl")]
    for command in (["check", model, "--json"], ["bisect", model, "-b", "torch,emu-fp16", "--json", "-"], sweep):
        arguments = command if "--json" in command else [*command, "--json", "-"]
        done = subprocess.run([sys.executable, "-m", "cp_debug", *arguments], capture_output=True, text=True)
        assert done.returncode == 0
        assert json.loads(done.stdout) is not None
        assert "here" in done.stderr


def test_what_others_wrote_is_never_replaced(net: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    for command in (["bisect", net, "-b", "ort,ort-all", "--save", tmp_path], ["capture", net, "-o", tmp_path]):
        code, text = run(*command, "--overwrite")
        assert code == 2
        assert "was not written by cpdebug" in text
    assert (tmp_path / "thesis.tex").read_text() == "x"
    out = tmp_path / "out"
    for _ in range(2):
        assert run("capture", net, "-b", "ort", "-o", out, "--overwrite")[0] == 0
    assert run("capture", net, "-b", "ort", "-o", out)[0] == 2


@pytest.mark.parametrize("name", ["result.json", "manifest.json", "sample-0/ort/manifest.json"])
@pytest.mark.parametrize("content", ["{}", "[1]", "no JSON", '{"schema": "https://json-schema.org/draft-07/schema"}'])
def test_a_folder_is_ours_by_what_its_files_say(name: str, content: str, net: Path, tmp_path: Path) -> None:
    """Others call their files so too."""
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text(content)
    code, text = run("bisect", net, "-b", "ort,ort-all", "--save", tmp_path, "--overwrite")
    assert (code, text) == (
        2,
        f"--save: {tmp_path} exists and was not written by cpdebug; expected a new or empty folder",
    )
    assert (tmp_path / name).read_text() == content


@pytest.mark.few(1)
@pytest.mark.parametrize("where", [".", "..", "../kept"])
def test_the_folder_of_the_command_itself_is_not_replaced(
    where: str, net: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = tmp_path / "kept"
    assert run("bisect", net, "-b", "ort,ort-all", "--save", kept)[0] == 0
    monkeypatch.chdir(kept / "sample-0" if where == ".." else kept)
    code, text = run("bisect", net, "-b", "ort,ort-all", "--save", where, "--overwrite")
    said = f"--save: --overwrite would remove {where}, in which this command runs; expected another"
    assert (code, text) == (2, said)
    assert (kept / "result.json").exists()


@pytest.mark.parametrize("name", ["nets/net.onnx", "nets/deeper/net.onnx"])
def test_a_folder_that_holds_what_is_read_is_not_replaced(name: str, net: Path, tmp_path: Path) -> None:
    inside = tmp_path / name
    inside.parent.mkdir(parents=True)
    inside.write_bytes(net.read_bytes())
    code, text = run("bisect", inside, "-b", "ort,ort-all", "--save", tmp_path / "nets", "--overwrite")
    assert (code, text) == (2, f"--save: --overwrite would remove {inside}, which MODEL reads, with it")
    assert inside.exists()


@pytest.mark.parametrize(("made", "left"), [("sample-0", False), ("manifest.json", False), ("result.json", True)])
def test_an_interrupted_run_leaves_no_half_of_a_folder(made: str, left: bool, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    with suppress(KeyboardInterrupt), replacing("--save", kept, False, has_result) as folder:
        folder.mkdir()
        (folder / made).write_text('{"schema": "cpdebug.bisect/1"}')
        assert not kept.exists()  # nor would it if the process were killed now
        raise KeyboardInterrupt
    assert (kept / made).exists() is left
    assert [entry.name for entry in tmp_path.iterdir()] == ["kept"] * left
    assert kept.exists() is left


def test_captures_of_a_run_that_was_interrupted_are_told_from_a_folder_of_others(tmp_path: Path) -> None:
    for name, says in (("sample-0/ort/manifest.json", "was interrupted before it had a result"), ("x", "no such file")):
        file = tmp_path / name.partition("/")[0].replace("-", "_") / name
        file.parent.mkdir(parents=True)
        file.write_text("{}")
        code, text = run("report", tmp_path / name.partition("/")[0].replace("-", "_"))
        assert (code, says in " ".join(text.split())) == (2, True)


@pytest.mark.slow
@pytest.mark.parametrize(
    "words", [("bisect", "-b", "ort,ort-all"), pytest.param(("predict",), marks=pytest.mark.slow), ("doctor",)]
)
def test_torch_that_cannot_be_loaded_is_told(words: tuple[str, ...], net: Path) -> None:
    command = [sys.executable, "-m", "cp_debug", *words[:1], *[str(net)] * (words != ("doctor",)), *words[1:]]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"TORCH_LOGS": "no such log"})
    assert done.returncode == 3
    assert done.stderr.startswith("error: torch cannot be loaded (ValueError: Invalid log settings")


def test_doctor_cuts_no_advice_where_the_terminal_is_narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    _, narrow = run("doctor")
    assert max(map(len, narrow.splitlines()[:5])) <= 60
    assert "…" not in narrow
    assert 'providers=[("CUDAExecutionProvider", {"use_tf32": "0"})]  # ONNX Runtime CUDA use_tf32 is on' in narrow
    assert 'torch.backends.cudnn.conv.fp32_precision = "ieee"  # tf32 here' in narrow
    assert "config.clear_flag(trt.BuilderFlag.TF32)" in narrow


def test_memory_that_torch_cannot_get_is_told_in_words() -> None:
    done = failing('RuntimeError("DefaultCPUAllocator: can\'t allocate memory: you tried to allocate 9 bytes")')
    assert done.returncode == 2
    assert done.stderr.strip() == "error: out of memory: this needs more than the machine has"


def test_memory_that_is_too_little_even_for_the_log_is_told_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    def too_large(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr("cp_debug.cli.main.application", lambda _: 1 / 0)
    monkeypatch.setattr("cp_debug.cli.crash.write_log", too_large)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2


WRITES = {"--output", "--json", "--csv", "--html", "--junit", "--plot", "--onnx", "--predictions", "--save", "--log"}
WRITES |= {"--shared"}
"""Options that name what is written."""
ACTS = {
    "--samples": "so many are made up or read; fewer than asked for are noted",
    "--seed": "inputs, draws or orders are made from it; refused where none are (below)",
    "--level": "which tables are shown",
    "--all": "how many rows are shown",
    "--quiet": "whether tables are shown",
    "--format": "what report writes",
    "--rtol": "the verdict's tolerance",
    "--atol": "the verdict's tolerance",
    "--max-abs": "the verdict's limit",
    "--max-drop": "the verdict's limit",
    "--factor": "from where on diff calls a value worse",
    "--replay": "whether introduced errors are measured",
    "--oracle": "the arithmetic of the replay; refused without it (above)",
    "--explain": "whether causes are sought; refused where nothing judges (above)",
    "--knobs": "another search, refused on runtimes without optimizers",
    "--activations": "what check runs",
    "--force": "compares captures of different models",
    "--redact": "what bundle writes",
    "--seconds": "how long bundle makes it smaller",
    "--fresh": "deploy forgets finished stages",
    "--overwrite": "replaces an earlier output; refused without one that is named (below)",
    "--exporter": "how torch modules become ONNX; refused where nothing is exported (above)",
    "--unfolded": "how torch modules become ONNX; refused where nothing is exported (above)",
    "--opset": "how torch modules become ONNX; refused where nothing is exported (below)",
    "--simplify": "what export writes",
    "--rot-y-axis-reference": "the head's outputs; refused for all but CenterPoint",
    "--warmup": "passes of bench",
    "--repeats": "passes of bench",
    "--batch": "clouds at once; refused for models without batches",
    "--min-points": "which boxes count",
    "--draws": "draws of the intervals",
    "--t4": "another metric besides; refused without its package (tests/test_t4_metric.py)",
    "--auto": "which layers sensitivity puts into --output",
    "--workers": "processes of a sweep",
    "--retry-failed": "tasks of a sweep's log; refused where none failed (tests/test_sweep_queue.py)",
    "--method": "how quantize finds scales; refused beside scales that are given (above)",
    "--batches": "samples of calibration; refused beside scales that are given (above)",
    "--scenes": "scenes of fine-tuning",
    "--val-scenes": "scenes of fine-tuning",
    "--epochs": "length of fine-tuning",
    "--steps": "length of fine-tuning; refused beside --epochs (above)",
    "--interval": "steps of fine-tuning between validations",
    "--patience": "when fine-tuning ends",
    "--early-stop": "when fine-tuning ends",
    "--lr": "rate of fine-tuning",
    "--resume": "fine-tuning goes on; refused without a state",
}
"""Numbers, switches and choices that act wherever they are, and on what; the others need something beside them."""
ACTS_OF = {
    ("search", "--max-builds"): "trials on an emulator count, too",
    ("sweep search", "--max-builds"): "trials on an emulator count, too",
    ("sweep sensitivity", "--calib-samples"): "INT8 is what it is about",
    ("sweep sensitivity", "--calib-method"): "INT8 is what it is about",
    ("sweep ablate", "--layers"): "so many are tried one by one",
    ("predict", "--builder-level"): "whether a layer may stay in FP32: at 0 any may",
    ("import", "--layout"): "how the tensors are read",
    ("cache", "--clear"): "removes what is kept",
    ("cache", "--unused"): "which entries are shown or removed",
}
BESIDE = {
    "bisect": "NET -b ort,ort-all",
    "capture": "NET -b ort -o out",
    "search": "NET -b ort,emu-fp16 --goal rel_l2<1",
    "bench": "NET -b ort",
    "verify": "NET -s ort,emu-fp16",
    "eval": "centerpoint:tiny -b ort,emu-fp16",
    "sweep bisect": "NET -b ort,emu-fp16",
    "sweep search": "NET -b ort,emu-fp16",
    "sweep eval": "centerpoint:tiny -b ort,emu-fp16",
    "sweep ablate": "centerpoint:tiny -b ort,emu-fp16",
    "sweep sensitivity": "centerpoint:tiny --from q",
    "quantize sensitivity": "centerpoint:tiny --from q",
    "quantize qat": "centerpoint:tiny --from q -o out",
    "quantize ptq": "NET -o out",
    "check": "NET",
    "predict": "NET",
    "export": "centerpoint:tiny -o out",
    "cache": "",
}
"""Command → arguments beside which its options name something, or do nothing."""
ELSEWHERE = ("build", "bundle", "compare", "deploy", "import", "report", "ui")
"""Commands whose options are tried below, each beside what another command wrote, a TensorRT, or a server."""
READ_FIRST = {("quantize sensitivity", "--skip-layers"), ("quantize qat", "--val-data")}
READ_FIRST |= {("sweep sensitivity", option) for option in ("--data", "--cluster", "--from", "--gpus")}
"""Options of which the checkpoint of --from decides whether they do something."""
TO_STDOUT = {("doctor", "--json"), ("check", "--json")}
VALUES = {"int": "4", "float": "60", "Path": "nowhere/x.npz", "list": "nonsense", "str": "nonsense"}
VALUES |= {choice: choice for choice in ("flat", "entropy", "all", "minmax", "strongly_typed")}
BUILT = {"--precision": "fp16", "--workspace": "4", "--timing-cache": "timing"}
BUILT |= {"--profile": "x:1x2x4x4:2x2x4x4:3x2x4x4"}
"""Options of build that act on a network in FP32; a profile acts where an axis is free."""
NAMES = ("Path", "list", "str")
"""Kinds of values that name something: nonsense is never accepted."""


def options_of_the_parser() -> list[tuple[str, str, str]]:
    """(command, option, kind of its value) of every option of the parser that writes nothing."""
    found: list[tuple[str, str, str]] = []

    def collect(command: object, words: tuple[str, ...]) -> None:
        for name, child in getattr(command, "commands", {}).items():
            collect(child, (*words, name))
        for option in [] if hasattr(command, "commands") else getattr(command, "params", []):
            flag = max(option.opts, key=len)
            if option.param_type_name == "option" and flag not in WRITES and option.name != "help":
                found.append((" ".join(words), flag, "" if option.is_flag else _kind(option)))

    collect(get_command(app), ())
    return found


def _kind(option: Any) -> str:
    annotation = option.type_descriptor.annotation if hasattr(option, "type_descriptor") else option.type.name
    if get_origin(annotation) is Literal:
        return str(get_args(annotation)[-1])
    kind = getattr(annotation, "__name__", str(annotation))
    return "list" if kind.startswith("list") else kind


OPTIONS = options_of_the_parser()
REMAINING = [
    (command, option, kind)
    for command, option, kind in OPTIONS
    if kind in NAMES or not (option in ACTS or (command, option) in ACTS_OF)
    if (command, option) not in READ_FIRST and command not in ELSEWHERE and (command, option) not in TO_STDOUT
]


def test_the_remaining_options_are_found() -> None:
    assert len(REMAINING) > 150
    assert ("bisect", "--workspace", "int") in REMAINING
    assert ("verify", "--onnx-dir", "Path") in REMAINING
    assert {command for command, _, _ in REMAINING} == BESIDE.keys()


def test_every_reason_is_that_of_an_option() -> None:
    assert {option for _, option, kind in OPTIONS if kind not in NAMES} >= ACTS.keys()
    assert {(command, option) for command, option, _ in OPTIONS} >= ACTS_OF.keys()


@pytest.mark.parametrize(("command", "option", "kind"), REMAINING, ids=lambda value: str(value))
def test_every_option_of_the_parser_is_refused_where_it_would_do_nothing(
    command: str, option: str, kind: str, net: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new option names something, acts for a reason (``ACTS``), or is refused where it does nothing."""
    monkeypatch.chdir(tmp_path)
    beside = [str(net) if part == "NET" else part for part in BESIDE[command].split()]
    code, text = run(*command.split(), *beside, option, *([VALUES[kind]] if kind else []))
    assert code == (3 if text.startswith("backend 'nonsense'") else 2)
    if kind in NAMES:
        assert option in text or VALUES[kind] in text
    else:
        assert option in text
        assert "would do nothing" in text
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``net.onnx``, two captures, a result that found a fault, a dump, and a deployment's settings."""
    folder = tmp_path_factory.mktemp("written")
    net = NetBuilder()
    net.op("Relu", net.conv("x", 2, 2), name="y")
    path = net.save(folder / "net.onnx", {"x": (1, [1, 2, 4, 4])}, ["y"])
    net.weights[0].CopyFrom(numpy_helper.from_array(2 * numpy_helper.to_array(net.weights[0]), net.weights[0].name))
    other = net.save(folder / "other.onnx", {"x": (1, [1, 2, 4, 4])}, ["y"])
    net.save(folder / "free.onnx", {"x": (1, ["n", 2, 4, 4])}, ["y"])
    for name in ("a", "b"):
        assert run("capture", path, "-b", "ort", "-o", folder / name)[0] == 0
    assert run("bisect", path, other, "-b", "ort,ort-all", "--save", folder / "result")[0] == 1
    np.savez(folder / "dump.npz", x=np.ones((1, 2, 4, 4), np.float32))
    (folder / "deploy.yaml").write_text("model: net.onnx\nwork_dir: work\nevaluate: {enabled: false}\n")
    return folder


READING = {
    "bundle": "result -o out",
    "compare": "a b",
    "deploy": "deploy.yaml",
    "import": "dump.npz --model net.onnx -o out",
    "report": "result -o out",
}
NAMING = [(c, option, kind) for c, option, kind in OPTIONS if c in READING and kind in NAMES]


@pytest.mark.parametrize(("command", "option", "kind"), NAMING, ids=lambda value: str(value))
def test_options_of_commands_that_read_results_accept_no_nonsense(
    command: str, option: str, kind: str, written: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(written)
    before = sorted(written.rglob("*"))
    code, text = run(command, *READING[command].split(), option, VALUES[kind])
    assert code == 2
    assert option in text or VALUES[kind] in text
    assert sorted(written.rglob("*")) == before


@pytest.mark.parametrize(
    ("option", "kind"),
    [(option, kind) for command, option, kind in OPTIONS if command == "build" and option not in ACTS],
    ids=str,
)
def test_every_option_of_build_acts_or_is_refused(
    option: str, kind: str, written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install("10.3.0", monkeypatch)
    monkeypatch.chdir(tmp_path)
    told: list[str] = []
    """What TensorRT's builder was told, build by build."""
    builder = sys.modules["tensorrt"].Builder
    build = builder.build_serialized_network

    def noted(self: Any, network: Any, config: Any) -> Any:
        flags, limits = sorted(flag.name for flag in config._flags), sorted(config._limits.values())
        told.append(repr((flags, limits, [vars(profile) for profile in config._profiles])))
        return build(self, network, config)

    monkeypatch.setattr(builder, "build_serialized_network", noted)

    def built(*options: str) -> tuple[int, str]:
        net = written / ("free.onnx" if option == "--profile" else "net.onnx")
        done = run("build", net, "-o", tmp_path / "out", *options)
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        return done

    code, text = built(option, BUILT.get(option, VALUES.get(kind, "nonsense")))
    if option in BUILT:
        assert code == 0, text
        left = list(tmp_path.iterdir())
        refused = built()[0] != 0  # a free axis without a profile
        assert refused or left or told[0] != told[1], "it did nothing"
    else:
        assert code in (2, 3)
        assert option in text or VALUES[kind] in text
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("profile", "said"),
    [
        ("y:1x2x4x4:1x2x4x4:1x2x4x4", "--profile: no input is called 'y'; the inputs are x"),
        ("x:1x2x4x4:1x2x8x8:2x2x8x8", "--profile: x as 1x2x8x8; the graph takes x"),
        ("x:1:1:1", "--profile: x as 1; the graph takes x"),
    ],
)
def test_a_profile_that_does_not_fit_is_no_silent_one(
    profile: str, said: str, written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install("10.3.0", monkeypatch)
    net = written / "free.onnx"
    for words in (("build", net, "-o", tmp_path / "out"), ("bisect", net, "-b", "ort,trt-fp32", "--no-cache")):
        code, text = run(*words, "--profile", profile)
        assert (code, said in text) == (2, True), text
    assert not list(tmp_path.iterdir())


def test_the_options_of_ui_act(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    asked: list[int] = []

    class Server:
        url = "http://127.0.0.1:9/"

        def __init__(self, folder: Path, port: int) -> None:
            asked.append(port)

        def __enter__(self) -> Any:
            return self

        def __exit__(self, *exc: object) -> None: ...

        def serve_forever(self, poll_interval: float) -> None: ...

    monkeypatch.setattr("cp_debug.reports.server.ResultServer", Server)
    monkeypatch.setattr("webbrowser.open", opened.append)
    assert {option for command, option, _ in OPTIONS if command == "ui"} == {"--port", "--browser"}
    assert run("ui", tmp_path, "--port", "4711")[0] == 0
    assert (asked, opened) == ([4711], [])
    assert run("ui", tmp_path, "--browser")[0] == 0
    assert opened == [Server.url]


@pytest.mark.parametrize(
    ("option", "value"),
    [("--onnx-dir", "x"), ("--profile", "x"), ("--trt-calib-data", "x"), ("--calibration-cache", "x"),
     ("--trt-calibrator", "entropy"), ("--checkpoint", "nowhere.pt")],
)  # fmt: skip
def test_build_refuses_what_is_wrong_before_it_asks_for_tensorrt(written: Path, option: str, value: str) -> None:
    code, text = run("build", written / "net.onnx", "-o", written / "out", option, value)
    assert code == 2
    assert option in text or value in text
    assert not (written / "out").exists()


def test_every_parameter_of_a_command_is_used() -> None:
    """What is only refused, and then forgotten, would do nothing where it is accepted."""
    for file in sorted((Path(cp_debug.__file__).parent / "cli").glob("*.py")):
        for function in ast.walk(ast.parse(file.read_text())):
            if isinstance(function, ast.FunctionDef) and not function.name.startswith("_") and file.name != "main.py":
                names = {part.id for part in ast.walk(function) if isinstance(part, ast.Name)}
                arguments = {argument.arg for argument in (*function.args.args, *function.args.kwonlyargs)} - {"self"}
                assert arguments <= names, (file.name, function.name, arguments - names)


def test_a_seed_is_refused_where_nothing_is_made_up(net: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", x=np.ones(3, np.float32))
    code, text = run("bisect", net, "-b", "ort,ort-all", "--inputs", tmp_path / "x.npz", "--seed", "3")
    assert (code, "--seed: it would do nothing here: the inputs are those of" in text) == (2, True)
    code, text = run("check", "net.py:make", "--seed", "3")
    assert (code, "--seed: it would do nothing here: the one sample is the model's own" in text) == (2, True)
    code, text = run("check", net, "--no-activations", "--inputs", tmp_path / "x.npz")
    assert (code, "--inputs: it would do nothing here: --no-activations" in text) == (2, True)
    code, text = run("quantize", "ptq", net, "-o", tmp_path / "out", "--opset", "18")
    assert (code, "--opset: it would do nothing here:" in text) == (2, True)


@pytest.mark.few(2)
@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-", ">&- 2>&- <&-"])
def test_streams_that_the_shell_closed_change_no_exit_code(closed: str) -> None:
    for command, code in (("models", 0), ("bisect nowhere.onnx", 2)):
        told = subprocess.run(["bash", "-c", f"{sys.executable} -m cp_debug {command} {closed}"], capture_output=True)
        assert told.returncode == code
        assert b"Traceback" not in told.stderr + told.stdout


@pytest.mark.parametrize("columns", ["0", "9" * 20])
def test_a_terminal_of_no_width_shows_all(columns: str) -> None:
    environment = {**os.environ, "COLUMNS": columns}
    told = subprocess.run([sys.executable, "-m", "cp_debug", "models"], capture_output=True, text=True, env=environment)
    assert "centerpoint:tiny" in told.stdout


def test_a_long_job_says_in_a_log_what_it_will_still_take() -> None:
    from cp_debug.cli.plain_steps import PlainSteps

    now = 0.0
    steps = PlainSteps(print, clock=lambda: now)
    assert not steps.line
    for step in range(21):
        steps("fine-tuning", step, 100_000)
        now += 0.5
    assert steps.line == "10 s: fine-tuning (21 of 100000), 0.53 s each, about 15 h left at this pace"
    steps("other", 0, 6)
    now += 60
    steps("other", 4, 6)
    assert steps.line == "70 s: other (5 of 6)"  # too few are done to say
    steps("other", 5, 6)
    assert steps.line == "70 s: other (6 of 6), 12 s each, about 12 s left at this pace"
    steps("other", 6, 6)
    assert steps.line == "70 s: other"


def test_lines_of_a_job_come_ever_more_rarely(monkeypatch: pytest.MonkeyPatch) -> None:
    from cp_debug.cli.plain_steps import PlainSteps

    def pauses(total: int) -> list[float]:
        waited: list[float] = []
        steps = PlainSteps(lambda _: None, clock=lambda: sum(waited))
        steps("", 0, total)
        steps("", 5, total)
        monkeypatch.setattr(steps._over, "wait", lambda pause: waited.append(pause) or len(waited) > 8)
        with steps.running():
            pass
        return waited

    assert pauses(100) == [10.0 * 2**power for power in range(9)]
    assert max(pauses(5)) == 300.0  # the last step may be any time


def test_a_duration_is_told_as_people_do() -> None:
    from cp_debug.cli.plain_steps import span

    said = [span(s) for s in (3.2, 119, 120, 5000, 4e4, 2e5, 1e9)]
    assert said == ["3 s", "119 s", "2 min", "83 min", "11 h", "2.3 days", "11,574 days"]


def test_at_the_end_ctrl_c_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from cp_debug import __main__ as entry

    handlers = []
    monkeypatch.setattr(signal, "signal", lambda *given: handlers.append(given))
    monkeypatch.setattr("cp_debug.cli.main.main", lambda: sys.exit(1))
    with pytest.raises(SystemExit, match="1"):
        entry.main()
    assert (signal.SIGINT, signal.SIG_IGN) in handlers
    assert (signal.SIGTERM, signal.SIG_DFL) in handlers
