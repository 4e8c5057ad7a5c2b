"""``cpdebug quantize sensitivity`` and ``qat`` as a user meets them."""

from __future__ import annotations

import csv
import json
from io import StringIO
from pathlib import Path

import pytest
import torch
from extras import needs
from rich.console import Console
from rich.text import Text
from test_cli import run

from cp_debug.deploy.quantize_output import PtqResult
from cp_debug.quantization.checkpoint import save_ptq_model
from cp_debug.quantization.open_quantized import modules_of, open_quantized
from cp_debug.quantization.record import QuantizerRow
from cp_debug.recipes.checkpoint import read_state_dict
from cp_debug.recipes.registry import load_model
from cp_debug.reports.quantization import layers, render

NET = Path(__file__).parent / "test_sensitivity.py"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("quantized") / "model.pt"
    save_ptq_model(modules_of(open_quantized(load_model("centerpoint:tiny"), None, count=2, method="max")), path)
    return path


@needs("modelopt")
def test_sensitivity_of_any_module(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    code, text = run(
        *("quantize", "sensitivity", f"{NET}:example", "--batches", 2, "-n", 2, "--method", "max"),
        *("--auto", 0.05, "-o", folder),
    )
    assert code == 1, "a layer has to stay in FP32"
    assert "--skip-layers fragile" in text
    document = json.loads((folder / "sensitivity.json").read_text())
    assert document["auto"]["skipped"] == ["fragile"]
    with (folder / "sensitivity.csv").open() as stream:
        assert [row["layer"] for row in csv.DictReader(stream)] == [row["layer"] for row in document["layers"]]
    assert {path.suffix for path in folder.iterdir()} == {".json", ".csv", ".html", ".svg"}


@needs("modelopt")
def test_qat_writes_a_checkpoint_that_opens(tmp_path: Path, checkpoint: Path) -> None:
    common = ("quantize", "qat", "--from", checkpoint, "-o", tmp_path / "qat.pt", "--scenes", 2, "--val-scenes", 1)
    options = ("--batch", 1, "--interval", 1, "--lr", 1e-4)
    code, text = run(*common, *options, "--steps", 2)
    assert code == 0
    assert "all steps done" in text
    code, text = run(*common, *options, "--steps", 2, "--resume", "--json", "-")
    assert code == 0
    assert [entry["step"] for entry in json.loads(text)["history"]] == [0, 1, 2]
    code, text = run(*common, *options, "--steps", 1)
    assert (code, "qat.pt exists already; --overwrite replaces it" in " ".join(text.split())) == (2, True)
    opened = open_quantized(load_model("centerpoint:tiny"), tmp_path / "qat.pt")
    assert sum(len(part.scales.layers) for part in opened.values()) == 38


def test_fine_tuning_that_was_cut_off_is_not_begun_anew_without_a_word(tmp_path: Path) -> None:
    (tmp_path / "qat.pt.state").write_text("of yesterday")
    code, text = run("quantize", "qat", "--from", "q.pt", "-o", tmp_path / "qat.pt")
    assert code == 2
    assert "qat.pt.state is from an earlier run; --resume continues it, --overwrite starts again" in " ".join(
        text.split()
    )
    code, text = run("quantize", "qat", "--from", "q.pt", "-o", tmp_path / "qat.pt", "--overwrite")
    assert (code, "q.pt: no such checkpoint" in text) == (2, True)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("sensitivity", "--from", "nowhere.pt"), "nowhere.pt: no such checkpoint"),
        (("sensitivity", "--skip-layers", "pts_nek", "--batches", "1"), "no layer matches 'pts_nek'"),
        (("qat", f"{NET}:example", "--from", "x.pt", "-o", "y.pt"), "has no training loss here"),
        (("sensitivity", "--from", "nowhere.pt", "--auto", "0"), "--auto is 0; expected a positive budget"),
        (("qat", "--from", "nowhere.pt", "-o", "y.pt"), "nowhere.pt: no such checkpoint"),
    ],
)
def test_bad_input(options: tuple[str, ...], says: str) -> None:
    code, text = run("quantize", *options)
    assert code == 2
    assert says in text


