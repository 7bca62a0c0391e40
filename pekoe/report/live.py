"""Serves the report of a run in progress to this machine only; the page is rendered again when the run has grown."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class LiveReport:
    """Serves `page()` at http://127.0.0.1:port/.

    Args:
        page: renders the page.
        watched: files whose growth means that the page is out of date.
        port: 0 for any free port.
    """

    def __init__(self, page: Callable[[], str], watched: list[Path], port: int = 0) -> None:
        lock = threading.Lock()

        def state() -> str:
            return " ".join(str(file.stat().st_size) if file.exists() else "0" for file in watched)

        @lru_cache(1)
        def page_at(_state: str) -> bytes:
            return page().encode()

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                # DNS rebinding: a foreign page whose name resolves to 127.0.0.1 must not read the run.
                if self.headers.get("Host", "").rpartition(":")[0] not in ("127.0.0.1", "localhost"):
                    self.send_error(403)
                    return
                if self.path == "/state":
                    kind, body = "text/plain", state().encode()
                elif self.path == "/":
                    with lock:
                        kind, body = "text/html; charset=utf-8", page_at(state())
                else:
                    self.send_error(404)
                    return
                self.send_response(200)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body)))
                self.send_header("Cache-Control", "no-store")
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/"

    def serve(self) -> None:
        """Serve until `close` or Ctrl-C."""
        self._server.serve_forever(0.2)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
