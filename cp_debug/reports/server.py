"""Pages of a folder of results, served to this machine alone; nothing is written, nothing is sent elsewhere.

A page lists the results that are in the folder, with what each says in a line.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime, timezone
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from mmap import ACCESS_READ, mmap
from pathlib import Path
from threading import Lock
from typing import Any
from urllib.parse import parse_qs, urlsplit

from cp_debug.bisect.result import SCHEMA
from cp_debug.bisect.result_diff import diff_results
from cp_debug.errors import CpdebugError, InputError, system_reason
from cp_debug.reading import RESULT, read_json
from cp_debug.reports.page import render_layer, render_page, rendered
from cp_debug.reports.result_diff import render_diff
from cp_debug.reports.saved import SavedResult
from cp_debug.safe_text import some
from cp_debug.version import __version__

ADDRESS = "127.0.0.1"
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'; form-action 'self'"
_HEADERS = {
    "Content-Type": "text/html; charset=utf-8",
    "Content-Security-Policy": f"{_POLICY}; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
_SECONDS = 30
"""Time that a browser has for a request."""


class _NotHere(Exception):
    """An address that names nothing."""


class ResultServer(ThreadingHTTPServer):
    """A server of pages of one folder of results, on 127.0.0.1."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, root: Path, port: int) -> None:
        """``port`` 0 takes a free one. Raises InputError for no folder, and for a port that cannot be had."""
        self.folder = ResultFolder(root)
        self.one_at_a_time = Lock()
        try:
            super().__init__((ADDRESS, port), _Pages)
        except OSError as error:
            raise InputError(
                f"--port {port}: cannot be used ({system_reason(error)}); another one may be free"
            ) from None

    @property
    def url(self) -> str:
        """Address of the list."""
        return f"http://{ADDRESS}:{self.server_address[1]}/"

    def page(self, target: str) -> str:
        """The page at an address without its host. Raises _NotHere, and CpdebugError where a result cannot be shown."""
        parts = urlsplit(target)
        asked = {name: values[-1] for name, values in parse_qs(parts.query).items()}
        with self.one_at_a_time:
            if parts.path == "/":
                return rendered("folder", name=self.folder.root.resolve().name, results=self.folder.listed())
            if parts.path == "/diff":
                results = [SavedResult.open(self._result(asked.get(name, "")).path) for name in ("before", "after")]
                return render_diff(diff_results(results[0].result, results[1].result), served=True)
            if parts.path == "/result":
                key = asked.get("of", "")
                return render_page(SavedResult.open(self._result(key).path), served=key)
            if parts.path == "/layer":
                saved = SavedResult.open(self._result(asked.get("of", "")).path)
                try:
                    test = saved.result.tests[int(asked.get("test", ""))]
                    row = next(row for row in test.rows if row.index == int(asked.get("row", "")))
                except (ValueError, IndexError, StopIteration):
                    raise _NotHere from None
                return render_layer(saved, test, row)
        raise _NotHere

    def _result(self, key: str) -> ListedResult:
        found = self.folder.find(key)
        if found is None:
            raise _NotHere
        return found


