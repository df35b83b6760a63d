"""VinDr-CXR: readers fused, official halves, pixels as in the paper, and files that are not as they should be."""

import itertools
import logging
import re
import shutil
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import pydicom
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydicom.pixels import get_decoder
from pydicom.uid import JPEGLSLossless, RLELossless

from processing_chex.vocabulary import VINDR_CLASSES
from training.data.preparation import prepare
from training.data.raw import RejectedRecord
from training.data.vindr_cxr import VindrCxr, fuse_classes, fuse_readers, halves, load_equalized, majority

from .image_factory import gradient, save_dicom
from .raw_trees.vindr import (
    BOXED,
    NORMAL,
    TEST,
    TRAIN_BOXES,
    TRAIN_LABELS,
    TRAPS,
    UNLISTED,
    write_csv,
    write_vindr,
)


CLASS = {name: index for index, name in enumerate(VINDR_CLASSES)}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return write_vindr(tmp_path_factory.mktemp("vindr") / "physionet.org/files/vindr-cxr/1.0.0")


@pytest.fixture(scope="module")
def built(root, tmp_path_factory) -> dict[str, dict]:
    """All records by id, with their split, from a build in two processes."""
    builder = VindrCxr(vindr_dir=root.parents[1], cache_dir=tmp_path_factory.mktemp("cache"))
    builder.download_and_prepare(num_proc=2)
    return {row["sample_id"]: row | {"split": name} for name, rows in builder.as_dataset().items() for row in rows}


@pytest.fixture
def tree(root, tmp_path) -> Path:
    """A copy of the tree that a test may damage."""
    return Path(shutil.copytree(root, tmp_path / "copy"))


def build(folder: Path, cache: Path, **kwargs) -> VindrCxr:
    return VindrCxr(vindr_dir=folder, cache_dir=cache / "cache", **kwargs)


def present(row: dict) -> set[str]:
    return {VINDR_CLASSES[index] for index, value in enumerate(row["class_labels"]) if value}


def boxes(row: dict) -> list[tuple]:
    return [(VINDR_CLASSES[item["category"]], item["bbox"]) for item in row["objects"]]


def test_training_record_has_fused_boxes_then_single_ones_and_the_labels_of_most_readers(built):
    row = built[BOXED]
    assert row["split"] == "train"
    assert (row["image_id"], row["subject_id"], row["study_id"], row["view"]) == (BOXED, None, None, -1)
    assert (row["height"], row["width"]) == (40, 60)
    assert [row[name] for name in row if name.startswith("anatomy") or name == "sentences"] == [None] * 5
    assert boxes(row) == [
        ("Cardiomegaly", pytest.approx([12, 11, 32, 31])),
        ("Nodule/Mass", [50.5, 5, 56, 9]),
    ]
    assert [item["phrase"] for item in row["objects"]] == ["", ""]
    assert len(row["class_labels"]) == 22
    assert present(row) == {"Cardiomegaly", "ILD"}


def test_image_without_findings_has_empty_objects_and_zero_labels(built):
    assert built[NORMAL]["objects"] == []
    assert built[NORMAL]["class_labels"] == [0] * 22


def test_unusable_boxes_are_left_out_and_those_that_stick_out_are_clipped(built):
    row = built[TRAPS]
    assert boxes(row) == [("Lung cyst", [50, 30, 60, 40]), ("Other lesion", [1.25, 2.5, 3.75, 5])]
    assert len(row["objects"]) == 2 and all(item["phrase"] == "" for item in row["objects"])
    assert present(row) == set()  # no two of three readers agree


