"""Downloads of the raw data: only the files that are needed, resumed where they stopped, and checked."""

import email.utils
import getpass
import hashlib
import json
import logging
import os
import random
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote, urlsplit

import filelock
import requests
import urllib3
from tqdm.auto import tqdm


logger = logging.getLogger(__name__)

PHYSIONET = "https://physionet.org/files"
PHYSIONET_PAGES = "https://physionet.org/content"
USERNAME_VARIABLE, PASSWORD_VARIABLE = "PHYSIONET_USERNAME", "PHYSIONET_PASSWORD"
CHECKSUMS = "SHA256SUMS.txt"
KAGGLE_NIH = "nih-chest-xrays/data"
# Releases that the paper was made with.
VERSIONS = {
    "mimic-cxr-jpg": "2.0.0",
    "mimic-cxr": "2.0.0",
    "chest-imagenome": "1.0.0",
    "ms-cxr": "0.1",
    "vindr-cxr": "1.0.0",
}
# PhysioNet documents wget as the client for files behind a login, so this says what it is compatible with.
USER_AGENT = "Wget/1.21 (compatible; chex-transformers)"

_CHUNK = 1 << 16
_PROGRESS = 1 << 20  # a connection that brought this much was a good one: the count of failures starts again
_VERIFIED = ".verified"


@dataclass(frozen=True)
class Failure:
    """One file that was not downloaded: where it belongs, where it is from, and why; `absent` if it is not there."""

    path: str
    url: str
    reason: str
    absent: bool = False

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


class DownloadError(RuntimeError):
    """
    Files are missing after a download. What was fetched stays, and the same call goes on from there.

    Attributes:
        failures: All of them; the message names the first five.
    """

    def __init__(self, message: str, failures: Sequence[Failure] = ()) -> None:
        super().__init__(message)
        self.failures = list(failures)


class AccessError(DownloadError):
    """No login, a wrong one, or a data use agreement that is not signed."""


class StorageError(DownloadError):
    """The disk is full, or the folder cannot be written to."""


@dataclass(frozen=True)
class RetryPolicy:
    """
    Attributes:
        attempts: In a row without progress before a file is given up.
        first_wait: Seconds before the second attempt; doubled each time, with jitter.
        longest_wait: Limit of the doubling, in seconds.
        longest_retry_after: Seconds that a server may ask to wait for (Retry-After) before the file is given up.
        timeout: Seconds without an answer or new bytes after which a connection counts as lost.
    """

    attempts: int = 8
    first_wait: float = 1.0
    longest_wait: float = 120.0
    longest_retry_after: float = 1800.0
    timeout: float = 60.0

    def wait(self, failures: int) -> float:
        """Seconds to wait after so many failures in a row: jitter keeps parallel connections from coming at once."""
        return min(self.longest_wait, self.first_wait * 2 ** (failures - 1)) * random.uniform(0.5, 1.0)


@dataclass
class DownloadSummary:
    """What a download did: folders of the data, numbers of files fetched and found complete, bytes received."""

    folders: list[Path] = field(default_factory=list)
    fetched: int = 0
    skipped: int = 0
    bytes: int = 0

    def __str__(self) -> str:
        return (
            f"{self.fetched:,} files fetched ({self.bytes / 1e9:.2f} GB), {self.skipped:,} were complete already: "
            f"{', '.join(map(str, self.folders))}"
        )


@dataclass(frozen=True, slots=True)
class _RemoteFile:
    """A file of a project: `path` as on the server, below `address`, and on the disk, below `root`."""

    project: str
    address: str
    root: Path
    path: str
    digest: str | None = None

    @property
    def url(self) -> str:
        return f"{self.address}/{quote(self.path)}"

    @property
    def label(self) -> str:
        return f"{self.project}/{self.path}"

    @property
    def target(self) -> Path:
        return self.root / self.path


class _Transient(Exception):
    """Worth another attempt, after `wait` seconds if the server or the case says so."""

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait


