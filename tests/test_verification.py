"""Verification of raw downloads: small invented trees in the exact formats, damaged in one way or several."""

import hashlib
import re
import shutil
import zipfile
from pathlib import Path

import pytest

from tests.download_server import running
from tests.raw_trees.mimic import sample_images, write_all
from tests.raw_trees.nih import write_nih
from tests.raw_trees.vindr import BOXED, NORMAL, write_vindr
from training.data.download import PASSWORD_VARIABLE, USERNAME_VARIABLE, download
from training.data.verification import PublishedCount, RawCheck, check_lines, check_raw


JPG, REPORTS, IMAGENOME = "mimic-cxr-jpg-2.0.0", "mimic-cxr-2.0.0", "chest-imagenome-dataset-1.0.0"
IMAGES = {image.letter: image for image in sample_images()}


@pytest.fixture
def mimic(tmp_path) -> Path:
    return write_all(tmp_path / "data")


def check(name: str, data_dir: Path, **options) -> RawCheck:
    return check_raw(name, data_dir=data_dir, progress=False, **options)


def errors(result: RawCheck) -> list[str]:
    return [problem.message for problem in result.problems if problem.severity == "error"]


def write_checksums(root: Path) -> None:
    files = [path for path in sorted(root.rglob("*")) if path.is_file()]
    lines = [
        f"{hashlib.sha256(path.read_bytes()).hexdigest()} {path.relative_to(root).as_posix()}\n" for path in files
    ]
    (root / "SHA256SUMS.txt").write_text("".join(lines), encoding="utf-8")


def test_a_complete_download_has_no_errors(mimic):
    result = check("mimic-cxr", mimic)
    assert result.ok, errors(result)
    assert result.sources == {"jpg": mimic / JPG, "report": mimic / REPORTS}
    # Of eight images one is lateral and one has no report; the report of another has no sections.
    assert (result.images, result.missing, result.decoded, result.left_out) == (6, 0, 5, 1)
    assert result.counts == [PublishedCount("images in the metadata", 8, 377_110)]
    assert {problem.severity for problem in result.problems} == {"info"}


def test_what_the_paper_leaves_out_is_no_error(mimic):
    result = check("chest_imagenome", mimic)
    assert result.ok, errors(result)
    # With report and scene graph: a, b (no sections), d (four boxes), e (a region twice), f.
    assert (result.images, result.decoded, result.left_out) == (5, 2, 3)
    assert result.counts == [PublishedCount("scene graphs", 6, 242_072)]


def test_counts_of_the_other_data_sets(mimic, tmp_path):
    # Images a, d and f are frontal: two phrases, two and two.
    assert check("ms-cxr", mimic).counts == [PublishedCount("pairs of image and phrase", 6, 1_162)]
    vindr = check("vindr-cxr", write_vindr(tmp_path / "vindr"))
    assert [count.found for count in vindr.counts] == [4, 6]
    assert vindr.ok, errors(vindr)
    nih = check("nih-cxr14", write_nih(tmp_path / "nih"))
    assert [(count.what, count.published) for count in nih.counts] == [("images with boxes", 880), ("boxes", 984)]
    assert nih.ok, errors(nih)
    assert nih.images == nih.counts[0].found


def test_sources_that_are_missing_are_all_listed(mimic):
    shutil.rmtree(mimic / REPORTS)
    shutil.rmtree(mimic / IMAGENOME)
    result = check("chest-imagenome", mimic)
    assert result.sources == {"jpg": mimic / JPG}
    first, second = errors(result)
    assert "needs the reports of MIMIC-CXR, which was not found" in first and "MIMIC_CXR_REPORT_DIR" in first
    assert "needs Chest ImaGenome, which was not found" in second and "CHEST_IMAGENOME_DIR" in second
    # Without reports they are not asked for.
    assert len(errors(check("chest-imagenome", mimic, reports=False))) == 1


def test_a_table_that_is_missing_does_not_hide_one_that_is_damaged(mimic):
    (mimic / JPG / "mimic-cxr-2.0.0-split.csv.gz").unlink()
    (mimic / JPG / "mimic-cxr-2.0.0-chexpert.csv.gz").write_bytes(b"")
    found = errors(check("mimic-cxr", mimic))
    assert any("has no mimic-cxr-2.*-split.csv.gz" in message for message in found)
    assert any("chexpert.csv.gz is empty: download it again" in message for message in found)


