"""A file server on the loopback interface that can fail in the ways that real ones do."""

import base64
import hashlib
import http.server
import re
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Fault:
    """
    What happens to one request instead of, or besides, a proper answer.

    Attributes:
        status: Answer with this status and no file; 0 to send the file.
        headers: Sent in addition.
        body: Sent instead of the file.
        drop_after: Close the connection after so many bytes of the body.
        ignore_range: Send the whole file whatever was asked for.
        corrupt: Change the first byte that is sent.
    """

    status: int = 0
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes | None = None
    drop_after: int | None = None
    ignore_range: bool = False
    corrupt: bool = False


@dataclass(frozen=True)
class Request:
    """A request as it came: path, Range header, Authorization header, time.monotonic()."""

    path: str
    range: str | None
    authorization: str | None
    time: float


class DownloadServer:
    """
    Serves `files` (path -> content) with ranges and entity tags, to those who log in with `user` and `password`.

    Attributes:
        faults: Path -> faults, one for each of the next requests of it; `always` -> faults for all requests.
        requests: All that came.
        chunk, pause: Bodies are sent in pieces of so many bytes with so many seconds between them.
        most_at_once: The largest number of requests that were open at the same time.
    """

    def __init__(self, user: str, password: str) -> None:
        self.files: dict[str, bytes] = {}
        self.faults: dict[str, list[Fault]] = defaultdict(list)
        self.always: dict[str, Fault] = {}
        self.requests: list[Request] = []
        self.expected = "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()
        self.chunk, self.pause = 1 << 16, 0.0
        self.most_at_once = 0
        self.open: set[http.server.BaseHTTPRequestHandler] = set()
        self.lock = threading.Lock()
        owner = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                with owner.lock:
                    owner.open.add(self)
                    owner.most_at_once = max(owner.most_at_once, len(owner.open))
                try:
                    owner.answer(self)
                except (BrokenPipeError, ConnectionResetError):
                    self.close_connection = True
                finally:
                    owner.leave(self)

            def log_message(self, *args: object) -> None:
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True

    def url(self, host: str = "127.0.0.1") -> str:
        return f"http://{host}:{self.http.server_port}/files"

    def answer(self, handler: http.server.BaseHTTPRequestHandler) -> None:
        path = handler.path.removeprefix("/files/")
        asked = handler.headers.get("Range")
        with self.lock:
            self.requests.append(Request(path, asked, handler.headers.get("Authorization"), time.monotonic()))
            fault = self.faults[path].pop(0) if self.faults[path] else self.always.get(path, Fault())
        if fault.status:
            self.send(handler, fault.status, fault.headers, fault.body or b"")
            return
        if handler.headers.get("Authorization") != self.expected:
            self.send(handler, 401, {"WWW-Authenticate": 'Basic realm="files"'}, b"")
            return
        content = self.files.get(path)
        if content is None:
            self.send(handler, 404, {}, b"")
            return
        headers = {"ETag": f'"{hashlib.md5(content).hexdigest()}"', "Content-Type": "application/octet-stream"}
        status, start = 200, 0
        match = re.fullmatch(r"bytes=(\d+)-", asked or "")
        if match and not fault.ignore_range:
            start = int(match[1])
            if start >= len(content):
                self.send(handler, 416, {"Content-Range": f"bytes */{len(content)}"}, b"")
                return
            status = 206
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        body = content[start:] if fault.body is None else fault.body
        if fault.corrupt:
            body = bytes([body[0] ^ 255]) + body[1:]
        self.send(handler, status, headers | dict(fault.headers), body, fault.drop_after)

    def send(
        self,
        handler: http.server.BaseHTTPRequestHandler,
        status: int,
        headers: Mapping[str, str],
        body: bytes,
        drop_after: int | None = None,
    ) -> None:
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        end = len(body) if drop_after is None else drop_after
        for start in range(0, end, self.chunk):
            time.sleep(self.pause)
            if start + self.chunk >= end:  # the client may ask for the next file as soon as it has this piece
                self.leave(handler)
            handler.wfile.write(body[start : min(start + self.chunk, end)])
            handler.wfile.flush()
        if drop_after is not None:
            handler.close_connection = True

    def leave(self, handler: http.server.BaseHTTPRequestHandler) -> None:
        with self.lock:
            self.open.discard(handler)

    def count(self, path: str) -> int:
        return sum(request.path == path for request in self.requests)

    def ranges(self, path: str) -> list[str | None]:
        return [request.range for request in self.requests if request.path == path]

    def add(self, project: str, files: Mapping[str, bytes], checksums: bool = True) -> None:
        """Files of `<project>/<version>`, with the list of their checksums."""
        self.files |= {f"{project}/{path}": content for path, content in files.items()}
        if checksums:
            lines = [f"{hashlib.sha256(content).hexdigest()} {path}\n" for path, content in files.items()]
            self.files[f"{project}/SHA256SUMS.txt"] = "".join(lines).encode()


@contextmanager
def running(user: str, password: str) -> Iterator[DownloadServer]:
    server = DownloadServer(user, password)
    thread = threading.Thread(target=server.http.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.http.shutdown()
        server.http.server_close()
        thread.join()
