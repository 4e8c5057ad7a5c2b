"""Processes that get in each other's way, for real: one folder, one cache, too little memory, another clock."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from nets import second_like
from states import until

from cp_debug.probes.capture import Capture
from cp_debug.store import Store

pytestmark = [pytest.mark.process, pytest.mark.skipif(os.name != "posix", reason="signals and limits of POSIX")]
COMMAND = [sys.executable, "-m", "cp_debug"]
WRITER = """
import sys, time
from pathlib import Path
import numpy as np
from cp_debug.errors import InputError
from cp_debug.probes.capture import CaptureWriter
folder, value, ready, go = Path(sys.argv[1]), float(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4])
try:
    with CaptureWriter(folder, {}) as writer:
        for name in "ab":
            writer.put(name, np.full(1000, value, np.float32))
        ready.touch()
        while not go.exists():
            time.sleep(0.01)
except InputError as error:
    sys.exit(str(error))
"""


def start(script: str, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", script, *map(str, arguments)], stderr=subprocess.PIPE, text=True)


def test_of_two_processes_on_one_capture_folder_one_wins_whole(tmp_path: Path) -> None:
    """Both began while the folder was free; the second to finish says so, and leaves nothing of its own."""
    target, go = tmp_path / "capture", tmp_path / "go"
    flags = [tmp_path / f"ready{i}" for i in range(2)]
    writers = [start(WRITER, target, i + 1, flags[i], go) for i in range(2)]
    until(lambda: all(flag.exists() for flag in flags))
    go.touch()
    told = [writer.communicate()[1] for writer in writers]
    codes = sorted(writer.returncode for writer in writers)
    assert codes == [0, 1]
    assert "cannot write the capture" in "".join(told)
    assert "Traceback" not in "".join(told)
    capture = Capture.open(target)
    values = {float(value) for name in "ab" for value in capture.load_checked(name)}
    assert len(values) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["capture", "go", "ready0", "ready1"]


def test_a_writer_that_is_killed_leaves_no_capture_and_the_next_one_clears_up(tmp_path: Path) -> None:
    target, ready = tmp_path / "capture", tmp_path / "ready"
    writer = start(WRITER, target, 1, ready, tmp_path / "never")
    until(ready.exists)
    writer.kill()
    writer.communicate()
    assert not target.exists()
    (tmp_path / "go").touch()
    again = start(WRITER, target, 2, ready, tmp_path / "go")
    assert again.communicate()[1] == ""
    assert float(Capture.open(target).load("a")[0]) == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["capture", "go", "ready"]


STORE = """
import sys, time
from pathlib import Path
from cp_debug.store import Store
folder, number = Path(sys.argv[1]), int(sys.argv[2])
store, made = Store(folder / "cache", most=1 << 30), folder / f"made-{number}"
made.mkdir()
(made / "engine").write_bytes(bytes([number]) * 4_000_000)
(made / "facts").write_text(str(number))
while not (folder / "enough").exists():
    store.put("key", made)
    time.sleep(0.05 * number)  # in which the reader finds it unchanged
"""


def test_two_processes_on_one_store_leave_a_whole_entry_or_none(tmp_path: Path) -> None:
    """An engine of one beside the facts of the other is never handed out."""
    workers = [start(STORE, tmp_path, i + 1) for i in range(2)]
    store, found = Store(tmp_path / "cache", most=1 << 30), tmp_path / "found"
    found.mkdir()
    until((tmp_path / "cache/key.zip").exists)
    for _ in range(20):
        assert store.get("key", found)
        content, facts = (found / "engine").read_bytes(), (found / "facts").read_text()
        assert (len(content), str(content[0]), content[0]) == (4_000_000, facts, content[-1])
    (tmp_path / "enough").touch()
    for worker in workers:
        assert worker.communicate()[1] == ""
        assert worker.returncode == 0
    assert [p.name for p in (tmp_path / "cache").iterdir()] == ["key.zip"]


def test_too_little_memory_is_one_sentence(tmp_path: Path) -> None:
    """The limit is the system's own: 3 GiB of address space, of which torch takes one, for 4 GiB of samples."""
    second_like(tmp_path / "net.onnx", depth=1, size=16)
    most = 3 << 30
    done = subprocess.run(
        [*COMMAND, "bisect", "net.onnx", "-b", "ort,ort-all", "--shape", "x=1x16x8192x8192"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1", "NO_COLOR": "1"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (most, most)),
    )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert "error: " in done.stderr


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0 or not shutil.which("unshare"), reason="only root may")
def test_a_clock_that_stands_elsewhere_changes_nothing(tmp_path: Path) -> None:
    """Ten years of uptime, in a time namespace: limits of time count from where a run began."""
    second_like(tmp_path / "net.onnx", depth=1, size=16)
    np.savez(tmp_path / "x.npz", x=np.ones((1, 16, 16, 16), np.float32))
    bisect = [*COMMAND, "bisect", "net.onnx", "-b", "ort,ort-all", "--inputs", "x.npz", "--json"]
    years = ["unshare", "--time", "--monotonic", "315360000", "--boottime", "315360000", "--fork"]
    if subprocess.run([*years, "true"], capture_output=True, check=False).returncode:
        pytest.skip("time namespaces are not allowed here")
    results = []
    for name, before in (("a.json", []), ("b.json", years)):
        done = subprocess.run([*before, *bisect, name], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        results.append(json.loads((tmp_path / name).read_text())["tests"][0]["layers"])
    assert results[0] == results[1]