@needs("modelopt")
def test_quantizing_what_is_quantized(tmp_path: Path, checkpoint: Path) -> None:
    code, text = run("quantize", "ptq", "--checkpoint", checkpoint, "-o", tmp_path / "again")
    assert code == 2
    assert "is quantized already; expected weights in FP32" in text
    assert not (tmp_path / "again").exists()


@pytest.mark.slow
@needs("modelopt")
def test_int8_is_scored_and_timed_like_any_backend(checkpoint: Path, tmp_path: Path) -> None:
    target = tmp_path / "found.json"
    wanted = ["-n", 1, "--draws", 0, "--json", target]
    code, text = run("eval", "--checkpoint", checkpoint.parent, "-b", "torch,emu-int8", *wanted)
    assert code in (0, 1), text
    given = json.loads(target.read_text())
    assert not any("on the fly" in note for note in given["notes"])
    assert given["backends"][1]["summary"] != given["backends"][0]["summary"]
    code, text = run("eval", "-b", "torch,emu-int8", *wanted, "--calib-method", "max", "--calib-samples", 2)
    assert code in (0, 1), text
    calibrated = json.loads(target.read_text())
    assert "quantized on the fly: max on 2 samples" in calibrated["notes"]
    # the checkpoint was made of the same samples in the same way
    assert calibrated["backends"][1]["summary"] == given["backends"][1]["summary"]

    timed = ["bench", "--checkpoint", checkpoint.parent, "-b", "ort-int8", "-n", 1, "--warmup", 0, "--json", target]
    code, text = run(*timed)
    assert code == 0, text
    assert [each["backend"] for each in json.loads(target.read_text())["backends"]] == ["ort-int8"]

    code, text = run("check", "centerpoint:tiny", "--checkpoint", checkpoint)
    assert code == 2
    assert "a cpdebug quantized model 1; expected FP32 weights" in text.replace("\n", " ")


@pytest.mark.parametrize(("decibels", "shown"), [(9.0, True), (11.0, False)])
def test_ptq_shows_the_next_step_where_outputs_are_bad(decibels: float, shown: bool) -> None:
    result = PtqResult("net", "max", "2 samples", {}, {"net/out": 30.0, "net/other": decibels}, "2", [Path("model.pt")])
    said = [part.plain for part in render(result) if isinstance(part, Text)]
    assert any("cpdebug quantize sensitivity MODEL --from model.pt" in text for text in said) == shown


def test_weights_with_a_format_of_their_own_are_no_quantized_ones(tmp_path: Path) -> None:
    weights = load_model("centerpoint:tiny").components[0].module
    assert weights is not None
    torch.save({"format": "epochs 2", "state_dict": weights.state_dict()}, tmp_path / "own.pt")
    assert read_state_dict(tmp_path / "own.pt").keys() == weights.state_dict().keys()


def quantizer(name: str, amax: float | tuple[float, float] | None, why: str = "") -> QuantizerRow:
    return QuantizerRow(name, 8, 0 if isinstance(amax, tuple) else None, amax, not why, why)


@pytest.mark.parametrize("width", [60, 80])
def test_a_quantized_layer_is_one_row_with_its_whole_name(width: int) -> None:
    rows = [
        quantizer("pts_bbox_head.heads.0.conv.input_quantizer", 9.47),
        quantizer("pts_bbox_head.heads.0.conv.weight_quantizer", (0.0273, 0.154)),
        quantizer("pts_bbox_head.heads.0.conv.output_quantizer", None, "its readers quantize this output"),
        quantizer("pts_bbox_head.out.input_quantizer", None, "skipped by 'out'"),
        quantizer("pts_bbox_head.out.weight_quantizer", None, "skipped by 'out'"),
        quantizer("stem.input_quantizer", 1.5),
        quantizer("stem.weight_quantizer", (0.1, 0.2), "switched off"),
    ]
    console = Console(width=width, file=StringIO(), color_system=None)
    for part in layers(rows):
        console.print(part)
    told = console.file.getvalue()  # type: ignore[attr-defined]
    names = ("pts_bbox_head.heads.0.conv ", "pts_bbox_head.out ") if width == 80 else ("pts_", "0.conv ")
    for whole in (*names, "9.47", "0.0273 … 0.154", "skipped", "switched", "3 quantizers on in 3 layers"):
        assert whole in told
    assert "output_quantizer" not in told
    assert max(map(len, told.splitlines())) <= width
