"""A small Hub on the loopback interface: repositories, preupload, LFS, commits, and ways in which it can fail."""

import base64
import hashlib
import http.server
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from urllib.parse import unquote, urlsplit


LARGE = (".safetensors", ".parquet")


@dataclass
class Fault:
    """
    What happens to requests for a path.

    Attributes:
        match: Regular expression for "METHOD /path".
        status, said: Answer with this status and reason; status 0 to go on.
        times: For so many requests; None for all.
        drop: Close the connection: "before" the request is carried out, or "after".
        wait: Set by the test to let the request go on; `reached` is set when it has come.
    """

    match: str
    status: int = 0
    said: str = ""
    times: int | None = None
    drop: str = ""
    wait: threading.Event | None = None
    reached: threading.Event = field(default_factory=threading.Event)


@dataclass
class Repository:
    """Files by path, whether each is large, the number of commits, and who may see it."""

    private: bool
    sdk: str | None = None
    files: dict[str, bytes] = field(default_factory=lambda: {".gitattributes": b"*.safetensors filter=lfs\n"})
    commits: list[str] = field(default_factory=list)

    @property
    def sha(self) -> str:
        state = json.dumps([sorted((name, len(data)) for name, data in self.files.items()), self.commits])
        return hashlib.sha1(state.encode()).hexdigest()


class HubServer:
    """
    Attributes:
        token: The one that is accepted.
        repositories: (kind, "USER/NAME") -> `Repository`.
        objects: Large files by SHA-256.
        requests: (method, path, Authorization header) of all that came.
    """

    def __init__(self, token: str) -> None:
        self.token = token
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str, str | None]] = []
        self.lock = threading.Lock()

    def count(self, expression: str) -> int:
        """Requests whose "METHOD /path" holds the expression."""
        return sum(bool(re.search(expression, f"{method} {path}")) for method, path, _ in self.requests)

    def fault(self, request: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if re.search(fault.match, request) and fault.times != 0:
                    if fault.times is not None:
                        fault.times -= 1
                    return fault
        return None

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, object]:
        """(status, JSON) of a request."""
        if path == "/api/whoami-v2":
            return 200, {"type": "user", "name": "lab", "auth": {"accessToken": {"role": "write"}}}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path == "/api/repos/create":
            wanted = json.loads(body)
            key = (wanted.get("type", "model"), f"{wanted['organization']}/{wanted['name']}")
            if key in self.repositories:
                return 409, {"error": "You already created this repo"}
            self.repositories[key] = Repository(wanted.get("visibility") == "private", wanted.get("sdk"))
            return 200, {"url": f"{self.url}/{key[1]}"}
        if match := re.fullmatch(r"/lfs/(\w+)", path):
            if hashlib.sha256(body).hexdigest() != match.group(1):
                return 400, {"error": "checksum"}
            self.objects[match.group(1)] = body
            return 200, {}
        if re.fullmatch(r"/(datasets/|spaces/)?[\w.-]+/[\w.-]+\.git/info/lfs/objects/batch", path):
            objects = []
            for item in json.loads(body)["objects"]:
                if item["oid"] not in self.objects:
                    item["actions"] = {"upload": {"href": f"{self.url}/lfs/{item['oid']}"}}
                objects.append(item)
            return 200, {"transfer": "basic", "objects": objects}
        match = re.fullmatch(r"/api/(model|dataset|space)s/([\w.-]+/[\w.-]+)(/.*)?", path)
        if match is None:
            return 404, {"error": f"no such path {path}"}
        repository = self.repositories.get((match.group(1), match.group(2)))
        if repository is None:
            return 404, {"error": "Repository not found"}
        return self._of_repository(repository, match.group(2), match.group(3) or "", body)

    def _of_repository(self, repository: Repository, name: str, rest: str, body: bytes) -> tuple[int, object]:
        if rest == "":
            return 200, {"id": name, "sha": repository.sha, "private": repository.private, "siblings": []}
        if rest.startswith("/tree/"):
            return 200, [self._entry(path, data) for path, data in repository.files.items()]
        if rest == "/preupload/main":
            files = []
            for item in json.loads(body)["files"]:
                mode = "lfs" if item["path"].endswith(LARGE) else "regular"
                files.append({"path": item["path"], "uploadMode": mode, "shouldIgnore": False, "oid": None})
            return 200, {"files": files}
        if rest == "/commit/main":
            return self._commit(repository, name, [json.loads(line) for line in body.splitlines()])
        return 404, {"error": f"no such path {rest}"}

    def _entry(self, path: str, data: bytes) -> dict:
        blob = hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()
        entry = {"type": "file", "path": path, "size": len(data), "oid": blob}
        if path.endswith(LARGE):
            entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
        return entry

    def _commit(self, repository: Repository, name: str, lines: list[dict]) -> tuple[int, object]:
        files = dict(repository.files)
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                if value.get("parentCommit") not in (None, repository.sha):
                    return 412, {"error": "The repository has changed since"}
                summary = value["summary"]
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        repository.files = files
        repository.commits.append(summary)
        return 200, {"commitUrl": f"{self.url}/{name}/commit/{repository.sha}", "commitOid": repository.sha}


@contextmanager
def hub_server(token: str) -> Iterator[HubServer]:
    """A `HubServer` at its `url`."""
    hub = HubServer(token)

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _handle(self) -> None:
            path = unquote(urlsplit(self.path).path)
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.headers.get("Transfer-Encoding") == "chunked":
                while size := int(self.rfile.readline(), 16):
                    body += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
            authorization = self.headers.get("Authorization")
            with hub.lock:
                hub.requests.append((self.command, path, authorization))
            fault = hub.fault(f"{self.command} {path}")
            if fault is not None:
                fault.reached.set()
                if fault.wait is not None:
                    fault.wait.wait(60)
                if fault.drop == "before":
                    self.close_connection = True
                    return
            if fault is not None and fault.status:
                self._send(fault.status, {"error": fault.said})
                return
            if not path.startswith("/lfs/") and authorization != f"Bearer {hub.token}":
                self._send(401, {"error": "Invalid credentials in Authorization header"})
                return
            with hub.lock:
                status, answer = hub.answer(self.command, path, body)
            if fault is not None and fault.drop == "after":
                self.close_connection = True
                return
            self._send(status, answer)

        def _send(self, status: int, answer: object) -> None:
            content = json.dumps(answer).encode()
            self.send_response(status)
            if status == 404 and "Repository" in str(answer):
                self.send_header("X-Error-Code", "RepoNotFound")
            if status >= 400 and isinstance(answer, dict):
                self.send_header("X-Error-Message", str(answer["error"]))
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_PUT = do_HEAD = _handle

        def log_message(self, *arguments: object) -> None:
            """Nothing: requests are kept in `requests`."""

    class Server(http.server.ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: object, client_address: object) -> None:
            """Nothing: clients that are killed break their connections."""

    server = Server(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        for fault in hub.faults:
            if fault.wait is not None:
                fault.wait.set()
        server.shutdown()
        server.server_close()
        thread.join()