def test_unusable_boxes_are_counted_in_warnings(root, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        builder = build(root, tmp_path)
        traps = next(item for item in builder.items()["train"] if item["sample_id"] == TRAPS)
        builder.record(traps)
    assert "2 empty or inverted" in caplog.text and "1 without coordinates" in caplog.text
    assert builder.notes == {"boxes without area in their image": 1}


def test_images_without_annotation_rows_are_left_out_and_counted(root, built, tmp_path):
    assert UNLISTED not in built and TEST[5] not in built
    builder = build(root, tmp_path)
    builder.items()
    assert builder.funnel().splitlines()[0] == "train: 4 images -> 3 with annotation rows"
    assert sum(builder.counts[name]["images"] for name in ("validation", "test")) == 6
    assert sum(builder.counts[name]["with annotation rows"] for name in ("validation", "test")) == 5


def test_test_boxes_are_taken_as_they_are(built):
    row = built[TEST[0]]
    assert boxes(row) == [
        ("Lung Opacity", [3, 4, 23, 24]),
        ("Lung Opacity", [4, 4, 24, 24]),
        ("Aortic enlargement", [8, 2, 16, 10]),
    ]
    assert present(row) == {"Lung Opacity", "Aortic enlargement"}


def test_halves_are_those_of_pandas_with_the_papers_seed(built):
    # What numpy's RandomState(12345).permutation gives, which pandas uses.
    order = np.random.RandomState(12345).permutation(6)
    assert halves([str(index) for index in range(6)]) == (
        [str(index) for index in order[:3]],
        [str(index) for index in order[3:]],
    )
    # As drawn by pandas 3.1; the first int(0.5 * 7) are for validation.
    assert halves(list("abcdefg")) == (list("gde"), list("abfc"))
    expected = {TEST[index]: "validation" if place < 3 else "test" for place, index in enumerate(order)}
    assert {image: built[image]["split"] for image in TEST[:5]} == {image: expected[image] for image in TEST[:5]}


def test_images_are_png_files_below_the_cache_and_the_raw_folder_stays_as_it_was(root, tmp_path):
    before = sorted(root.rglob("*"))
    builder = build(root, tmp_path)
    builder.download_and_prepare()
    rows = builder.as_dataset(split="train").cast_column("image", datasets.Image(decode=False))
    path = Path(rows[0]["image"]["path"])
    assert path.is_relative_to(tmp_path / "cache") and path.parent.name == "png"
    assert {file.suffix for file in path.parent.iterdir()} == {".png"}
    written = path.stat().st_mtime_ns
    assert build(root, tmp_path).image_file(root / "train" / f"{BOXED}.dicom") == str(path)
    assert path.stat().st_mtime_ns == written
    assert sorted(root.rglob("*")) == before
    with PIL.Image.open(path) as image:
        assert (image.format, image.mode, image.size) == ("PNG", "L", (60, 40))
        assert np.array_equal(np.asarray(image), load_equalized(root / "train" / f"{BOXED}.dicom"))


def test_pixels_are_spread_and_equalised_without_rescaling_or_window(tmp_path):
    # Stored 0, 1000, 2000, 4000 -> 0, 63.75, 127.5, 255; half, 3/4, 7/8 and all of the pixels are up to these.
    pixels = np.array([[0, 0, 0, 0], [1000, 1000, 2000, 4000]], dtype=np.uint16)
    path = save_dicom(tmp_path / "a.dicom", pixels, RescaleSlope=-1, WindowCenter=5, WindowWidth=2)
    assert load_equalized(path).tolist() == [[127, 127, 127, 127], [191, 191, 223, 255]]
    assert load_equalized(path).dtype == np.uint8


def test_values_are_truncated_to_256_levels_before_equalisation(tmp_path):
    # 1 and 2 of 1000 both become level 0, 4 becomes level 1.
    path = save_dicom(tmp_path / "a.dicom", np.array([[0, 1, 2, 4, 1000]], dtype=np.uint16))
    assert load_equalized(path).tolist() == [[153, 153, 153, 204, 255]]


@pytest.mark.parametrize(("dtype", "scale"), [(np.uint8, 1), (np.uint16, 600), (np.int16, 300), (np.int16, -300)])
def test_monochrome1_is_inverted(tmp_path, dtype, scale):
    pixels = np.array([[5, 5, 5, 60], [5, 90, 100, 5]]) * abs(scale) - (32768 if scale < 0 else 0)
    pixels = pixels.astype(dtype)
    path = save_dicom(tmp_path / "a.dicom", pixels, PhotometricInterpretation="MONOCHROME1")
    # The darkest becomes the brightest: shares of pixels up to 100, 90, 60 and 5 are 1/8, 2/8, 3/8 and 1.
    assert load_equalized(path).tolist() == [[255, 255, 255, 95], [255, 63, 31, 255]]


def test_negative_pixels_keep_their_order(tmp_path):
    path = save_dicom(tmp_path / "a.dicom", np.array([[-32768, 0, 32767, 32767]], dtype=np.int16))
    assert load_equalized(path).tolist() == [[63, 127, 255, 255]]


@pytest.mark.parametrize("kind", ["MONOCHROME1", "MONOCHROME2"])
def test_constant_image_is_black_with_a_warning(tmp_path, caplog, kind):
    pixels = np.full((3, 5), 700, dtype=np.uint16)
    path = save_dicom(tmp_path / "flat.dicom", pixels, PhotometricInterpretation=kind)
    assert load_equalized(path).tolist() == [[0] * 5] * 3
    assert "flat.dicom has pixels of one value" in caplog.text


def test_compressed_pixels_are_decoded(tmp_path):
    plain = save_dicom(tmp_path / "plain.dicom", gradient(20, 30, 4095, np.uint16), bits_stored=12)
    dataset = pydicom.dcmread(plain)
    dataset.compress(RLELossless)
    dataset.save_as(tmp_path / "packed.dicom")
    assert np.array_equal(load_equalized(tmp_path / "packed.dicom"), load_equalized(plain))


def test_undecodable_pixels_name_transfer_syntax_and_plugins(tree, tmp_path):
    path = tree / "train" / f"{BOXED}.dicom"
    dataset = pydicom.dcmread(path)
    dataset.PixelData = pydicom.encaps.encapsulate([b"\xff\xd8\xff\xd9"])
    dataset.file_meta.TransferSyntaxUID = JPEGLSLossless
    dataset.save_as(path)
    with pytest.raises(RejectedRecord) as error:
        load_equalized(path)
    assert "JPEG-LS Lossless" in str(error.value)
    if not get_decoder(JPEGLSLossless).is_available:
        assert re.search("needs one of these plug-ins of pydicom: .*pylibjpeg-libjpeg", str(error.value))
    with pytest.raises(ValueError, match=f"{BOXED} cannot be used: pixels stored as JPEG-LS"):
        _generate(build(tree, tmp_path), "train")
    assert BOXED not in _generate(build(tree, tmp_path, missing="skip"), "train")


@pytest.mark.parametrize("content", [b"", b"no dicom", b"\0" * 128 + b"DICM" + b"\x02\0\0\0UL\x04\0"])
def test_damaged_dicom_file_is_an_error_or_left_out(tree, tmp_path, content):
    (tree / "train" / f"{NORMAL}.dicom").write_bytes(content)
    with pytest.raises(RejectedRecord):
        load_equalized(tree / "train" / f"{NORMAL}.dicom")
    with pytest.raises(ValueError, match=f"{NORMAL} cannot be used"):
        _generate(build(tree, tmp_path), "train")
    assert set(_generate(build(tree, tmp_path, missing="skip"), "train")) == {BOXED, TRAPS}


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"UI\x14\x001.2.840.10008.1.2.1\0", b"LO\x14\0" + b" " * 20),  # a transfer syntax that is plain text
        (b"1.2.840.10008.1.2.1\0", b"1.2.840\\10008.1.2.1\0"),  # two of them
        (b"\x28\0\x04\0CS", b"\x28\0\x04\0\xff\xff"),  # photometric interpretation of an unknown type
    ],
)
def test_damaged_dicom_header_is_an_error_or_left_out(tree, tmp_path, old, new):
    path = tree / "train" / f"{BOXED}.dicom"
    content = path.read_bytes()
    assert content.count(old) == 1
    path.write_bytes(content.replace(old, new))
    with pytest.raises(RejectedRecord, match="damaged|cannot be decoded"):
        load_equalized(path)
    info = prepare("vindr-cxr", tmp_path / "out", data_dir=tree, num_proc=1, max_rejected=50)
    assert info.splits["train"].rejected == 1


