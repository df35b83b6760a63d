"""Downloads against a real local server that drops connections, refuses, redirects and is killed under."""

import base64
import email.utils
import gzip
import hashlib
import json
import logging
import os
import pty
import re
import select
import signal
import stat
import subprocess
import sys
import textwrap
import time
import traceback
from pathlib import Path

import filelock
import pytest

from tests.download_server import DownloadServer, Fault, running
from training.data.download import (
    PASSWORD_VARIABLE,
    USERNAME_VARIABLE,
    AccessError,
    DownloadError,
    RetryPolicy,
    StorageError,
    download,
    read_checksums,
)


USER, PASSWORD = "reader-4711", "s3cret:pass/word"
ROOT = Path(__file__).parents[1]
FAST = RetryPolicy(attempts=4, first_wait=0.01, longest_wait=0.05, timeout=5)

JPG, REPORTS, IMAGENOME = "mimic-cxr-jpg/2.0.0", "mimic-cxr/2.0.0", "chest-imagenome/1.0.0"
ZIP = "silver_dataset/scene_graph.zip"
METADATA = """dicom_id,subject_id,study_id,PerformedProcedureStepDescription,ViewPosition,Rows,Columns
aa01,10000001,50000001,CHEST,PA,3056,2544
aa02,10000001,50000001,CHEST,LATERAL,3056,2544
aa03,10000001,50000002,CHEST,AP,2544,3056
bb01,11000002,50000003,CHEST,AP,2544,3056
cc01,12000003,50000004,CHEST,PA,2544,3056
cc02,12000003,50000004,CHEST,,2544,3056
"""
SPLIT = """dicom_id,study_id,subject_id,split
aa01,50000001,10000001,train
aa02,50000001,10000001,train
aa03,50000002,10000001,train
bb01,50000003,11000002,validate
cc01,50000004,12000003,test
cc02,50000004,12000003,test
"""
IMAGES = {
    "aa01": "files/p10/p10000001/s50000001/aa01.jpg",
    "aa02": "files/p10/p10000001/s50000001/aa02.jpg",
    "aa03": "files/p10/p10000001/s50000002/aa03.jpg",
    "bb01": "files/p11/p11000002/s50000003/bb01.jpg",
    "cc01": "files/p12/p12000003/s50000004/cc01.jpg",
    "cc02": "files/p12/p12000003/s50000004/cc02.jpg",
}