class _Permanent(Exception):
    """Not worth another attempt."""

    def __init__(self, reason: str, absent: bool = False) -> None:
        super().__init__(reason)
        self.absent = absent


class _Stopped(Exception):
    """The download as a whole has ended."""


class _BasicLogin(requests.auth.HTTPBasicAuth):
    """Keeps the password out of any text about this object."""

    def __repr__(self) -> str:
        return "<PhysioNet login>"


class _Downloader:
    """Fetches files of PhysioNet projects into `out/<project>/<version>/<path>`."""

    def __init__(
        self,
        out: Path,
        base_url: str,
        versions: Mapping[str, str],
        login: _BasicLogin,
        workers: int,
        retries: RetryPolicy,
        progress: bool,
    ) -> None:
        self.out, self.base_url, self.versions, self.login = out, base_url, versions, login
        self.workers, self.retries, self.progress = workers, retries, progress
        self.summary = DownloadSummary()
        self.failures: list[Failure] = []
        self.lock = threading.Lock()
        self.stop = threading.Event()
        self.fatal: BaseException | None = None
        self.not_before = 0.0  # time.monotonic() until which the server asked not to be called
        self.bar: tqdm | None = None
        self.bar_position: dict[str, int] = {}
        self.verified: dict[str, dict[str, tuple[str, int, int]]] = {}

    # Which files

    def root(self, project: str) -> Path:
        return self.out / project / self.versions[project]

    def file(self, project: str, path: str, digest: str | None = None) -> _RemoteFile:
        address = f"{self.base_url}/{project}/{self.versions[project]}"
        return _RemoteFile(project, address, self.root(project), path, digest)

    def fetch(self, project: str, paths: Iterable[str], images: bool = False) -> None:
        """
        Files of one project, in parallel, with the checksums that it publishes.

        Raises:
            DownloadError: Tables are missing (of images, the failures are collected in `self.failures`).
        """
        paths = list(paths)
        root = self.root(project)
        if project not in self.verified:
            self.summary.folders.append(root)
            self.verified[project] = _read_verified(root / _VERIFIED)
            self._run([self.file(project, CHECKSUMS)], f"{project} checksums", "B")
            # Not all projects have them.
            self.failures = [item for item in self.failures if not (item.absent and item.path.endswith(CHECKSUMS))]
            self.raise_failures(project)
        digests = read_checksums(root / CHECKSUMS, paths) if (root / CHECKSUMS).is_file() else {}
        files = [self.file(project, path, digests.get(path)) for path in paths]
        self._run(files, f"{project} {'images' if images else 'tables'}", "image" if images else "B")
        if not images:
            self.raise_failures(project)

    def raise_failures(self, name: str) -> None:
        if self.failures:
            examples = "; ".join(str(failure) for failure in self.failures[:5])
            raise DownloadError(
                f"{name}: {len(self.failures):,} files could not be downloaded: {examples}"
                f"{'; and others' if len(self.failures) > 5 else ''}. Start the same command again: it goes on from "
                "what is there.",
                self.failures,
            )

    # Threads

    def _run(self, files: Sequence[_RemoteFile], title: str, unit: str) -> None:
        in_bytes = unit == "B"
        self.bar_position = {}
        self.bar = tqdm(
            total=0 if in_bytes else len(files),
            desc=title,
            unit=unit,
            unit_scale=in_bytes,
            unit_divisor=1000,
            disable=None if self.progress else True,  # None: only on a terminal
        )
        waiting = iter(files)
        threads = [
            threading.Thread(target=self._work, args=(waiting, in_bytes), daemon=True)
            for _ in range(min(self.workers, len(files)))
        ]
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                while thread.is_alive():  # a join without a limit would keep Ctrl-C waiting
                    thread.join(0.2)
        except KeyboardInterrupt:
            self.stop.set()
            deadline = time.monotonic() + 5
            for thread in threads:
                thread.join(max(deadline - time.monotonic(), 0))
            raise KeyboardInterrupt("Interrupted. The same command goes on where this one stopped.") from None
        finally:
            self.bar.close()
        if self.fatal is not None:
            raise self.fatal

    def _work(self, waiting: Iterator[_RemoteFile], in_bytes: bool) -> None:
        with requests.Session() as session:
            session.auth = self.login
            session.headers.update({"User-Agent": USER_AGENT, "Accept-Encoding": "identity"})
            while not self.stop.is_set():
                with self.lock:
                    file = next(waiting, None)
                if file is None:
                    return
                try:
                    self._fetch_one(session, file, in_bytes)
                except _Stopped:
                    return
                except _Permanent as error:
                    with self.lock:
                        self.failures.append(Failure(file.label, file.url, str(error), error.absent))
                except BaseException as error:
                    if isinstance(error, DownloadError):
                        error.failures = [Failure(file.label, file.url, str(error))]
                    with self.lock:
                        self.fatal = self.fatal or error
                    self.stop.set()
                    return
                if not in_bytes:
                    with self.lock:
                        self.bar.set_postfix_str(f"{self.summary.bytes / 1e9:.2f} GB", refresh=False)
                        self.bar.update()

    # One file

    def _fetch_one(self, session: requests.Session, file: _RemoteFile, in_bytes: bool) -> None:
        if self._is_complete(file):
            with self.lock:
                self.summary.skipped += 1
            return
        failures, mismatches = 0, 0
        while True:
            self._pause(self.not_before - time.monotonic())
            received = 0

            def advance(position: int, total: int | None, new: int) -> None:
                nonlocal received
                received += new
                with self.lock:
                    self.summary.bytes += new
                    if in_bytes:
                        self._move_bar(file, position, total)

            try:
                self._transfer(session, file, advance)
                with _storage(file.target):
                    matches = file.digest is None or _sha256(_partial(file.target)) == file.digest
                if not matches:
                    _discard_partial(file.target)
                    mismatches += 1
                    reason = f"its content does not match the checksum in {CHECKSUMS}"
                    raise _Transient(reason) if mismatches < 2 else _Permanent(f"{reason}, twice")
                break
            except _Transient as error:
                failures = 1 if received >= _PROGRESS else failures + 1
                if failures >= self.retries.attempts:
                    raise _Permanent(f"{error}, after {failures} attempts") from None
                wait = self.retries.wait(failures) if error.wait is None else error.wait
                logger.info("%s: %s; attempt %d in %.1f s", file.path, error, failures + 1, wait)
                self._pause(wait)
        with _storage(file.target):
            os.replace(_partial(file.target), file.target)
            _note(file.target).unlink(missing_ok=True)
        self._note_verified(file)
        with self.lock:
            self.summary.fetched += 1

    def _transfer(
        self, session: requests.Session, file: _RemoteFile, advance: Callable[[int, int | None, int], None]
    ) -> None:
        """One request; afterwards the partial file has the whole content.

        Raises:
            _Transient, _Permanent, AccessError, StorageError
        """
        partial = _partial(file.target)
        with _storage(file.target):
            file.target.parent.mkdir(parents=True, exist_ok=True)
        known = _read_note(file.target)
        start = partial.stat().st_size if known and partial.is_file() else 0
        if known and start and start == known["size"]:  # killed between the last byte and the renaming
            advance(start, start, 0)
            return
        try:
            response = session.get(
                file.url,
                headers={"Range": f"bytes={start}-"} if start else {},
                stream=True,
                timeout=self.retries.timeout,
            )
        except requests.TooManyRedirects:
            raise _Permanent("the server redirects in a circle") from None
        except requests.RequestException as error:
            raise _Transient(_describe(error)) from None
        with response:
            self._check_status(file, response, start)
            version = {
                "size": _total_size(response),
                "etag": response.headers.get("ETag"),
                "modified": response.headers.get("Last-Modified"),
            }
            if response.status_code == 206:
                if version != known or _range_start(response) != start:
                    _discard_partial(file.target)
                    raise _Transient("the file on the server has changed", wait=0)
            else:
                start = 0
            self._receive(file, response, start, version, advance)

    def _receive(
        self,
        file: _RemoteFile,
        response: requests.Response,
        start: int,
        version: dict,
        advance: Callable[[int, int | None, int], None],
    ) -> None:
        partial, total = _partial(file.target), version["size"]
        chunks = response.raw.stream(_CHUNK, decode_content=False)
        with _storage(file.target), open(partial, "ab" if start else "wb") as stream:
            # Only now that the partial file is empty: a kill must not leave old bytes beside a new note.
            if not start:
                _note(file.target).write_text(json.dumps(version), encoding="utf-8")
            position = start
            advance(position, total, 0)
            while True:
                if self.stop.is_set():
                    raise _Stopped
                try:
                    chunk = next(chunks, None)
                except urllib3.exceptions.HTTPError as error:
                    raise _Transient(
                        f"the connection was lost after {position:,} bytes ({_describe(error)})"
                    ) from None
                if chunk is None:
                    break
                if position == 0 and _is_web_page(chunk):
                    raise self._login_page(file)
                stream.write(chunk)
                position += len(chunk)
                advance(position, total, len(chunk))
            stream.flush()
            os.fsync(stream.fileno())
        if total is not None and position != total:
            if position > total:
                _discard_partial(file.target)
            raise _Transient(f"{position:,} of {total:,} bytes came")

    def _check_status(self, file: _RemoteFile, response: requests.Response, start: int) -> None:
        status = response.status_code
        page = f"{PHYSIONET_PAGES}/{file.project}/{self.versions[file.project]}/"
        if status in (200, 206):
            if response.headers.get("Content-Type", "").startswith("text/html"):
                raise self._login_page(file)
        elif status == 401:
            raise AccessError(
                f"{file.project}: the server does not accept the user name or the password (401). Check "
                f"{USERNAME_VARIABLE} and {PASSWORD_VARIABLE}, or the entry in netrc, by logging in at {page}."
            )
        elif status == 403:
            raise AccessError(
                f"{file.project}: this account has no access to the files (403). Sign the data use agreement at "
                f"{page} (credentialed projects also ask for a training course), then start the command again."
            )
        elif status in (404, 410):
            raise _Permanent(f"it is not on the server ({status})", absent=True)
        elif status == 416 and start:
            _discard_partial(file.target)
            raise _Transient("the file on the server has changed", wait=0)
        elif status in (429, 503):
            wait = _retry_after(response.headers.get("Retry-After"))
            reason = f"the server asks for a pause ({status})"
            if wait is not None:
                if wait > self.retries.longest_retry_after:
                    raise _Permanent(f"{reason} of {wait:,.0f} s; try again then")
                with self.lock:  # for all connections
                    self.not_before = max(self.not_before, time.monotonic() + wait)
            raise _Transient(reason)
        elif status in (408, 425) or status >= 500:
            raise _Transient(f"the server answers {status}")
        else:
            raise _Permanent(f"the server answers {status}")

    def _login_page(self, file: _RemoteFile) -> AccessError:
        from training.data.raw import login_page_hint

        page = f"{PHYSIONET_PAGES}/{file.project}/{self.versions[file.project]}/"
        return AccessError(f"{file.project}: what the server sends for {file.path} {login_page_hint()} See {page}.")

    def _pause(self, seconds: float) -> None:
        if self.stop.wait(max(seconds, 0)):
            raise _Stopped

    def _move_bar(self, file: _RemoteFile, position: int, total: int | None) -> None:
        """To `position` in this file; its size joins the total of the bar when it becomes known."""
        if file.path not in self.bar_position:
            self.bar_position[file.path] = 0
            self.bar.total += total or 0
        self.bar.update(position - self.bar_position[file.path])
        self.bar_position[file.path] = position

    # Files that are there already

    def _is_complete(self, file: _RemoteFile) -> bool:
        """A finished file is one that has its name; its checksum is computed once, and again if it was touched."""
        with _storage(file.target):
            if not file.target.is_file() or not file.target.stat().st_size:
                return False
            if file.digest is None or self.verified[file.project].get(file.path) == _identity(file):
                return True
            if _sha256(file.target) == file.digest:
                self._note_verified(file)
                return True
        logger.warning("%s does not match its checksum and is downloaded again.", file.target)
        return False

    def _note_verified(self, file: _RemoteFile) -> None:
        if file.digest is None:
            return
        digest, size, modified = _identity(file)
        with self.lock, _storage(file.root), open(file.root / _VERIFIED, "a", encoding="utf-8") as stream:
            stream.write(f"{digest} {size} {modified} {file.path}\n")