def test_truncated_pixels_are_an_error(tree, tmp_path):
    path = tree / "train" / f"{BOXED}.dicom"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(RejectedRecord, match="Little Endian .* cannot be decoded"):
        load_equalized(path)


def _generate(builder: VindrCxr, split: str) -> dict[str, dict]:
    return dict(builder._generate_examples(builder.items()[split]))


def test_missing_images_are_an_error_with_their_number_or_left_out(tree, tmp_path):
    for image in (BOXED, NORMAL):
        (tree / "train" / f"{image}.dicom").unlink()
    with pytest.raises(FileNotFoundError, match=r"2 of 8 images are missing.*missing='skip'"):
        build(tree, tmp_path).download_and_prepare()
    builder = build(tree, tmp_path, missing="skip")
    builder.download_and_prepare()
    assert builder.as_dataset(split="train")["sample_id"][:] == [TRAPS]


def test_other_numbers_of_label_rows_warn_and_a_tie_is_absent(tmp_path, caplog):
    labels = {BOXED: [("Cardiomegaly", "ILD"), ("Cardiomegaly",)], NORMAL: TRAIN_LABELS[NORMAL] * 2}
    root = write_vindr(tmp_path / "vindr", {key: TRAIN_BOXES[key] for key in labels}, labels, images=False)
    item = build(root, tmp_path).items()["train"][0]
    assert [name for name, value in zip(VINDR_CLASSES, item["labels"], strict=True) if value] == ["Cardiomegaly"]
    assert "has not 3 rows, one for each reader, for 2 images" in caplog.text