def content(seed: str, size: int) -> bytes:
    """`size` bytes that no compression or offset mistake can pass for others."""
    return b"".join(hashlib.sha256(f"{seed}{i}".encode()).digest() for i in range(size // 32 + 1))[:size]


def add_mimic(server: DownloadServer) -> None:
    tables = {
        "mimic-cxr-2.0.0-metadata.csv.gz": gzip.compress(METADATA.encode()),
        "mimic-cxr-2.0.0-split.csv.gz": gzip.compress(SPLIT.encode()),
        "mimic-cxr-2.0.0-chexpert.csv.gz": gzip.compress(b"subject_id,study_id\n"),
    }
    server.add(JPG, tables | {path: content(path, 50_000) for path in IMAGES.values()})
    server.add(REPORTS, {"mimic-cxr-reports.zip": content("reports", 80_000), "cxr-record-list.csv.gz": b"unused"})


def add_imagenome(server: DownloadServer, size: int = 3_000_000, checksums: bool = True) -> bytes:
    archive = content("scene graphs", size)
    tables = {f"silver_dataset/splits/{name}.csv": name.encode() for name in ("train", "valid", "test")}
    tables["silver_dataset/splits/images_to_avoid.csv"] = b"avoid"
    server.add(IMAGENOME, tables | {ZIP: archive}, checksums)
    return archive


@pytest.fixture
def server(monkeypatch, tmp_path):
    monkeypatch.setenv(USERNAME_VARIABLE, USER)
    monkeypatch.setenv(PASSWORD_VARIABLE, PASSWORD)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    with running(USER, PASSWORD) as server:
        yield server


def fetch(server: DownloadServer, name: str, out: Path, **options):
    return download(name, out, **({"base_url": server.url(), "retries": FAST, "progress": False} | options))


def fetched_images(out: Path) -> list[str]:
    return sorted(path.stem for path in (out / JPG).glob("files/*/*/*/*.jpg"))


# What is fetched


def test_mimic_fetches_tables_reports_and_frontal_images_only(server, tmp_path):
    add_mimic(server)
    summary = fetch(server, "mimic_cxr", tmp_path)
    assert fetched_images(tmp_path) == ["aa01", "aa03", "bb01", "cc01"]
    for project, path in [(JPG, path) for path in (IMAGES["aa01"], "mimic-cxr-2.0.0-split.csv.gz")] + [
        (REPORTS, "mimic-cxr-reports.zip")
    ]:
        assert (tmp_path / project / path).read_bytes() == server.files[f"{project}/{path}"]
    assert server.count(f"{REPORTS}/cxr-record-list.csv.gz") == 0
    assert server.count(f"{JPG}/{IMAGES['aa02']}") == 0
    # 4 images, 3 tables, 1 archive and 2 lists of checksums
    assert (summary.fetched, summary.skipped) == (10, 0)
    assert summary.bytes == sum((tmp_path / request.path).stat().st_size for request in server.requests)
    assert summary.folders == [tmp_path / JPG, tmp_path / REPORTS]
    assert not list(tmp_path.rglob("*.partial*"))


@pytest.mark.parametrize(
    ("options", "images"),
    [
        ({"subset": "test"}, ["cc01"]),
        ({"subset": ["validation", "test"]}, ["bb01", "cc01"]),
        ({"limit": 1}, ["aa01", "bb01", "cc01"]),
        ({"subset": ("train",), "limit": 1}, ["aa01"]),
        ({"images": False}, []),
    ],
)
def test_fewer_images_on_request(server, tmp_path, options, images):
    add_mimic(server)
    fetch(server, "mimic-cxr", tmp_path, **options)
    assert fetched_images(tmp_path) == images


def test_chest_imagenome_fetches_the_archive_and_the_tables(server, tmp_path):
    archive = add_imagenome(server)
    server.add(IMAGENOME, {"gold_dataset/gold.txt": b"unused"}, checksums=False)
    fetch(server, "chest-imagenome", tmp_path)
    assert (tmp_path / IMAGENOME / ZIP).read_bytes() == archive
    assert sorted(path.name for path in (tmp_path / IMAGENOME / "silver_dataset/splits").iterdir()) == [
        "images_to_avoid.csv",
        "test.csv",
        "train.csv",
        "valid.csv",
    ]
    assert server.count(f"{IMAGENOME}/gold_dataset/gold.txt") == 0


@pytest.mark.parametrize(
    ("version", "name"),
    [("0.1", "MS_CXR_Local_Alignment_v1.0.0.csv"), ("1.1.0", "MS_CXR_Local_Alignment_v1.1.0.csv")],
)
def test_ms_cxr_fetches_its_table_and_only_its_own_frontal_images(server, tmp_path, version, name):
    add_mimic(server)
    server.add(
        f"ms-cxr/{version}", {name: b"dicom_id,category_name\naa03,Edema\naa03,Edema\ncc01,Edema\naa02,Edema\n"}
    )
    fetch(server, "ms-cxr", tmp_path, versions={"ms-cxr": version})
    assert (tmp_path / "ms-cxr" / version / name).is_file()
    assert fetched_images(tmp_path) == ["aa03", "cc01"]


def test_vindr_fetches_annotations_and_each_dicom_once(server, tmp_path):
    labels = "image_id,rad_id,Edema\n" + "".join(f"{image},R{i},0\n" for image in ("0a", "0b") for i in range(3))
    files = {
        "annotations/annotations_train.csv": b"image_id\n",
        "annotations/annotations_test.csv": b"image_id\n",
        "annotations/image_labels_train.csv": labels.encode(),
        "annotations/image_labels_test.csv": b"image_id,Edema\n0c,1\n",
    } | {f"{path}.dicom": path.encode() for path in ("train/0a", "train/0b", "test/0c", "test/0d")}
    server.add("vindr-cxr/1.0.0", files)
    fetch(server, "vindr-cxr", tmp_path)
    assert sorted(path.name for path in tmp_path.rglob("*.dicom")) == ["0a.dicom", "0b.dicom", "0c.dicom"]
    assert all(server.count(request.path) == 1 for request in server.requests)


# Connections that fail


def test_a_dropped_connection_goes_on_in_the_middle_of_the_file(server, tmp_path):
    archive = add_imagenome(server)
    server.faults[f"{IMAGENOME}/{ZIP}"] = [Fault(drop_after=1_000_000), Fault(drop_after=500_000)]
    summary = fetch(server, "chest-imagenome", tmp_path)
    assert (tmp_path / IMAGENOME / ZIP).read_bytes() == archive
    first, *later = server.ranges(f"{IMAGENOME}/{ZIP}")
    starts = [int(value.removeprefix("bytes=").removesuffix("-")) for value in later]
    assert first is None and len(starts) == 2
    assert 900_000 < starts[0] <= 1_000_000 and 1_350_000 < starts[1] <= 1_500_000
    assert summary.bytes < 3_400_000


def test_a_server_that_ignores_ranges_sends_the_file_again_from_its_beginning(server, tmp_path):
    archive = add_imagenome(server)
    server.faults[f"{IMAGENOME}/{ZIP}"] = [Fault(drop_after=1_000_000), Fault(ignore_range=True)]
    fetch(server, "chest-imagenome", tmp_path)
    assert (tmp_path / IMAGENOME / ZIP).read_bytes() == archive
    assert server.count(f"{IMAGENOME}/{ZIP}") == 2


@pytest.mark.parametrize(
    "size", [3_000_000, 2_000_000, 100_000], ids=["same size", "other size", "shorter than begun"]
)
def test_a_file_that_changed_on_the_server_is_not_pieced_together(server, tmp_path, size):
    add_imagenome(server, checksums=False)
    server.always[f"{IMAGENOME}/{ZIP}"] = Fault(drop_after=300_000)
    with pytest.raises(DownloadError, match=r"scene_graph\.zip: .*after 4 attempts"):
        fetch(server, "chest-imagenome", tmp_path)
    assert (tmp_path / IMAGENOME / f"{ZIP}.partial").stat().st_size > 0
    server.always.clear()
    changed = server.files[f"{IMAGENOME}/{ZIP}"] = content("a new version", size)
    fetch(server, "chest-imagenome", tmp_path)
    assert (tmp_path / IMAGENOME / ZIP).read_bytes() == changed


def test_a_partial_file_that_is_complete_only_gets_its_name(server, tmp_path):
    archive = add_imagenome(server)
    target = tmp_path / IMAGENOME / ZIP
    target.parent.mkdir(parents=True)
    target.with_name("scene_graph.zip.partial").write_bytes(archive)
    target.with_name("scene_graph.zip.partial.json").write_text(
        json.dumps({"size": len(archive), "etag": None, "modified": None}), encoding="utf-8"
    )
    fetch(server, "chest-imagenome", tmp_path)
    assert target.read_bytes() == archive
    assert server.count(f"{IMAGENOME}/{ZIP}") == 0


def test_server_errors_are_tried_again_and_then_given_up(server, tmp_path):
    add_mimic(server)
    server.faults[f"{JPG}/{IMAGES['aa01']}"] = [Fault(status=500), Fault(status=502), Fault(status=504)]
    server.always[f"{JPG}/{IMAGES['bb01']}"] = Fault(status=500)
    with pytest.raises(DownloadError, match="1 files could not be downloaded: .*bb01.jpg: the server answers 500"):
        fetch(server, "mimic-cxr", tmp_path)
    assert fetched_images(tmp_path) == ["aa01", "aa03", "cc01"]
    assert server.count(f"{JPG}/{IMAGES['bb01']}") == FAST.attempts


@pytest.mark.parametrize(("status", "as_date"), [(429, False), (503, False), (429, True)])
def test_retry_after_is_honoured(server, tmp_path, status, as_date):
    archive = add_imagenome(server, size=1000)
    # A date has whole seconds: of 2 s from now at least one is left.
    value = email.utils.formatdate(time.time() + 2, usegmt=True) if as_date else "1"
    server.faults[f"{IMAGENOME}/{ZIP}"] = [Fault(status=status, headers={"Retry-After": value})]
    fetch(server, "chest-imagenome", tmp_path)
    assert (tmp_path / IMAGENOME / ZIP).read_bytes() == archive
    first, second = [request.time for request in server.requests if request.path.endswith(ZIP)]
    assert 0.9 < second - first < 4


def test_a_pause_that_is_too_long_is_a_failure_that_says_so(server, tmp_path):
    add_imagenome(server)
    server.always[f"{IMAGENOME}/{ZIP}"] = Fault(status=429, headers={"Retry-After": "7200"})
    with pytest.raises(DownloadError, match="a pause .429. of 7,200 s; try again then"):
        fetch(server, "chest-imagenome", tmp_path)
    assert server.count(f"{IMAGENOME}/{ZIP}") == 1


def test_no_server_at_all(server, tmp_path):
    with pytest.raises(DownloadError, match="Connection refused"):
        fetch(server, "chest-imagenome", tmp_path, base_url="http://127.0.0.1:9/files")


# Contents that are wrong


def test_missing_files_are_listed_and_the_others_fetched(server, tmp_path):
    add_mimic(server)
    del server.files[f"{JPG}/{IMAGES['aa03']}"]
    with pytest.raises(
        DownloadError, match=r"mimic-cxr: 1 files .*aa03\.jpg: it is not on the server \(404\)"
    ) as info:
        fetch(server, "mimic-cxr", tmp_path)
    failure = info.value.failures[0]
    assert (failure.path, failure.absent) == (f"mimic-cxr-jpg/{IMAGES['aa03']}", True)
    assert failure.url == f"{server.url()}/{JPG}/{IMAGES['aa03']}"
    assert fetched_images(tmp_path) == ["aa01", "bb01", "cc01"]


def test_a_project_without_checksums_is_fetched_all_the_same(server, tmp_path):
    archive = add_imagenome(server, checksums=False)
    fetch(server, "chest-imagenome", tmp_path)
    assert (tmp_path / IMAGENOME / ZIP).read_bytes() == archive


def test_a_wrong_checksum_is_fetched_again_once(server, tmp_path):
    archive = add_imagenome(server)
    server.faults[f"{IMAGENOME}/{ZIP}"] = [Fault(corrupt=True)]
    fetch(server, "chest-imagenome", tmp_path)
    assert (tmp_path / IMAGENOME / ZIP).read_bytes() == archive

    server.requests.clear()
    server.always[f"{IMAGENOME}/{ZIP}"] = Fault(corrupt=True)
    with pytest.raises(DownloadError, match="does not match the checksum in SHA256SUMS.txt, twice"):
        fetch(server, "chest-imagenome", tmp_path / "other")
    assert server.count(f"{IMAGENOME}/{ZIP}") == 2
    assert not (tmp_path / "other" / IMAGENOME / ZIP).exists()


def test_finished_files_are_not_fetched_again_unless_they_were_changed(server, tmp_path):
    add_mimic(server)
    fetch(server, "mimic-cxr", tmp_path)
    server.requests.clear()
    summary = fetch(server, "mimic-cxr", tmp_path)
    assert server.requests == []
    assert (summary.fetched, summary.skipped, summary.bytes) == (0, 10, 0)

    damaged = tmp_path / JPG / IMAGES["bb01"]
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    fetch(server, "mimic-cxr", tmp_path)
    assert [request.path for request in server.requests] == [f"{JPG}/{IMAGES['bb01']}"]
    assert damaged.read_bytes() == server.files[f"{JPG}/{IMAGES['bb01']}"]


def test_a_tree_from_another_downloader_is_taken_over_after_its_checksums(server, tmp_path):
    add_mimic(server)
    for path in (IMAGES["aa01"], IMAGES["aa03"]):
        (tmp_path / JPG / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / JPG / path).write_bytes(server.files[f"{JPG}/{path}"])
    (tmp_path / JPG / IMAGES["aa03"]).write_bytes(b"cut off")
    fetch(server, "mimic-cxr", tmp_path)
    assert server.count(f"{JPG}/{IMAGES['aa01']}") == 0
    assert server.count(f"{JPG}/{IMAGES['aa03']}") == 1


# Access


def test_a_wrong_password_ends_the_download(server, tmp_path, monkeypatch):
    add_mimic(server)
    monkeypatch.setenv(PASSWORD_VARIABLE, "wrong-password-0815")
    with pytest.raises(AccessError, match=r"does not accept the user name or the password \(401\)") as info:
        fetch(server, "mimic-cxr", tmp_path)
    assert len(server.requests) == 1
    assert info.value.failures[0].path == "mimic-cxr-jpg/SHA256SUMS.txt"
    assert "wrong-password-0815" not in str(info.value)


def test_an_agreement_that_is_not_signed_names_its_page(server, tmp_path):
    add_mimic(server)
    server.always = {path: Fault(status=403) for path in server.files if path.startswith(JPG)}
    with pytest.raises(
        AccessError, match=r"Sign the data use agreement at https://physionet\.org/content/mimic-cxr-jpg"
    ):
        fetch(server, "mimic-cxr", tmp_path)
    assert len(server.requests) == 1


@pytest.mark.parametrize("content_type", ["text/html; charset=utf-8", "application/octet-stream"])
def test_a_login_page_is_not_taken_for_data(server, tmp_path, content_type):
    add_imagenome(server)
    page = b"\n<!DOCTYPE html>\n<html><body>Log in</body></html>"
    server.always[f"{IMAGENOME}/{ZIP}"] = Fault(status=200, headers={"Content-Type": content_type}, body=page)
    with pytest.raises(AccessError, match="scene_graph.zip is a saved web page rather than data"):
        fetch(server, "chest-imagenome", tmp_path)
    assert not (tmp_path / IMAGENOME / ZIP).exists()


def test_a_redirect_to_another_host_does_not_take_the_login_along(server, tmp_path):
    archive = add_imagenome(server)
    with running(USER, PASSWORD) as mirror:
        place = {"Location": f"{mirror.url('localhost')}/mirrored"}
        server.always[f"{IMAGENOME}/{ZIP}"] = Fault(status=302, headers=place)
        mirror.always["mirrored"] = Fault(status=200, body=archive)
        fetch(server, "chest-imagenome", tmp_path)
        assert (tmp_path / IMAGENOME / ZIP).read_bytes() == archive
        assert [request.authorization for request in mirror.requests] == [None]
        assert server.requests[0].authorization is not None


def test_a_redirect_on_the_same_host_is_followed_with_the_login(server, tmp_path):
    archive = add_imagenome(server)
    server.files["moved"] = archive
    server.always[f"{IMAGENOME}/{ZIP}"] = Fault(status=302, headers={"Location": "/files/moved"})
    fetch(server, "chest-imagenome", tmp_path)
    assert (tmp_path / IMAGENOME / ZIP).read_bytes() == archive


def test_the_login_comes_from_netrc_if_the_environment_has_none(server, tmp_path, monkeypatch):
    add_imagenome(server)
    monkeypatch.delenv(PASSWORD_VARIABLE)
    netrc = tmp_path / "netrc"
    netrc.write_text(f"machine 127.0.0.1 login {USER} password {PASSWORD}\n", encoding="utf-8")
    netrc.chmod(stat.S_IRUSR | stat.S_IWUSR)
    monkeypatch.setenv("NETRC", str(netrc))
    assert fetch(server, "chest-imagenome", tmp_path).fetched == 6


def test_without_login_and_terminal_the_message_says_where_to_put_it(server, tmp_path, monkeypatch):
    monkeypatch.delenv(PASSWORD_VARIABLE)
    with pytest.raises(AccessError, match=r"Set PHYSIONET_USERNAME and PHYSIONET_PASSWORD, .*netrc, or start"):
        fetch(server, "chest-imagenome", tmp_path)
    assert server.requests == []


def script(server: DownloadServer, out: Path, name: str = "chest-imagenome") -> list[str]:
    """Command of a process that downloads, with all messages on, and ends with 3 after an error."""
    code = f"""
        import logging, sys
        logging.basicConfig(level=logging.DEBUG)
        from training.data.download import DownloadError, RetryPolicy, download
        try:
            print(download({name!r}, {str(out)!r}, base_url={server.url()!r}, workers=1,
                           retries=RetryPolicy(attempts=3, first_wait=0.01, timeout=5)))
        except DownloadError as error:
            logging.exception("failed")
            sys.exit(3)
    """
    return [sys.executable, "-c", textwrap.dedent(code)]


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT)}


