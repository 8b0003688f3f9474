"""How the test Hub speaks HTTP/1.1: requests in, responses out, connections broken where a test wants it."""

import json
import sys
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Protocol
from urllib.parse import parse_qs, urlsplit

from hub_repo import RefusalError


@dataclass
class Response:
    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, value: Any, status: int = 200, **headers: str) -> "Response":
        return cls(status, json.dumps(value).encode(), {"Content-Type": "application/json", **headers})

    @classmethod
    def refusal(cls, error: RefusalError) -> "Response":
        return cls.of({"error": str(error)}, error.status, **error.headers)


@dataclass
class Request:
    """One request as it arrived; `status` stays 0 where the connection was cut before an answer."""

    host: str  # "hub" or "storage"
    method: str
    path: str  # still quoted
    query: dict[str, list[str]]
    headers: Mapping[str, str]
    body: bytes = b""
    status: int = 0

    def flag(self, name: str) -> bool:
        return self.query.get(name, [""])[0].lower() in {"1", "true"}

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Fault:
    """See `HubServer.fail`; `hit` is set at the first request it broke."""

    method: str
    path: str
    status: int | str
    times: int
    after_bytes: int
    hit: threading.Event = field(default_factory=threading.Event)


class Hub(Protocol):
    """What a listener needs of the Hub behind it."""

    requests: list[Request]

    def take_fault(self, request: Request) -> Fault | None: ...

    def answer(self, request: Request) -> Response: ...


class Handler(BaseHTTPRequestHandler):
    """Bytes in, bytes out; what they mean is `Hub.answer`'s business."""

    server: "Listener"
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = 1 << 16

    def _pieces(self) -> Iterator[bytes]:
        """The request's body as it comes in; `EOFError` where the client goes away before its end."""
        chunked = "chunked" in self.headers.get("Transfer-Encoding", "")
        left = 0 if chunked else int(self.headers.get("Content-Length", 0))
        while chunked or left:
            if chunked:
                left = int(self.rfile.readline().strip() or b"-1", 16)
                if left < 0:
                    raise EOFError
            ends = left == 0
            while left:
                piece = self.rfile.read1(min(left, 1 << 16))
                if not piece:
                    raise EOFError
                left -= len(piece)
                yield piece
            if chunked and self.rfile.readline() != b"\r\n":
                raise EOFError
            if ends or not chunked:
                return

    def _receive(self, request: Request, limit: int | None) -> bool:
        """Read the body, or `limit` bytes of it; whether that was all of it."""
        body = bytearray()
        try:
            for piece in self._pieces():
                body += piece
                if limit is not None and len(body) >= limit:
                    return False
        except (EOFError, ConnectionError):
            return False
        finally:
            request.body = bytes(body)
        return limit is None or not body

    def _send(self, request: Request, response: Response, limit: int | None) -> None:
        request.status = response.status
        self.send_response(response.status)
        for name, value in ({"Content-Length": str(len(response.body))} | response.headers).items():
            self.send_header(name, value)
        self.end_headers()
        if request.method != "HEAD":
            self.wfile.write(response.body[:limit])

    def _handle(self) -> None:
        hub, url = self.server.hub, urlsplit(self.path)
        query = parse_qs(url.query, keep_blank_values=True)
        request = Request(self.server.role, self.command, url.path, query, self.headers)
        fault = hub.take_fault(request)
        limit = fault.after_bytes if fault is not None and fault.status == "cut" else None
        complete = self._receive(request, limit)
        hub.requests.append(request)
        if complete and fault is not None and isinstance(fault.status, int):
            self._send(request, Response.refusal(RefusalError(fault.status, "Broken on demand")), None)
        elif complete:
            response = hub.answer(request)
            if fault is None or fault.status == "cut":
                self._send(request, response, limit)
        if not complete or (fault is not None and isinstance(fault.status, str)):
            self.close_connection = True
        if fault is not None:
            fault.hit.set()

    do_GET = do_HEAD = do_POST = do_PUT = _handle  # noqa: N815

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Quiet: the requests are recorded."""


class Listener(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, hub: "Hub", role: str) -> None:
        self.hub, self.role = hub, role
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):  # a client may go away whenever it likes
            super().handle_error(request, client_address)