def test_three_label_rows_for_each_image_do_not_warn(root, tmp_path, caplog):
    build(root, tmp_path).items()
    assert "one for each reader" not in caplog.text


def test_boxes_of_images_without_labels_are_counted(tmp_path, caplog):
    root = write_vindr(tmp_path / "vindr", train_labels={NORMAL: TRAIN_LABELS[NORMAL]}, images=False)
    assert [item["sample_id"] for item in build(root, tmp_path).items()["train"]] == [NORMAL]
    assert "10 of images without labels" in caplog.text


@pytest.mark.parametrize("name", ["Cardiomegali", "cardiomegaly", ""])
def test_unknown_class_is_an_error_with_the_vocabulary(tmp_path, name):
    root = write_vindr(tmp_path / "vindr", {BOXED: [("R1", name, "1", "2", "3", "4")]}, images=False)
    with pytest.raises(ValueError, match=f"annotations_train.csv, line 2: there is no class '{name}'.*Lung Opacity"):
        build(root, tmp_path).items()


def test_coordinates_that_are_no_numbers_are_an_error(tmp_path):
    root = write_vindr(tmp_path / "vindr", {BOXED: [("R1", "ILD", "1", "two", "3", "4")]}, images=False)
    with pytest.raises(ValueError, match=r"annotations_train.csv, line 2: .*'two'"):
        build(root, tmp_path).items()


def test_boxes_of_image_level_classes_are_left_out(tmp_path, caplog):
    rows = [("R1", "Other diseases", "1", "2", "3", "4"), ("R2", "COPD", "", "", "", "")]
    root = write_vindr(tmp_path / "vindr", {BOXED: rows}, images=False)
    assert build(root, tmp_path).items()["train"][0]["boxes"] == []
    assert "1 of classes that have no boxes" in caplog.text