def test_a_terminal_is_asked_and_does_not_show_the_password(server, tmp_path, monkeypatch):
    archive = add_imagenome(server)
    monkeypatch.delenv(USERNAME_VARIABLE)
    monkeypatch.delenv(PASSWORD_VARIABLE)
    command = script(server, tmp_path)
    process, terminal = pty.fork()
    if process == 0:
        os.execve(command[0], command, environment())
    shown, answers = "", {"User name for 127.0.0.1: ": USER, f"Password of {USER} for 127.0.0.1: ": PASSWORD}
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        if not select.select([terminal], [], [], 0.1)[0]:
            continue
        try:
            data = os.read(terminal, 4096)
        except OSError:  # the other side has closed it
            break
        shown += data.decode()
        for question in [question for question in answers if question in shown]:
            os.write(terminal, f"{answers.pop(question)}\n".encode())
    _, status = os.waitpid(process, 0)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(status) == 0, shown
    assert not answers
    assert PASSWORD not in shown
    assert (tmp_path / IMAGENOME / ZIP).read_bytes() == archive


def test_no_credential_in_any_output_file_or_exception(server, tmp_path, monkeypatch):
    """Through refusals, lost connections, redirects and success, with all messages on."""
    secrets = [PASSWORD, USER, base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()]
    texts = []
    archive_path = f"{IMAGENOME}/{ZIP}"
    faults = {
        "refused": Fault(status=401),
        "unsigned": Fault(status=403),
        "broken": Fault(drop_after=100),
        "failing": Fault(status=500),
        "circle": Fault(status=302, headers={"Location": f"/files/{archive_path}"}),
    }
    add_imagenome(server)
    for name, fault in faults.items():
        server.always[archive_path] = fault
        with pytest.raises(DownloadError) as info:
            fetch(server, "chest-imagenome", tmp_path / name)
        captured = traceback.TracebackException.from_exception(info.value, capture_locals=True)
        # Arguments of the tests themselves are no part of the package.
        frames = [frame for frame in captured.stack if frame.filename != __file__]
        texts += [line for frame in frames for line in (frame.locals or {}).values()]
        texts += [str(info.value), repr(info.value), repr(info.value.failures)]
    server.always.clear()
    server.faults[archive_path] = [Fault(drop_after=100), Fault(status=500)]
    for broken in (False, True):
        if broken:
            server.always[archive_path] = Fault(drop_after=100)
        run = subprocess.run(
            script(server, tmp_path / f"process{broken}"),
            env=environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert run.returncode == (3 if broken else 0), run.stderr
        texts += [run.stdout, run.stderr]
    assert any("attempt 2" in text for text in texts)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.name.endswith(".partial.json") for path in files)
    texts += [str(path) for path in files] + [path.read_bytes().decode("latin-1") for path in files]
    for secret in secrets:
        assert [text[:200] for text in texts if secret in text] == []