def _partial(target: Path) -> Path:
    return target.with_name(f"{target.name}.partial")


def _note(target: Path) -> Path:
    """Beside a partial file: which version of the file on the server it is the beginning of."""
    return target.with_name(f"{target.name}.partial.json")


def _read_note(target: Path) -> dict | None:
    try:
        note = json.loads(_note(target).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # none, or killed while it was written
        return None
    return note if isinstance(note, dict) and {"size", "etag", "modified"} <= set(note) else None


def _discard_partial(target: Path) -> None:
    with _storage(target):
        _note(target).unlink(missing_ok=True)
        _partial(target).unlink(missing_ok=True)


def _identity(file: _RemoteFile) -> tuple[str, int, int]:
    status = file.target.stat()
    return file.digest, status.st_size, status.st_mtime_ns


def _read_verified(path: Path) -> dict[str, tuple[str, int, int]]:
    """Path -> checksum, size and time of the files that were verified; a line that was cut off is passed over."""
    verified = {}
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            parts = line.split(" ", 3)
            if len(parts) == 4 and parts[1].isdecimal() and parts[2].isdecimal():
                verified[parts[3]] = (parts[0], int(parts[1]), int(parts[2]))
    return verified


def read_checksums(path: Path, wanted: Iterable[str] | None = None) -> dict[str, str]:
    """
    Relative path -> SHA-256 in hexadecimal, from a file of lines `<digest> <path>`.

    Args:
        wanted: Keeps these paths only: such files list several hundred thousand.
    """
    wanted = None if wanted is None else set(wanted)
    digests = {}
    with open(path, encoding="utf-8", errors="replace") as stream:
        for line in stream:
            digest, _, name = line.strip().partition(" ")
            name = name.lstrip(" *").removeprefix("./")
            if re.fullmatch(r"[0-9a-fA-F]{64}", digest) and (wanted is None or name in wanted):
                digests[name] = digest.lower()
    return digests


def _sha256(path: Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextmanager
def _storage(target: Path) -> Iterator[None]:
    """Turns errors of the file system into a StorageError that says what to do."""
    try:
        yield
    except OSError as error:
        raise _storage_error(target, error) from error


def _storage_error(target: Path, error: OSError) -> StorageError:
    return StorageError(
        f"{target} cannot be read or written ({error.strerror or error}). Free space on the disk or choose another "
        "folder; the same command goes on from what is there."
    )


def _is_web_page(head: bytes) -> bool:
    head = head[:512].lstrip()
    return head[:1] == b"<" and b"html" in head.lower()


def _total_size(response: requests.Response) -> int | None:
    """Of the whole file, in bytes."""
    if response.status_code == 206:
        match = re.fullmatch(r"bytes \d+-\d+/(\d+)", response.headers.get("Content-Range", ""))
        return int(match[1]) if match else None
    length = response.headers.get("Content-Length", "")
    return int(length) if length.isdecimal() and not response.headers.get("Transfer-Encoding") else None


def _range_start(response: requests.Response) -> int | None:
    match = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
    return int(match[1]) if match else None


def _retry_after(value: str | None) -> float | None:
    """Seconds from a Retry-After header: a number or a date."""
    if value is None:
        return None
    if value.strip().isdecimal():
        return float(value)
    try:
        return max(email.utils.parsedate_to_datetime(value).timestamp() - time.time(), 0.0)
    except ValueError:
        return None


def _describe(error: Exception) -> str:
    """Short text of a network error, without queries of addresses, which may hold keys."""
    while error.args and isinstance(error.args[-1], Exception):
        error = error.args[-1]
    reason = getattr(error, "reason", None)
    text = f"{type(reason or error).__name__}: {reason or error}"
    return re.sub(r"\?[^\s'\")]+", "?...", text)


def _find_login(base_url: str) -> _BasicLogin:
    """
    From the environment, netrc, or the terminal.

    Raises:
        AccessError: There is none and nobody to ask.
        ValueError: The address holds a password, or would send it unencrypted.
    """
    address = urlsplit(base_url)
    if address.username or address.password:
        raise ValueError("base_url must not hold a user name or password: use the environment or netrc.")
    if address.scheme not in ("https", "http") or not address.hostname:
        raise ValueError(f"base_url must be an http(s) address, not {base_url!r}.")
    if address.scheme == "http" and address.hostname not in ("localhost", "127.0.0.1", "::1"):
        raise ValueError(f"{base_url} would send the password unencrypted: use https.")
    login = _environment_login() or _netrc_login(base_url)
    if login is not None:
        return login
    if sys.stdin is None or not sys.stdin.isatty():
        raise AccessError(
            f"The files need a login of {address.hostname}. Set {USERNAME_VARIABLE} and {PASSWORD_VARIABLE}, add "
            f"'machine {address.hostname}' to ~/.netrc, or start the command in a terminal, where it asks."
        )
    username = os.environ.get(USERNAME_VARIABLE) or input(f"User name for {address.hostname}: ")
    return _BasicLogin(username, getpass.getpass(f"Password of {username} for {address.hostname}: "))


def _environment_login() -> _BasicLogin | None:
    username, password = os.environ.get(USERNAME_VARIABLE), os.environ.get(PASSWORD_VARIABLE)
    return _BasicLogin(username, password) if username and password else None


def _netrc_login(base_url: str) -> _BasicLogin | None:
    """An entry for this host, unless the environment names another user."""
    entry = requests.utils.get_netrc_auth(base_url)
    wanted = os.environ.get(USERNAME_VARIABLE)
    return _BasicLogin(*entry) if entry and wanted in (None, "", entry[0]) else None


# The data sets. What reads tables is imported when it is needed: that takes seconds, and the first file need not wait.


def _mimic_table(name: str) -> str:
    return f"mimic-cxr-2.0.0-{name}.csv.gz"  # in later releases too


_MIMIC_TABLES = tuple(map(_mimic_table, ("metadata", "split", "chexpert")))


def _mimic_image(image: str, subject: str, study: str) -> str:
    return f"files/p{subject[:2]}/p{subject}/s{study}/{image}.jpg"


def _fetch_mimic_cxr(job: _Downloader, subset: Sequence[str] | None, limit: int | None, images: bool) -> None:
    job.fetch("mimic-cxr-jpg", _MIMIC_TABLES)
    job.fetch("mimic-cxr", ["mimic-cxr-reports.zip"])
    if not images:
        return
    from training.data.raw import read_columns
    from training.data.record import VIEWS

    root = job.root("mimic-cxr-jpg")
    split_of = dict(zip(*read_columns(root / _mimic_table("split"), ("dicom_id", "split")).values(), strict=True))
    taken: dict[str, list[str]] = {}
    rows = read_columns(root / _mimic_table("metadata"), ("dicom_id", "subject_id", "study_id", "ViewPosition"))
    for image, subject, study, view in zip(*rows.values(), strict=True):
        split = split_of.get(image)
        if view in VIEWS and split is not None and (subset is None or split in subset):
            taken.setdefault(split, []).append(_mimic_image(image, subject, study))
    job.fetch("mimic-cxr-jpg", [path for paths in taken.values() for path in paths[:limit]], images=True)


def _fetch_chest_imagenome(job: _Downloader, subset: Sequence[str] | None, limit: int | None, images: bool) -> None:
    tables = [f"silver_dataset/splits/{name}.csv" for name in ("train", "valid", "test", "images_to_avoid")]
    job.fetch("chest-imagenome", [*tables, "silver_dataset/scene_graph.zip"])


def _fetch_ms_cxr(job: _Downloader, subset: Sequence[str] | None, limit: int | None, images: bool) -> None:
    version = job.versions["ms-cxr"]
    name = f"MS_CXR_Local_Alignment_v{'1.0.0' if version == '0.1' else version}.csv"
    job.fetch("ms-cxr", [name])
    if not images:
        return
    job.fetch("mimic-cxr-jpg", _MIMIC_TABLES)
    from training.data.raw import read_columns, read_table
    from training.data.record import VIEWS

    boxed = {row["dicom_id"] for row in read_table(job.root("ms-cxr") / name, ("dicom_id",))}
    table = job.root("mimic-cxr-jpg") / _mimic_table("metadata")
    rows = zip(*read_columns(table, ("dicom_id", "subject_id", "study_id", "ViewPosition")).values(), strict=True)
    paths = [_mimic_image(*ids) for *ids, view in rows if ids[0] in boxed and view in VIEWS]
    job.fetch("mimic-cxr-jpg", paths[:limit], images=True)


def _fetch_vindr_cxr(job: _Downloader, subset: Sequence[str] | None, limit: int | None, images: bool) -> None:
    job.fetch(
        "vindr-cxr",
        [f"annotations/{kind}_{split}.csv" for kind in ("annotations", "image_labels") for split in ("train", "test")],
    )
    if not images:
        return
    from training.data.raw import read_table

    paths = []
    for split in subset or ("train", "test"):
        table = job.root("vindr-cxr") / "annotations" / f"image_labels_{split}.csv"
        ids = dict.fromkeys(row["image_id"] for row in read_table(table, ("image_id",)))  # three readers a train image
        paths += [f"{split}/{image}.dicom" for image in list(ids)[:limit]]
    job.fetch("vindr-cxr", paths, images=True)


_PHYSIONET_SETS: dict[str, tuple[Callable[..., None], tuple[str, ...]]] = {
    # name -> how it is fetched, splits to choose from
    "mimic-cxr": (_fetch_mimic_cxr, ("train", "validate", "test")),
    "chest-imagenome": (_fetch_chest_imagenome, ()),
    "ms-cxr": (_fetch_ms_cxr, ()),
    "vindr-cxr": (_fetch_vindr_cxr, ("train", "test")),
}
DOWNLOADS = (*_PHYSIONET_SETS, "nih-cxr14")


def _download_nih(out: Path) -> DownloadSummary:
    """ChestX-ray14 by the Kaggle client, which resumes, unpacks and finds its credentials by itself."""
    target = out / "nih-cxr14"
    if (target / "Data_Entry_2017.csv").is_file():
        return DownloadSummary([target], skipped=1)
    try:
        import kagglehub
    except ImportError as error:
        raise DownloadError(
            "nih-cxr14 is fetched from Kaggle with its own client, which is not installed: pip install kagglehub. "
            "Or download it by hand from https://nihcc.app.box.com/v/ChestXray-NIHCC."
        ) from error
    # Below `out`, so that 45 GB do not land in the home folder and the finished folder can be renamed.
    cache = out / "nih-cxr14.kagglehub"
    before = os.environ.get("KAGGLEHUB_CACHE")
    os.environ["KAGGLEHUB_CACHE"] = str(cache)
    try:
        folder = kagglehub.dataset_download(KAGGLE_NIH)
    except Exception as error:
        raise DownloadError(
            f"nih-cxr14: Kaggle's client stopped ({type(error).__name__}: {error}). Start the same command again: it "
            f"goes on from what is in {cache}."
        ) from error
    finally:
        if before is None:
            del os.environ["KAGGLEHUB_CACHE"]
        else:
            os.environ["KAGGLEHUB_CACHE"] = before
    if cache not in Path(folder).parents:  # Kaggle's own notebooks have the data mounted
        return DownloadSummary([Path(folder)], skipped=1)
    with _storage(target):
        os.replace(folder, target)
        shutil.rmtree(cache)
    return DownloadSummary([target], fetched=1, bytes=sum(p.stat().st_size for p in target.rglob("*") if p.is_file()))


def download(
    name: str,
    out: str | Path,
    *,
    subset: str | Sequence[str] | None = None,
    limit: int | None = None,
    images: bool = True,
    versions: Mapping[str, str] | None = None,
    base_url: str = PHYSIONET,
    workers: int = 4,
    retries: RetryPolicy | None = None,
    progress: bool = True,
) -> DownloadSummary:
    """
    Fetches the files of a data set that are needed, each into `out/<project>/<version>/<path>`.

    Files that are complete are passed over, others resumed; sizes and published checksums are verified before a file
    gets its name. The login is taken from the environment (PHYSIONET_USERNAME, PHYSIONET_PASSWORD), netrc, or the
    terminal. chest-imagenome needs the images of mimic-cxr, which are a download of their own.

    Args:
        name: One of DOWNLOADS, in which _ may stand for -.
        subset: Splits to fetch images of, all by default. mimic-cxr: train, validate, test; vindr-cxr: train, test.
        limit: At most so many images of each split, for a trial.
        images: False to fetch tables and archives only.
        versions: PhysioNet project -> release, where it is not to be that of VERSIONS.
        base_url: Address that the projects are below.
        workers: Files at a time.
        progress: Show a bar, if there is a terminal.

    Raises:
        AccessError: Login or data use agreement.
        StorageError: Disk full or folder not writable.
        DownloadError: Some files could not be fetched (`failures` lists them), or another download is at work here.
        KeyboardInterrupt: After Ctrl-C, with a message; partial files stay and are resumed.
        ValueError: For wrong arguments.
    """
    key = name.lower().replace("_", "-")
    if key not in DOWNLOADS:
        raise ValueError(f"There is no download {name!r}. Known: {', '.join(DOWNLOADS)}.")
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, not {limit}: images=False fetches tables only.")
    if workers < 1:
        raise ValueError(f"workers must be at least 1, not {workers}.")
    if unknown := set(versions or {}) - set(VERSIONS):
        raise ValueError(f"versions are of {', '.join(VERSIONS)}, not of {', '.join(sorted(unknown))}.")
    subset = (subset,) if isinstance(subset, str) else subset
    if subset is not None:
        choices = _PHYSIONET_SETS[key][1] if key in _PHYSIONET_SETS else ()
        if "validate" in choices:
            subset = ["validate" if split == "validation" else split for split in subset]
        if not subset or not set(subset) <= set(choices):
            known = f"the splits {', '.join(choices)}" if choices else "no splits to choose from"
            raise ValueError(f"{key} has {known}; subset is {', '.join(subset) or 'empty'}.")
    if key == "chest-imagenome" and limit is not None:
        raise ValueError("chest-imagenome has no images of its own that limit could apply to.")
    if key == "nih-cxr14" and (limit is not None or not images):
        raise ValueError("nih-cxr14 is one archive on Kaggle and is fetched whole: leave limit and images out.")

    out = Path(out).expanduser().absolute()
    with _storage(out):
        out.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(out / ".download.lock", timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise DownloadError(f"Another download is writing to {out}: wait for it or choose another folder.") from None
    except OSError as error:
        raise _storage_error(out, error) from error
    try:
        if key == "nih-cxr14":
            return _download_nih(out)
        base_url = base_url.rstrip("/")
        job = _Downloader(
            out,
            base_url,
            VERSIONS | dict(versions or {}),
            _find_login(base_url),
            workers,
            retries or RetryPolicy(),
            progress,
        )
        _PHYSIONET_SETS[key][0](job, subset, limit, images)
        job.raise_failures(key)
        return job.summary
    finally:
        lock.release()


__all__ = [
    "CHECKSUMS",
    "DOWNLOADS",
    "PASSWORD_VARIABLE",
    "PHYSIONET",
    "USERNAME_VARIABLE",
    "VERSIONS",
    "AccessError",
    "DownloadError",
    "DownloadSummary",
    "Failure",
    "RetryPolicy",
    "StorageError",
    "download",
    "read_checksums",
]