def test_kaggle_release_is_refused(tmp_path, monkeypatch):
    header = ["image_id", "class_name", "class_id", "rad_id", "x_min", "y_min", "x_max", "y_max"]
    row = (BOXED, "No finding", "14", "R11", "", "", "", "")
    write_csv(tmp_path / "kaggle/train.csv", header, [row])
    folders = ({"vindr_dir": tmp_path / "kaggle"}, {"data_dir": str(tmp_path / "kaggle")}, {"data_dir": tmp_path})
    for kwargs in folders:
        with pytest.raises(ValueError, match=r"Kaggle.*physionet.org/content/vindr-cxr/1.0.0"):
            VindrCxr(cache_dir=tmp_path / "cache", **kwargs)
    # Its table under the name of ours.
    root = write_vindr(tmp_path / "vindr", images=False)
    write_csv(root / "annotations/annotations_train.csv", header, [row])
    with pytest.raises(ValueError, match=r"annotations_train.csv is of no use.*Kaggle"):
        build(root, tmp_path).items()


def test_missing_columns_are_named(tmp_path):
    root = write_vindr(tmp_path / "vindr", images=False)
    write_csv(root / "annotations/annotations_test.csv", ["image_id", "class_name", "x_min"], [])
    with pytest.raises(ValueError, match="lacks the columns y_min, x_max, y_max; found: image_id, class_name, x_min"):
        build(root, tmp_path).items()


def test_label_that_is_no_label_is_an_error(tmp_path):
    root = write_vindr(tmp_path / "vindr", images=False)
    path = root / "annotations/image_labels_test.csv"
    path.write_text(path.read_text(encoding="utf-8").replace(f"{TEST[1]},0", f"{TEST[1]},-1"), encoding="utf-8")
    with pytest.raises(ValueError, match="image_labels_test.csv, line 3: Aortic enlargement is '-1'"):
        build(root, tmp_path).items()


def test_repeated_test_images_are_an_error(tmp_path):
    root = write_vindr(tmp_path / "vindr", images=False)
    path = root / "annotations/image_labels_test.csv"
    rows = path.read_text(encoding="utf-8")
    path.write_text(rows + rows.splitlines()[-1] + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=f"more than one row for 1 images, such as {TEST[5]}"):
        build(root, tmp_path).items()


def test_saved_login_page_is_recognised(tmp_path):
    root = write_vindr(tmp_path / "vindr", images=False)
    (root / "annotations/image_labels_train.csv").write_text("<!DOCTYPE html><html>Log in</html>", encoding="utf-8")
    with pytest.raises(ValueError, match="saved web page"):
        build(root, tmp_path).items()


def test_missing_tables_are_named_at_construction(tmp_path, monkeypatch):
    monkeypatch.delenv("VINDR_CXR_DIR", raising=False)
    with pytest.raises(FileNotFoundError, match=r"VinDr-CXR 1.0.0.*annotations/.*VINDR_CXR_DIR"):
        build(tmp_path, tmp_path)


def test_one_missing_table_is_named(tmp_path):
    root = write_vindr(tmp_path / "vindr", images=False)
    (root / "annotations/annotations_test.csv").unlink()
    with pytest.raises(FileNotFoundError, match=r"annotations/annotations_test.csv is missing: complete the download"):
        build(root, tmp_path).items()


def test_folder_is_found_by_the_environment_variable(root, tmp_path, monkeypatch):
    monkeypatch.setenv("VINDR_CXR_DIR", str(root.parents[1]))
    assert VindrCxr(cache_dir=tmp_path).folders == {"vindr": root}


def test_changed_tables_are_a_new_build(tree, tmp_path):
    first = build(tree, tmp_path)
    write_vindr(tree, {BOXED: TRAIN_BOXES[BOXED]}, images=False)
    assert build(tree, tmp_path).cache_dir != first.cache_dir


