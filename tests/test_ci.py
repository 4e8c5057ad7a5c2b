"""The scripts of ``.ci``: they run the README's commands as they stand there, and let nothing be skipped silently."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parents[1] / ".ci"


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


readme, skips = script("readme_commands"), script("skips")


def test_the_commands_are_those_of_the_readme() -> None:
    printed = subprocess.run(
        [sys.executable, FOLDER / "readme_commands.py"], capture_output=True, text=True, check=True
    )
    lines = (FOLDER.parent / "README.md").read_text(encoding="utf-8").splitlines()
    commands = printed.stdout.splitlines()
    assert len(commands) == 2
    assert all(command in lines for command in commands)
    assert "cpdebug bisect" in commands[0]
    assert "pytest" in commands[1]


@pytest.mark.parametrize(
    "page", ["# x\n", "## Two commands\n```sh\na\n```\n## Next\n```sh\nb\n```\n", "## Two commands\n```sh\na\nb\n```\n"]
)
def test_a_readme_of_another_form_is_refused(page: str) -> None:
    with pytest.raises(ValueError, match="expected two"):
        readme.commands(page)


def report(path: Path, *cases: tuple[str, str, str | None]) -> str:
    text = "".join(
        f'<testcase classname="{module}" name="{name}">'
        + (f'<skipped type="pytest.skip" message="{reason}">where</skipped>' if reason else "")
        + "</testcase>"
        for module, name, reason in cases
    )
    path.write_text(f"<testsuites><testsuite>{text}</testsuite></testsuites>")
    return str(path)


def check(*arguments: str) -> tuple[int, str]:
    done = subprocess.run([sys.executable, FOLDER / "skips.py", *arguments], capture_output=True, text=True)
    assert not done.stderr
    return done.returncode, done.stdout


def test_what_another_run_passes_is_not_missing(tmp_path: Path) -> None:
    quick = report(
        tmp_path / "quick.xml",
        ("tests.test_a", "test_x", "needs the package 'modelopt'"),
        ("tests.test_a", "test_y", None),
        ("", "tests.test_module", "needs the package 'mmengine'"),
    )
    code, text = check(quick)
    assert code == 1
    assert "needs the package 'modelopt': tests.test_a::test_x" in text
    assert "needs the package 'mmengine': tests.test_module" in text
    extras = report(tmp_path / "extras.xml", ("tests.test_a", "test_x", None), ("tests.test_module", "test_z", None))
    assert check(quick, extras) == (0, "quick: 1 run, 2 skipped\nextras: 2 run, 0 skipped\n")


def test_reasons_are_allowed_by_their_beginning(tmp_path: Path) -> None:
    path = report(tmp_path / "quick.xml", *(("tests.test_a", f"test_{i}", f"no GPU in place {i}") for i in range(3)))
    assert check(path)[0] == 1
    assert check("--allow", "no GPU", path)[0] == 0
    cases = skips.never_run(skips.cases(Path(path)))
    assert not list(skips.complaints(cases, ("no TensorRT", "no GPU")))
    first, *_ = skips.complaints(cases, ("GPU",))
    assert first == "1 skipped everywhere, and skips.txt does not allow it: no GPU in place 0: tests.test_a::test_0"


def test_the_table_of_skips_can_be_read() -> None:
    assert skips.table("# a comment\n\nneeds a CUDA device\n") == ("needs a CUDA device",)
    assert "needs a CUDA device" in skips.table((FOLDER / "skips.txt").read_text(encoding="utf-8"))


def test_every_test_of_the_gate_is_there() -> None:
    """A test that was renamed would end the gate after ten minutes."""
    for line in filter(None, (FOLDER / "gate.txt").read_text(encoding="utf-8").splitlines()):
        if not line.startswith("#"):
            path, _, test = line.partition("::")
            text = (FOLDER.parent / path).read_text(encoding="utf-8")
            assert f"def {test.partition('[')[0]}(" in text or not test, line


def test_a_part_of_the_night_is_run_once_and_again_where_it_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    nightly, note = script("nightly"), tmp_path / "note"
    (tmp_path / "env").mkdir()
    (tmp_path / "env/complete").touch()
    parts = (
        nightly.Part("good", f"echo good >> {note}"),
        nightly.Part("bad", f"echo bad >> {note}; exit 3"),
        nightly.Part("other", "true", "no-such-program"),
    )
    monkeypatch.setattr(nightly, "KEPT", tmp_path)
    monkeypatch.setattr(nightly, "PARTS", parts)
    monkeypatch.setattr(nightly.sys, "argv", ["nightly"])
    said = {"rev-parse": "abc\n", "status": ""}
    real = subprocess.run

    def run(command: list[str], **options: object) -> object:
        words = [said[word] for word in said if word in command]
        return subprocess.CompletedProcess(command, 0, words[0]) if words else real(command, **options)  # type: ignore

    monkeypatch.setattr(nightly.subprocess, "run", run)
    for _ in range(2):
        assert nightly.main() == 1
    assert note.read_text().split() == ["good", "bad", "bad"]
    out = capsys.readouterr().out
    assert "left out: no no-such-program" in out
    assert out.endswith("nightly: 1 of 3 parts passed on abc\n")
    said["status"] = " M x.py"
    assert nightly.main() == 1
    assert note.read_text().split() == ["good", "bad", "bad", "good", "bad"], "a changed tree keeps nothing"
