"""The server of ``polyak serve``: pages for this machine alone, for reading only.

The server is the standard library's ``ThreadingHTTPServer``. There is one reader, five addresses and nothing to write, so that
what a library would add (routing, an event loop, sessions, TLS) has no use here; and what matters on a loopback port is short
enough to be read below: no address is a path of the disk, requests under another host's name are refused (a page of the web
whose name is pointed at 127.0.0.1 learns nothing), only GET and HEAD are answered, and no page may load or run anything else.
Live pages poll one small JSON address: no connection stays open, so that Ctrl-C ends the server at once.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer
from typing import Any

from polyak.lab import report
from polyak.lab.pages import Answer, Pages, message

HOST = "127.0.0.1"


class Server(ThreadingHTTPServer):
    """Pages at 127.0.0.1. Port 0 takes one that is free; ``with`` gives it back."""

    daemon_threads = True  # an answer under way keeps nothing from ending
    allow_reuse_address = os.name != "nt"  # where it lets another program take the port

    def __init__(self, pages: Pages, port: int = 0) -> None:
        self.pages = pages
        super().__init__((HOST, port), _Handler)

    def server_bind(self) -> None:
        TCPServer.server_bind(self)  # HTTPServer's looks up the machine's name, which may take long
        self.server_name, self.server_port = HOST, self.server_address[1]

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.server_port}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    server: Server  # pyright: ignore[reportIncompatibleVariableOverride]
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "polyak", ""
    timeout = 30

    def do_GET(self) -> None:
        if self._is_asked_for_here():
            try:
                answer = self.server.pages.answer(self.path)
            except Exception:
                traceback.print_exc()
                text = "This is an error of polyak; its traceback is where the server was started."
                answer = message(HTTPStatus.INTERNAL_SERVER_ERROR, "Something went wrong", text)
            self._send(answer)

    do_HEAD = do_GET

    def _refuse(self) -> None:
        self.close_connection = True  # a body may follow, which nobody reads
        if self._is_asked_for_here():
            self._send(Answer(HTTPStatus.METHOD_NOT_ALLOWED, "text/plain", b"only GET and HEAD\n"), Allow="GET, HEAD")

    do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = do_TRACE = do_CONNECT = _refuse

    def _is_asked_for_here(self) -> bool:
        """Whether the request names this server; else it is refused (a name of the web may be made to point here)."""
        port = self.server.server_port
        names = [f"{HOST}:{port}", f"localhost:{port}", *([HOST, "localhost"] if port == 80 else [])]
        if (self.headers.get_all("Host") or [""]) in [[name] for name in names]:
            return True
        self.close_connection = True
        self._send(Answer(HTTPStatus.FORBIDDEN, "text/plain", f"ask for {self.server.url}\n".encode()))
        return False

    def _send(self, answer: Answer, **headers: str) -> None:
        self.send_response(answer.status)
        self.send_header("Content-Type", answer.kind)
        self.send_header("Content-Length", str(len(answer.body)))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body)

    def end_headers(self) -> None:
        for name, value in {
            "Content-Security-Policy": report.served_policy(),
            "Cache-Control": "no-store",
            "Cross-Origin-Opener-Policy": "same-origin",
            "Cross-Origin-Resource-Policy": "same-origin",
            "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff",
            "X-Frame-Options": "DENY",
        }.items():
            self.send_header(name, value)
        super().end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the terminal is not a log."""


def serve(pages: Pages, *, port: int = 0, ready: Callable[[str], None]) -> None:
    """Serve pages until KeyboardInterrupt. ``ready`` is told the address once it can be opened.

    Raises:
        OSError: the port is taken.
        StoreError: there is a store, and it cannot be read.
    """
    pages.check()
    with Server(pages, port) as server:
        try:
            ready(server.url)
            server.serve_forever(poll_interval=0.1)
        except KeyboardInterrupt:
            pass