class _Pages(BaseHTTPRequestHandler):
    server: ResultServer
    server_version, sys_version = f"cpdebug/{__version__}", ""
    timeout = _SECONDS

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def _answer(self) -> None:
        """Send a page; requests that another site made a browser send are refused: their Host is not this one."""
        port = self.server.server_address[1]
        if self.headers.get("Host") not in (f"{ADDRESS}:{port}", f"localhost:{port}"):
            self._send(HTTPStatus.FORBIDDEN, render_problem(f"Ask for {self.server.url}: other names are refused."))
            return
        try:
            self._send(HTTPStatus.OK, self.server.page(self.path))
        except _NotHere:
            self._send(HTTPStatus.NOT_FOUND, render_problem("There is no such page, or the result is gone."))
        except CpdebugError as error:
            self._send(HTTPStatus.UNPROCESSABLE_ENTITY, render_problem(str(error)))
        except (ConnectionError, TimeoutError):
            pass  # the browser has gone
        except Exception as error:  # one page that cannot be made ends no server
            text = f"This page cannot be made ({type(error).__name__}); `cpdebug report` on the result says more."
            self._send(HTTPStatus.INTERNAL_SERVER_ERROR, render_problem(text))

    def _send(self, status: HTTPStatus, text: str) -> None:
        body = text.encode("utf-8", "replace")
        self.send_response(status)
        for name, value in (_HEADERS | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing is logged."""


DEEPEST, MOST_FOLDERS, MOST_RESULTS = 6, 20_000, 500
"""Levels of folders that are looked into, folders in all, and results that are listed."""
LARGEST_RESULT = 1 << 28
"""Largest size in bytes of a result that is read for the list."""


@dataclass(frozen=True)
class ListedTest:
    """One backend of a listed result."""

    spec: str
    verdict: str
    """``ok``, ``guilty`` or ``rounding``: a CSS class."""
    says: str


@dataclass(frozen=True)
class ListedResult:
    """One result of the folder, as a line of the list."""

    key: str
    """Name of the result in addresses: a digest of its place, so that no address is a path."""
    place: str
    """Path relative to the folder."""
    path: Path
    modified: datetime
    model: str = ""
    reference: str = ""
    tests: list[ListedTest] = field(default_factory=list)
    problem: str = ""
    """Sentence that says why it cannot be read; empty for a result that can."""


class ResultFolder:
    """The results below a folder, read again when their files change."""

    def __init__(self, root: Path) -> None:
        """Raises InputError where ``root`` is no folder."""
        if not root.is_dir():
            raise InputError(f"{root}: no such folder")
        self.root = root
        self._read: dict[tuple[str, int, int], ListedResult | None] = {}

    def listed(self) -> list[ListedResult]:
        """The results, the newest first, at most ``MOST_RESULTS``."""
        found = []
        for path in _candidates(self.root):
            try:
                status = path.stat()
            except OSError:
                continue
            known = str(path), status.st_mtime_ns, status.st_size
            if known not in self._read:
                ours = path.name == RESULT or _is_result(path, status.st_size)
                self._read[known] = self._line(path, status) if ours else None
            line = self._read[known]
            if line is not None:
                found.append(line)
            if len(found) == MOST_RESULTS:
                break
        return sorted(found, key=lambda each: each.modified, reverse=True)

    def find(self, key: str) -> ListedResult | None:
        """The result of that name; None where the folder has none."""
        return next((each for each in self.listed() if each.key == key), None)

    def _line(self, path: Path, status: os.stat_result) -> ListedResult:
        place = path.relative_to(self.root).as_posix()
        place = place.removesuffix(f"/{RESULT}")
        listed: dict[str, Any] = {
            "key": hashlib.sha256(os.fsencode(place)).hexdigest()[:16],
            "place": place,
            "path": path.parent if path.name == RESULT else path,
            "modified": _time(status.st_mtime),
        }
        try:
            listed |= _said(read_json(path, what="saved result", most=LARGEST_RESULT))
        except InputError as error:
            listed["problem"] = str(error).removeprefix(f"{path}: ")
        except (LookupError, TypeError, AttributeError, ValueError):
            listed["problem"] = f"is no result of schema {SCHEMA}"
        return ListedResult(**listed)


def render_problem(text: str) -> str:
    """A page that says in a sentence why something cannot be shown."""
    return rendered("problem", text=text)


def _candidates(root: Path) -> Iterator[Path]:
    """Files that may be results; links are not followed."""
    for folder, folders, names in islice(os.walk(root), MOST_FOLDERS):
        deeper = len(Path(folder).relative_to(root).parts) < DEEPEST
        folders[:] = sorted(name for name in folders if deeper and not name.startswith((".", "sample-")))
        for path in (Path(folder, name) for name in sorted(names)):
            may_be = path.name == RESULT or (path.suffix == ".json" and RESULT not in names)
            if may_be and path.is_file() and not path.is_symlink():
                yield path


def _time(seconds: float) -> datetime:
    """The time of a change; the beginning of 1970 for one that no calendar has."""
    try:
        return datetime.fromtimestamp(seconds, timezone.utc)
    except (ValueError, OverflowError, OSError):
        return datetime.fromtimestamp(0, timezone.utc)


def _is_result(path: Path, size: int) -> bool:
    """Whether the file names the schema of results somewhere: where, depends on who wrote it."""
    if not 0 < size <= LARGEST_RESULT:
        return False
    try:
        with path.open("rb") as stream, mmap(stream.fileno(), 0, access=ACCESS_READ) as content:
            return content.find(json.dumps(SCHEMA).encode()) >= 0
    except (OSError, ValueError):  # unreadable, or empty by now
        return False


def _said(document: Any) -> dict[str, Any]:
    """Model, reference and tests as the file says them, without reading its layers.

    Raises LookupError, TypeError, AttributeError or ValueError for what is no result.
    """
    if document["schema"] != SCHEMA:
        raise KeyError("schema")
    specs = [str(record["spec"]) for record in document["backends"]]
    tests = []
    for spec, block in zip(specs[1:], document["tests"], strict=False):
        guilty = [str(name) for name in block["guilty"]]
        if guilty:
            tests.append(ListedTest(spec, "guilty", some(guilty, 1)))
        elif block["agrees"] is True:
            tests.append(ListedTest(spec, "ok", "agrees"))
        else:
            missing = block.get("compared", {}).get("missing")
            lacks = f"lacks output {missing[0]}" if missing else "beyond tolerance"
            tests.append(ListedTest(spec, "rounding", str(block.get("not_finite") or lacks)))
    return {"model": str(document["model"]), "reference": specs[0], "tests": tests}