def test_majority_is_the_mode():
    assert majority([[1, 0, 1, 0], [1, 0, 0, 0], [1, 1, 1, 0]]) == [1, 0, 1, 0]
    assert majority([[1, 0]]) == [1, 0]
    assert majority([[1, 1], [0, 1]]) == [0, 1]


# Fusion


def test_boxes_join_the_cluster_with_the_best_overlap():
    apart, near = [0, 0, 10, 10], [100, 100, 120, 120]
    # From the last: [100...] opens a cluster, [104...] joins it, [0...] opens another.
    fused = fuse_readers([apart, [104, 100, 124, 120], near])
    assert fused == [[0, 0, 10, 10], [102, 100, 122, 120]]


def test_overlap_of_exactly_the_threshold_does_not_join():
    # Two boxes of area 11 that share 2 of the 20 they cover.
    pair = [[0, 0, 11, 1], [9, 0, 20, 1]]
    assert len(fuse_readers(pair, threshold=0.1)) == 2
    assert fuse_readers(pair, threshold=0.0999) == [[4.5, 0, 15.5, 1]]


def test_members_are_compared_with_the_mean_of_their_cluster():
    # The first overlaps the last by 1/3 alone, but their mean less and less with each box between.
    chain = [[24, 0, 34, 1], [8, 0, 18, 1], [4, 0, 14, 1], [0, 0, 10, 1]]
    assert fuse_readers(chain) == [[24, 0, 34, 1], [4, 0, 14, 1]]


def test_empty_boxes_take_no_part():
    assert fuse_readers([[5, 5, 5, 9], [1, 1, 3, 3], [2, 2, 1, 9]]) == [[1, 1, 3, 3]]
    assert fuse_readers([]) == []


BOX = st.tuples(*[st.integers(0, 60)] * 2, *[st.integers(1, 40)] * 2).map(
    lambda box: [box[0], box[1], box[0] + box[2], box[1] + box[3]]
)


@given(st.lists(BOX, max_size=9), st.sampled_from([0.25, 0.5, 4, 1024]))
def test_fusion_does_not_depend_on_scale(found, scale):
    # Powers of two, so that rounding decides nothing.
    scaled = fuse_readers([[scale * value for value in box] for box in found])
    assert scaled == [[scale * value for value in box] for box in fuse_readers(found)]


def _overlap(a: list[float], b: list[float]) -> float:
    shared = max(min(a[2], b[2]) - max(a[0], b[0]), 0) * max(min(a[3], b[3]) - max(a[1], b[1]), 0)
    return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)


@given(st.lists(BOX, min_size=1, max_size=9))
def test_fusion_keeps_every_box_in_one_cluster(found):
    fused = fuse_readers(found)
    assert 1 <= len(fused) <= len(found)
    hull = [*np.min(found, axis=0)[:2], *np.max(found, axis=0)[2:]]
    for box in fused:
        assert hull[0] <= box[0] < box[2] <= hull[2] and hull[1] <= box[1] < box[3] <= hull[3]
    # The same box by all readers is that box.
    assert fuse_readers([found[0]] * 3) == [found[0]]
    # Boxes that are clear of each other stay as they are.
    if all(_overlap(a, b) == 0 for a, b in itertools.combinations(found, 2)):
        assert sorted(fused) == sorted(found)


def test_classes_are_fused_by_themselves():
    found = fuse_classes(
        [(3, [0, 0, 4, 4]), (1, [0, 0, 4, 4]), (3, [0, 0, 4, 4]), (2, [9, 9, 12, 12]), (2, [0, 0, 4, 4])]
    )
    assert found == [(2, [9, 9, 12, 12]), (2, [0, 0, 4, 4]), (3, [0, 0, 4, 4]), (1, [0, 0, 4, 4])]
    assert Counter(category for category, _ in found) == {1: 1, 2: 2, 3: 1}