def test_several_damaged_files_are_all_named_once(mimic):
    (mimic / JPG / "mimic-cxr-2.0.0-metadata.csv.gz").write_bytes(b"<!DOCTYPE html><html>Log in</html>")
    archive = mimic / IMAGENOME / "silver_dataset" / "scene_graph.zip"
    archive.write_bytes(archive.read_bytes()[:-40])
    reports = mimic / REPORTS / "mimic-cxr-reports.zip"
    reports.write_bytes(b"<html>Log in</html>")
    found = errors(check("chest-imagenome", mimic))
    assert len(found) == 3
    assert re.search(r"metadata\.csv\.gz is a saved web page", found[0])
    assert re.search(r"reports\.zip is a saved web page", found[1])
    assert re.search(r"scene_graph\.zip is truncated or damaged", found[2])


def test_a_damaged_member_of_an_archive(mimic):
    archive = mimic / REPORTS / "mimic-cxr-reports.zip"
    with zipfile.ZipFile(archive) as opened:
        first = opened.infolist()[0]
        start = first.header_offset + 30 + len(first.filename) + 5
    data = bytearray(archive.read_bytes())
    data[start] ^= 255
    archive.write_bytes(data)
    assert any("reports.zip is truncated or damaged" in message for message in errors(check("mimic-cxr", mimic)))


def test_columns_that_are_missing(tmp_path):
    root = write_vindr(tmp_path / "vindr")
    table = root / "annotations/image_labels_test.csv"
    table.write_text(table.read_text(encoding="utf-8").replace("Edema", "Oedema"), encoding="utf-8")
    (message,) = errors(check("vindr-cxr", root))
    assert "image_labels_test.csv lacks the columns Edema" in message


def test_images_that_are_missing_are_counted_with_examples(tmp_path):
    root = write_vindr(tmp_path / "vindr")
    for image in (BOXED, NORMAL):
        (root / "train" / f"{image}.dicom").unlink()
    (root / "train" / f"{NORMAL}.dicom.partial").write_bytes(b"DICM")
    result = check("vindr-cxr", root)
    assert not result.ok
    assert (result.images, result.missing, result.decoded) == (8, 2, 6)
    (message,) = errors(result)
    assert f"2 of 3 images of the train split have no file, such as {BOXED}, {NORMAL}; the first should be" in message
    assert any("1 of the missing images are partly downloaded" in problem.message for problem in result.problems)
    # Who wants to leave them out gets a warning.
    result = check("vindr-cxr", root, missing="skip")
    assert result.ok and [problem.severity for problem in result.problems][0] == "warning"


def test_images_in_other_folders_than_in_the_release_are_found(mimic):
    (mimic / JPG / "files").rename(mimic / JPG / "download")
    (mimic / JPG / "files").mkdir()
    (mimic / JPG / "download").rename(mimic / JPG / "files" / "files")
    result = check("mimic-cxr", mimic)
    assert result.missing == 6
    a = IMAGES["a"].path
    assert any(f"{mimic / JPG / 'files' / a} was found instead of {mimic / JPG / a}" in m for m in errors(result))


def test_images_that_cannot_be_decoded_are_errors(mimic):
    picture = mimic / JPG / IMAGES["a"].path
    picture.write_bytes(picture.read_bytes()[:300])
    smaller = mimic / JPG / IMAGES["h"].path
    shutil.copy(mimic / JPG / IMAGES["f"].path, smaller)
    result = check("mimic-cxr", mimic)
    assert (result.decoded, result.left_out) == (3, 1)
    found = "\n".join(errors(result))
    assert f"{IMAGES['a'].sample_id} ({picture}) cannot be used" in found
    assert f"{IMAGES['h'].sample_id} ({smaller}) cannot be used: the image has 44 x 60 pixels" in found
    assert check("mimic-cxr", mimic, sample=0).ok


def test_checksums_of_tables_always_and_of_images_on_request(mimic):
    for folder in (JPG, REPORTS, IMAGENOME):
        write_checksums(mimic / folder)
    result = check("chest-imagenome", mimic)
    # Metadata, splits, reports and scene graphs, whose list is one level above them.
    assert result.ok and result.checksums == 4
    assert check("chest-imagenome", mimic, checksums=True).checksums == 4 + 5

    picture = mimic / JPG / IMAGES["f"].path
    data = bytearray(picture.read_bytes())
    data[-10] ^= 1
    picture.write_bytes(data)
    with zipfile.ZipFile(mimic / IMAGENOME / "silver_dataset" / "scene_graph.zip", "a") as archive:
        archive.writestr("scene_graph/another_SceneGraph.json", "{}")
    (message,) = errors(check("chest-imagenome", mimic))
    assert "scene_graph.zip does not match its checksum in SHA256SUMS.txt: delete it" in message
    found = errors(check("chest-imagenome", mimic, checksums=True, sample=0))
    assert len(found) == 2 and any(str(picture) in message for message in found)