def test_passwords_are_not_sent_unencrypted_nor_taken_from_addresses(server, tmp_path):
    with pytest.raises(ValueError, match="unencrypted: use https"):
        download("ms-cxr", tmp_path, base_url="http://example.org/files")
    with pytest.raises(ValueError, match="must not hold a user name or password") as info:
        download("ms-cxr", tmp_path, base_url=f"https://{USER}:geheim@example.org/files")
    assert "geheim" not in str(info.value)
    with pytest.raises(ValueError, match="must be an http.s. address"):
        download("ms-cxr", tmp_path, base_url="ftp://example.org/files")


# Stopping and going on


def wait_for(condition, process: subprocess.Popen, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT], ids=["kill -9", "Ctrl-C"])
def test_a_stopped_process_goes_on_in_the_middle_of_the_file(server, tmp_path, how):
    archive = add_imagenome(server, size=8_000_000)
    server.chunk, server.pause = 100_000, 0.02
    partial = tmp_path / IMAGENOME / f"{ZIP}.partial"
    process = subprocess.Popen(
        script(server, tmp_path),
        env=environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for(lambda: partial.is_file() and partial.stat().st_size > 1_000_000, process)
    process.send_signal(how)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == -how
    if how == signal.SIGINT:
        assert "The same command goes on where this one stopped." in errors
    begun = partial.stat().st_size
    assert 1_000_000 < begun < 8_000_000
    assert not (tmp_path / IMAGENOME / ZIP).exists()

    server.pause = 0.0
    before = len(server.requests)
    summary = fetch(server, "chest-imagenome", tmp_path)
    assert (tmp_path / IMAGENOME / ZIP).read_bytes() == archive
    digests = read_checksums(tmp_path / IMAGENOME / "SHA256SUMS.txt")
    assert len(digests) == 5
    for path, digest in digests.items():
        assert hashlib.sha256((tmp_path / IMAGENOME / path).read_bytes()).hexdigest() == digest
    # The list of checksums and the tables were finished, and of the archive only the rest was missing.
    assert [(r.path, r.range) for r in server.requests[before:]] == [(f"{IMAGENOME}/{ZIP}", f"bytes={begun}-")]
    assert summary.skipped == 5
    assert summary.bytes == 8_000_000 - begun


def test_several_files_at_a_time_but_no_more_than_asked_for(server, tmp_path):
    add_mimic(server)
    server.chunk, server.pause = 10_000, 0.02
    fetch(server, "mimic-cxr", tmp_path, workers=3)
    assert server.most_at_once == 3


def test_two_downloads_do_not_write_to_the_same_folder(server, tmp_path):
    with filelock.FileLock(tmp_path / ".download.lock"), pytest.raises(DownloadError, match="Another download"):
        fetch(server, "chest-imagenome", tmp_path)


# The disk


def test_a_full_disk_ends_the_download_with_its_reason(server, tmp_path):
    add_imagenome(server)
    folder = tmp_path / IMAGENOME / "silver_dataset"
    folder.mkdir(parents=True)
    (folder / "scene_graph.zip.partial").symlink_to("/dev/full")
    with pytest.raises(StorageError, match=r"scene_graph\.zip cannot be .* \(No space left on device\)\. Free space"):
        fetch(server, "chest-imagenome", tmp_path)


def test_a_folder_that_cannot_be_made(server, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match=r"file/data cannot be .* \(Not a directory\).* choose another folder"):
        fetch(server, "chest-imagenome", tmp_path / "file" / "data")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission(server, tmp_path):
    (tmp_path / "data").mkdir(mode=0o500)
    with pytest.raises(StorageError, match=r"data cannot be .* \(Permission denied\)"):
        fetch(server, "chest-imagenome", tmp_path / "data")


# Arguments and Kaggle


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("padchest", {}, "no download 'padchest'. Known: mimic-cxr, chest-imagenome"),
        ("mimic-cxr", {"subset": "dev"}, "the splits train, validate, test; subset is dev"),
        ("mimic-cxr", {"subset": []}, "subset is empty"),
        ("ms-cxr", {"subset": "test"}, "no splits to choose from"),
        ("mimic-cxr", {"limit": 0}, "limit must be at least 1"),
        ("mimic-cxr", {"workers": 0}, "workers must be at least 1"),
        ("mimic-cxr", {"versions": {"mimic": "2"}}, "versions are of mimic-cxr-jpg, .* not of mimic"),
        ("chest-imagenome", {"limit": 3}, "no images of its own"),
        ("nih-cxr14", {"limit": 3}, "fetched whole"),
    ],
)
def test_wrong_arguments(tmp_path, name, options, message):
    with pytest.raises(ValueError, match=message):
        download(name, tmp_path, **options)
    assert list(tmp_path.iterdir()) == []


