"""The archives that are built from this folder: installed elsewhere they work, and say their commit."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What git knows of this folder, copied, with a commit of its own."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("this folder is no checkout")
    copy = tmp_path / "checkout"
    for name in listed.stdout.splitlines():
        if name.startswith(("cp_debug/", "LICENSE", "README.md", "pyproject.toml", "setup.py")):
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, copy / name)
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "a"]):
        subprocess.run([*git, *command], cwd=copy, check=True)
    return copy


def built(folder: Path, kind: str, out: Path) -> Path:
    """The archive that the build backend makes: ``wheel`` or ``sdist``."""
    out.mkdir()
    code = f"import setuptools.build_meta as b; b.build_{kind}({str(out)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=folder, check=True, capture_output=True)
    [archive] = out.iterdir()
    return archive


@pytest.mark.slow
def test_a_wheel_of_a_source_archive_says_the_commit_and_has_every_file(checkout: Path, tmp_path: Path) -> None:
    describe = ["git", "describe", "--always", "--abbrev=10"]
    commit = subprocess.run(describe, cwd=checkout, capture_output=True, text=True, check=True).stdout.strip()
    source = built(checkout, "sdist", tmp_path / "source")
    with tarfile.open(source) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    [unpacked] = (tmp_path / "unpacked").iterdir()  # no .git here: the archive itself must know
    wheel = built(unpacked, "wheel", tmp_path / "wheel")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
    installed = tmp_path / "installed" / "cp_debug"
    wanted = {path.relative_to(checkout / "cp_debug") for path in (checkout / "cp_debug").rglob("*") if path.is_file()}
    got = {path.relative_to(installed) for path in installed.rglob("*") if path.is_file()}
    assert wanted - got == set()
    command = [sys.executable, "-m", "cp_debug", "--version"]
    said = subprocess.run(
        command, cwd=tmp_path, env={"PYTHONPATH": str(installed.parent)}, capture_output=True, text=True, check=True
    )
    assert f"(commit {commit})" in said.stdout