def test_many_wrong_checksums_are_counted(mimic):
    write_checksums(mimic / JPG)
    sums = mimic / JPG / "SHA256SUMS.txt"
    lines = sums.read_text(encoding="utf-8").splitlines(keepends=True)
    sums.write_text("".join("0" * 64 + line[64:] for line in lines), encoding="utf-8")
    found = errors(check("mimic-cxr", mimic, checksums=True))
    assert len(found) == 6
    # Three tables and the six images; the reports have no list.
    assert "9 files in all do not match" in found[-1]


def test_unknown_options_and_data_sets_raise(tmp_path):
    with pytest.raises(ValueError, match="VinDr-CXR has no option reports. Known: missing, vindr_dir"):
        check("vindr-cxr", tmp_path, reports=False)
    with pytest.raises(ValueError, match="no data set 'padchest'"):
        check("padchest", tmp_path)


def test_nothing_is_written_to_the_data(mimic):
    before = {path: path.stat().st_mtime_ns for path in mimic.rglob("*")}
    check("chest-imagenome", mimic, checksums=True)
    assert {path: path.stat().st_mtime_ns for path in mimic.rglob("*")} == before


def test_lines_for_a_terminal(tmp_path):
    root = write_vindr(tmp_path / "vindr")
    (root / "train" / f"{BOXED}.dicom").unlink()
    result = check("vindr-cxr", tmp_path)
    lines = check_lines(result)
    assert str(result).splitlines() == lines
    assert lines[0] == "vindr-cxr: not usable as it is"
    assert f"  found vindr: {root}" in lines
    assert "  train: 4 images -> 3 with annotation rows" in lines
    assert "  4 images of the training split (published: 15,000)" in lines
    assert "  7 of 8 image files are there" in lines
    assert "  7 images of a sample decoded" in lines
    assert lines[-3].startswith("error: 1 of 3 images of the train split have no file")
    assert lines[-2] == f"info: VinDr-CXR 1.0.0 was found here, below {tmp_path}."
    assert lines[-1].startswith("info: There is no SHA256SUMS.txt")
    assert check_lines(RawCheck("own"))[0] == "own: no errors"


def test_what_was_downloaded_is_found_and_right(mimic, tmp_path, monkeypatch):
    """From a server with the layout of PhysioNet to the builders, nothing in between."""
    places = {
        JPG: "mimic-cxr-jpg/2.0.0",
        REPORTS: "mimic-cxr/2.0.0",
        IMAGENOME: "chest-imagenome/1.0.0",
        next(mimic.glob("ms-cxr*")).name: "ms-cxr/0.1",
    }
    splits = mimic / IMAGENOME / "silver_dataset" / "splits"
    splits.mkdir()
    for name in ("train", "valid", "test", "images_to_avoid"):
        (splits / f"{name}.csv").write_text("subject_id,study_id,dicom_id\n", encoding="utf-8")
    monkeypatch.setenv(USERNAME_VARIABLE, "reader")
    monkeypatch.setenv(PASSWORD_VARIABLE, "secret")
    out = tmp_path / "downloaded"
    with running("reader", "secret") as server:
        for folder, project in places.items():
            root = mimic / folder
            files = {path.relative_to(root).as_posix(): path for path in root.rglob("*") if path.is_file()}
            server.add(project, {name: path.read_bytes() for name, path in files.items()})
        for name in ("mimic-cxr", "chest-imagenome", "ms-cxr"):
            download(name, out, base_url=server.url(), progress=False)
    # The lateral image was not fetched; a frontal one without report was.
    assert not (out / "mimic-cxr-jpg/2.0.0" / IMAGES["c"].path).exists()
    assert (out / "mimic-cxr-jpg/2.0.0" / IMAGES["g"].path).exists()
    for name, checksums in (("mimic-cxr", 4 + 6), ("chest-imagenome", 4 + 5), ("ms-cxr", 3 + 3)):
        result = check(name, out, checksums=True)
        assert result.ok, errors(result)
        assert result.missing == 0 and result.checksums == checksums
