"""Pages of a folder of results, served to this machine alone; nothing is written, nothing is sent elsewhere."""

from __future__ import annotations

from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock
from urllib.parse import parse_qs, urlsplit

from cp_debug.bisect.result_diff import diff_results
from cp_debug.errors import CpdebugError, InputError, system_reason
from cp_debug.reports.page import render_layer, render_page
from cp_debug.reports.result_diff import render_diff
from cp_debug.reports.result_folder import ListedResult, ResultFolder, render_list, render_problem
from cp_debug.reports.saved import SavedResult
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
                return render_list(self.folder)
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