def test_nih_without_the_client_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "kagglehub", None)
    with pytest.raises(DownloadError, match=r"pip install kagglehub\. Or download it by hand from https://nihcc\.app"):
        download("nih-cxr14", tmp_path)


def test_nih_is_moved_from_the_cache_of_the_client_to_its_folder(tmp_path, monkeypatch):
    """A stand-in for the client writes where the real one does: below KAGGLEHUB_CACHE."""
    (tmp_path / "kagglehub.py").write_text(
        textwrap.dedent("""
            import os, pathlib

            def dataset_download(handle):
                folder = pathlib.Path(os.environ["KAGGLEHUB_CACHE"], "datasets", handle, "versions", "3")
                folder.mkdir(parents=True, exist_ok=True)
                if not (folder / "begun").exists():
                    (folder / "begun").touch()
                    raise ConnectionError("lost")
                (folder / "Data_Entry_2017.csv").write_text("Image Index")
                return str(folder)
        """),
        encoding="utf-8",
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "kagglehub", raising=False)
    monkeypatch.delenv("KAGGLEHUB_CACHE", raising=False)
    with pytest.raises(DownloadError, match=re.escape("(ConnectionError: lost). Start the same command again")):
        download("nih-cxr14", tmp_path / "out")
    assert download("nih-cxr14", tmp_path / "out").folders == [tmp_path / "out" / "nih-cxr14"]
    assert (tmp_path / "out/nih-cxr14/Data_Entry_2017.csv").is_file()
    assert not (tmp_path / "out/nih-cxr14.kagglehub").exists()
    assert "KAGGLEHUB_CACHE" not in os.environ
    assert download("nih-cxr14", tmp_path / "out").skipped == 1
    monkeypatch.delitem(sys.modules, "kagglehub")


def test_messages_of_retries_are_for_the_log_only(server, tmp_path, caplog):
    add_imagenome(server)
    server.faults[f"{IMAGENOME}/{ZIP}"] = [Fault(status=500)]
    with caplog.at_level(logging.INFO, logger="training.data.download"):
        fetch(server, "chest-imagenome", tmp_path)
    assert [record.levelno for record in caplog.records] == [logging.INFO]
    assert "scene_graph.zip: the server answers 500; attempt 2 in 0.0 s" in caplog.text
