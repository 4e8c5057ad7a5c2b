"""What pyproject.toml cannot say: wheels and source archives carry the commit that they were built from."""

from __future__ import annotations

import subprocess
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

COMMIT = Path("cp_debug/commit.txt")


def write_commit(folder: str) -> None:
    """Write the commit of this checkout below ``folder``; a source archive has the file already."""
    git = ["git", "--git-dir=.git", "describe", "--always", "--dirty", "--abbrev=10"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        commit = COMMIT.read_text() if COMMIT.is_file() else ""
    if commit:
        target = Path(folder) / COMMIT
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        target.write_text(commit)


class Build(build_py):
    """Package files, and the commit."""

    def run(self) -> None:
        """Copy the files; an editable installation asks git itself."""
        super().run()
        if not self.editable_mode:
            write_commit(self.build_lib)


class SourceArchive(sdist):
    """Source archive, and the commit."""

    def make_release_tree(self, base_dir: str, files: list[str]) -> None:
        """Lay out the archive."""
        super().make_release_tree(base_dir, files)
        write_commit(base_dir)


setup(cmdclass={"build_py": Build, "sdist": SourceArchive})
