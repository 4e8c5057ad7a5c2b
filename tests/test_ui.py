"""``cpdebug ui``: lists a folder of results, opens and compares them, on this machine alone."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path
from threading import Thread

import pytest
from test_report import EVIL, save_faulty

from cp_debug.reports.server import ResultServer

pytestmark = pytest.mark.process
EMPTY = '{"schema": "cpdebug.bisect/1", "model": "x", "backends": [], "tests": []}'


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two results, one of them JSON alone with evil names, and much that is no result."""
    root = tmp_path_factory.mktemp("team")
    saved = save_faulty(root)
    document = json.loads((saved / "result.json").read_text())
    document["model"] = document["tests"][0]["guilty"][0] = EVIL
    for block in document["tests"]:
        for row in block["layers"]:
            row["name"] = EVIL
    (root / "other").mkdir()
    (root / "other" / "today<b>.json").write_text(json.dumps(document))
    for name, text in {
        "a": "{",
        "b": "[1]",
        "c": '{"schema": "cpdebug.bisect/1"}',
        "d": "\0" * 100,
        "e": EMPTY,
    }.items():
        (root / name).mkdir()
        (root / name / "result.json").write_text(text)
    os.mkfifo(root / "pipe.json")
    (root / "loop").symlink_to(root)
    (root / "passwd.json").symlink_to("/etc/passwd")
    return root


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[ResultServer]:
    with ResultServer(folder, 0) as running:
        thread = Thread(target=running.serve_forever, args=(0.05,))
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def ask(server: ResultServer, path: str, host: str = "", method: str = "GET") -> tuple[int, str]:
    port = server.server_address[1]
    connection = HTTPConnection("127.0.0.1", port)
    connection.request(method, path, headers={"Host": host or f"127.0.0.1:{port}"})
    answer = connection.getresponse()
    assert answer.getheader("Content-Security-Policy", "").startswith("default-src 'none'")
    return answer.status, answer.read().decode()


def keys(page: str) -> list[str]:
    return re.findall(r'href="/result\?of=(\w+)"', page)


def test_results_are_listed_and_opened_and_compared(server: ResultServer) -> None:
    status, page = ask(server, "/")
    assert status == 200
    assert "7 results" in page
    assert page.count("cannot be read") == 5
    assert "✗ ort → ort-none@cpu" in page
    assert len(keys(page)) == 2
    pages = [ask(server, f"/result?of={key}") for key in keys(page)]
    assert [status for status, _ in pages] == [200, 200]
    assert any("Error growth" in text and "node_conv_9" in text for _, text in pages)
    status, page = ask(server, f"/diff?before={keys(page)[0]}&after={keys(page)[1]}")
    assert '<a href="/">All results</a>' in page
    assert status == 200
    assert "before and after" in page
    everything = "".join(text for _, text in pages) + page
    assert "<script>alert" not in everything
    assert "root:x:" not in everything


def test_charts_of_any_layer_are_drawn_when_asked_for(server: ResultServer) -> None:
    for key in keys(ask(server, "/")[1]):
        _, page = ask(server, f"/result?of={key}")
        links = re.findall(r'href="(/layer[^"]*row=1)"', page)
        assert len(links) == 2  # one for each test
        status, layer = ask(server, links[0].replace("&amp;", "&"))
        assert status == 200
        assert ("Values on both sides" in layer) == ("node_conv_0" in layer)  # the other kept no tensors
        assert ask(server, f"/layer?of={key}&test=0&row=99999")[0] == 404
        assert ask(server, f"/layer?of={key}&test=x&row=1")[0] == 404


@pytest.mark.parametrize(
    "path",
    [
        "/../../etc/passwd",
        "/etc/passwd",
        "/result?of=../saved",
        "/result",
        "/diff?before=a&after=b",
        "//x",
        "/%00",
        "/?x=\u00e9",
    ],
)
def test_addresses_are_no_paths(server: ResultServer, path: str) -> None:
    status, page = ask(server, path.encode("ascii", "ignore").decode())
    assert status == (200 if path.startswith("/?") else 404)
    assert "root:x:" not in page


def test_other_hosts_and_methods_are_refused(server: ResultServer) -> None:
    assert ask(server, "/", host="evil.example")[0] == 403
    assert server.server_address[0] == "127.0.0.1"
    port = server.server_address[1]
    for method in ("POST", "PUT", "DELETE"):
        connection = HTTPConnection("127.0.0.1", port)
        connection.request(method, "/", body=b"x")
        assert connection.getresponse().status == 501
    assert ask(server, "/", method="HEAD") == (200, "")


def test_a_result_that_goes_or_changes_is_told(server: ResultServer, folder: Path) -> None:
    fresh = folder / "fresh"
    fresh.mkdir()
    shutil.copy(folder / "saved" / "result.json", fresh / "result.json")
    page = ask(server, "/")[1]
    assert "8 results" in page
    key = re.search(r'of=(\w+)">fresh', page)
    assert key is not None
    (fresh / "result.json").write_text('{"schema": "cpdebug.bisect/1", "model": ')
    assert ask(server, f"/result?of={key[1]}")[0] == 422
    shutil.rmtree(fresh)
    assert ask(server, f"/result?of={key[1]}")[0] == 404


def test_the_command_ends_with_ctrl_c_and_refuses_a_port_in_use(folder: Path) -> None:
    command = [sys.executable, "-m", "cp_debug", "ui"]
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        refused = subprocess.run([*command, str(folder), "--port", port], capture_output=True, text=True)
    assert refused.returncode == 2
    assert re.fullmatch(rf"error: --port {port}: cannot be used \(.*\); another one may be free\n", refused.stderr)
    running = subprocess.Popen(
        [*command, str(folder), "--port", "0"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert running.stdout is not None
    line = running.stdout.readline()
    assert "http://127.0.0.1:" in line
    running.send_signal(signal.SIGINT)
    out, err = running.communicate()
    assert (running.returncode, out, err) == (0, "ended\n", "")


def test_what_is_no_folder_is_an_error(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "cp_debug", "ui", str(tmp_path / "nothing")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "no such folder" in done.stderr
