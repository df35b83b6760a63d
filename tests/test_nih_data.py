"""NIH ChestX-ray14: tables with odd headers, both folder layouts, halves by patient, and damaged downloads."""

import logging
import re
import shutil
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from hypothesis import given
from hypothesis import strategies as st

from processing_chex.vocabulary import NIH8_CLASSES
from training.data.nih_cxr14 import NihCxr14, patient_halves
from training.data.raw import RejectedRecord

from .raw_trees.nih import BOX_HEADER, BOXES, ENTRIES, ENTRY_HEADER, write_lines, write_nih


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return write_nih(tmp_path_factory.mktemp("nih"))


@pytest.fixture(scope="module")
def built(root, tmp_path_factory) -> dict[str, dict]:
    """All records by id, with their split, from a build in two processes."""
    builder = NihCxr14(nih_dir=root, cache_dir=tmp_path_factory.mktemp("cache"))
    builder.download_and_prepare(num_proc=2)
    return {row["sample_id"]: row | {"split": name} for name, rows in builder.as_dataset().items() for row in rows}


def build(folder: Path, cache: Path, **kwargs) -> NihCxr14:
    return NihCxr14(nih_dir=folder, cache_dir=cache / "cache", **kwargs)


def all_items(builder: NihCxr14) -> dict[str, dict]:
    return {item["sample_id"]: item for items in builder.items().values() for item in items}


def boxes(row: dict) -> list[tuple]:
    return [(NIH8_CLASSES[item["category"]], item["bbox"], item["phrase"]) for item in row["objects"]]


def present(row: dict) -> set[str]:
    return {NIH8_CLASSES[index] for index, value in enumerate(row["class_labels"]) if value}


def test_records_are_those_with_boxes_and_hold_what_the_tables_say(built):
    assert set(built) == {line.split(".")[0] for line in BOXES}
    row = built["00099991_000"]
    assert (row["subject_id"], row["study_id"], row["image_id"]) == ("00099991", None, "00099991_000")
    assert (row["height"], row["width"], row["view"]) == (1024, 1024, 0)
    assert [row[name] for name in row if name.startswith("anatomy") or name == "sentences"] == [None] * 5
    assert boxes(row) == [("Infiltration", [210.25, 500.5, 300.5, 580.625], "")]
    assert present(row) == {"Infiltration"} and len(row["class_labels"]) == 8

    row = built["00099992_003"]
    assert row["view"] == 1
    assert boxes(row) == [("Mass", [100, 200, 150, 260], ""), ("Nodule", [10, 20, 40, 60], "")]
    assert present(row) == {"Mass", "Nodule"}


def test_images_with_alpha_channel_become_grey(root, built, tmp_path):
    assert built["00099991_000"]["image"].mode == "RGBA"
    image = build(root, tmp_path).load_image(root / "images_001/images/00099991_000.png")
    assert image.shape == (1024, 1024) and image.dtype == np.uint8
    assert (image == 40).all()


def test_patients_are_in_one_split_and_each_has_half_of_the_boxes(built):
    splits = {}
    for name, row in built.items():
        splits.setdefault(row["subject_id"], set()).add(row["split"])
        assert row["split"] in ("validation", "test"), name
    assert all(len(names) == 1 for names in splits.values())
    # random.Random(0).shuffle of the four sorted patients begins with 99993, 99991: one and two boxes, half of six.
    assert splits == {
        "00099993": {"validation"},
        "00099991": {"validation"},
        "00099992": {"test"},
        "00099994": {"test"},
    }


def test_split_does_not_depend_on_the_order_of_the_file(tmp_path):
    first = build(write_nih(tmp_path / "a", images=False), tmp_path).items()
    second = build(write_nih(tmp_path / "b", BOXES[::-1], images=False), tmp_path).items()
    for name in ("validation", "test"):
        assert {item["sample_id"] for item in first[name]} == {item["sample_id"] for item in second[name]}


@given(st.dictionaries(st.tuples(st.integers(1, 30), st.integers(0, 3)), st.integers(1, 3), min_size=2, max_size=40))
def test_halves_hold_each_image_once_and_no_patient_twice(counts):
    images = {f"{patient:08d}_{number:03d}.png": count for (patient, number), count in counts.items()}
    validation, test = patient_halves(images)
    assert sorted(validation + test) == sorted(images)
    assert not {name[:8] for name in validation} & {name[:8] for name in test}
    in_validation = sum(images[name] for name in validation)
    largest = max(sum(count for name, count in images.items() if name[:8] == patient[:8]) for patient in images)
    assert sum(images.values()) / 2 <= in_validation < sum(images.values()) / 2 + largest


@pytest.mark.parametrize("folder", ["images", "images_002/images", "images/images_002"])
def test_all_layouts_give_the_paths_of_the_files(tmp_path, folder):
    root = write_nih(tmp_path / "nih", flat=folder == "images")
    if folder == "images/images_002":  # archives that were unpacked where NIH's download page has them
        (root / "images").mkdir()
        for part in root.glob("images_*"):
            (part / "images").rename(root / "images" / part.name)
            part.rmdir()
    items = all_items(build(root, tmp_path))
    assert items["00099992_003"]["image_path"] == str(tmp_path / "nih" / folder / "00099992_003.png")
    assert all(Path(item["image_path"]).is_file() for item in items.values())


@pytest.mark.parametrize(
    ("header", "end"),
    [
        (ENTRY_HEADER, "\n"),
        (ENTRY_HEADER, "\r\n"),
        (f"{ENTRY_HEADER},", ",\n"),  # Data_Entry_2017.csv has an empty column at the end
        (f"{ENTRY_HEADER},", "\n"),
        (ENTRY_HEADER.replace("Gender", "Sex"), "\n"),
    ],
)
def test_variants_of_the_table_of_labels_are_read(tmp_path, header, end):
    root = write_nih(tmp_path / "nih", entries=None, images=False)
    path = write_lines(root / "Data_Entry_2017.csv", [header], "\n")
    with open(path, "a", encoding="utf-8", newline="") as file:
        file.write("".join(line + end for line in ENTRIES))
    items = all_items(build(root, tmp_path))
    assert items["00099992_003"]["labels"] == [0, 0, 0, 0, 1, 1, 0, 0]
    assert items["00099991_002"]["view"] == 1


def test_of_two_tables_of_labels_the_later_release_is_read(tmp_path):
    root = write_nih(tmp_path / "nih", images=False)
    write_nih(
        root, entries=[line.replace("Pneumonia", "Hernia") for line in ENTRIES], entry_name="Data_Entry_2017.csv"
    )
    assert all_items(build(root, tmp_path))["00099994_000"]["labels"] == [0, 0, 0, 0, 0, 0, 1, 0]


@pytest.mark.parametrize(
    "header",
    [
        BOX_HEADER,
        BOX_HEADER.rstrip(","),
        f"\ufeff{BOX_HEADER}",
        'Image Index,Finding Label,"Bbox [x,y,w,h]",,,',
        '"Image Index","Finding Label","Bbox [x,y,w,h]"',
        "Image Index,Finding Label,Bbox [x,y,w,h],Unnamed: 6,Unnamed: 7,Unnamed: 8",
    ],
)
def test_variants_of_the_header_of_boxes_are_read(tmp_path, header):
    root = write_nih(tmp_path / "nih", images=False)
    rows = [f"{row},,," for row in BOXES] if "Unnamed" in header else BOXES
    write_lines(root / "BBox_List_2017.csv", [header, *rows])
    assert all_items(build(root, tmp_path))["00099993_001"]["boxes"] == [(2, [5, 6, 12, 14])]


def test_names_in_quotes_in_the_header_of_labels(tmp_path):
    root = write_nih(tmp_path / "nih", images=False)
    header = ",".join(f'"{name}"' for name in re.split(r",(?![^\[]*\])", ENTRY_HEADER))
    write_lines(root / "Data_Entry_2017_v2020.csv", [header, *ENTRIES])
    assert header.count('"') == 18 and len(all_items(build(root, tmp_path))) == 5


def test_endings_of_image_files_in_capitals(root, tmp_path):
    copy = Path(shutil.copytree(root, tmp_path / "copy"))
    path = copy / "images_001/images/00099991_000.png"
    path.rename(path.with_suffix(".PNG"))
    item = all_items(build(copy, tmp_path))["00099991_000"]
    assert item["image_path"] == str(path.with_suffix(".PNG"))


def test_list_of_training_images_with_byte_order_mark_and_windows_line_ends(root, tmp_path):
    copy = Path(shutil.copytree(root, tmp_path / "copy"))
    path = copy / "train_val_list.txt"
    path.write_bytes(b"\xef\xbb\xbf00099995_000.png\r\n00099996_000.png")
    items = build(copy, tmp_path, boxes_only=False).items()["train"]
    assert [item["sample_id"] for item in items] == ["00099995_000", "00099996_000"]


def test_without_the_table_of_labels_boxes_remain(tmp_path):
    items = all_items(build(write_nih(tmp_path / "nih", entries=None, images=False), tmp_path))
    assert len(items) == 5
    assert {item["labels"] for item in items.values()} == {None} and {item["view"] for item in items.values()} == {-1}


def test_training_split_has_labels_of_patients_without_boxes(root, tmp_path):
    builder = build(root, tmp_path, boxes_only=False)
    builder.download_and_prepare()
    rows = builder.as_dataset()
    assert {name: len(split) for name, split in rows.items()} == {"train": 1, "validation": 3, "test": 2}
    assert rows["train"][0]["sample_id"] == "00099995_000"
    assert rows["train"][0]["objects"] is None
    assert present(rows["train"][0]) == {"Atelectasis"}
    assert builder.funnel().splitlines()[0] == "train: 4 of train_val_list.txt -> 1 of patients without boxes"
    assert builder.cache_dir != build(root, tmp_path).cache_dir


def test_training_split_needs_its_list_and_the_labels(tmp_path):
    root = write_nih(tmp_path / "nih", entries=None, images=False)
    with pytest.raises(ValueError, match=r"has no Data_Entry_2017.csv.*boxes_only=True"):
        build(root, tmp_path, boxes_only=False).items()
    (root / "train_val_list.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"train_val_list.txt is missing"):
        build(root, tmp_path, boxes_only=False).items()


def test_boxes_are_clipped_and_unusable_ones_left_out(tmp_path, caplog):
    lines = (
        "00099991_000.png,Mass,-5.0,1000.0,20.0,60.0",
        "00099991_000.png,Nodule,1024.0,10.0,20.0,20.0",
        "00099991_000.png,Effusion,10.0,10.0,0.0,20.0",
        "00099991_000.png,Effusion,10.0,10.0,20.0,-20.0",
        "00099991_000.png,Pneumonia,,,,",
        "00099991_000.png,Infiltrate,1.0,2.0,3.0,4.0",
    )
    builder = build(write_nih(tmp_path / "nih", lines), tmp_path)
    with caplog.at_level(logging.WARNING):
        row = builder.record(all_items(builder)["00099991_000"])
    assert boxes(row) == [("Mass", [0, 1000, 15, 1024], ""), ("Infiltration", [1, 2, 4, 6], "")]
    assert "3 boxes of BBox_List_2017.csv have no coordinates or are empty" in caplog.text
    assert builder.notes == {"boxes without area in their image": 1}


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("00099991_000.png,Hernia,1,2,3,4", "line 8: there are no boxes of 'Hernia'. Known: Atelectasis,"),
        ("99991_000.png,Mass,1,2,3,4", "line 8: '99991_000.png' is not the name of an image"),
        ("00099991_000.png,Mass,1,2,3,four", "line 8: .*'four'"),
        ("00099991_000.png,Mass,1,2", "line 8: 4 fields where the header has 6"),
        (BOXES[0], "1 rows more than once, such as 00099991_000.png,Infiltrate"),
    ],
)
def test_wrong_rows_of_boxes_are_named(tmp_path, line, problem):
    root = write_nih(tmp_path / "nih", [*BOXES, line], images=False)
    with pytest.raises(ValueError, match=rf"BBox_List_2017.csv.* {problem}"):
        build(root, tmp_path).items()


def test_missing_columns_of_boxes_are_named(tmp_path):
    root = write_nih(tmp_path / "nih", images=False)
    write_lines(root / "BBox_List_2017.csv", ["Image Index,Finding Label,x,y,w,h", *BOXES])
    with pytest.raises(ValueError, match=r"lacks the columns Bbox \[x, h\]; found: .*The header of the original file"):
        build(root, tmp_path).items()


def test_wrong_rows_of_labels_are_named(tmp_path):
    root = write_nih(tmp_path / "nih", entries=[*ENTRIES, "00099997_000.png,Flu,0,99997,1,F,PA,1,1,1,1"], images=False)
    with pytest.raises(ValueError, match=r"v2020.csv, line 10: there is no finding 'Flu'. Known: .*No Finding"):
        build(root, tmp_path).items()
    write_nih(root, entries=[*ENTRIES, ENTRIES[1]], images=False)
    with pytest.raises(ValueError, match=r"1 images more than once, such as 00099991_001.png"):
        build(root, tmp_path).items()
    write_nih(root, entries=ENTRIES[1:], images=False)
    with pytest.raises(ValueError, match=r"1 images are not in .*v2020.csv, such as 00099991_000.png"):
        build(root, tmp_path).items()


def test_images_of_another_size_are_refused_because_boxes_would_be_wrong(root, tmp_path):
    copy = Path(shutil.copytree(root, tmp_path / "copy"))
    path = copy / "images_001/images/00099991_000.png"
    PIL.Image.new("L", (224, 224)).save(path)
    builder = build(copy, tmp_path)
    with pytest.raises(RejectedRecord, match="224 x 224 pixels, the boxes are for 1024 x 1024"):
        builder.record(all_items(builder)["00099991_000"])
    with pytest.raises(ValueError, match=r"00099991_000 cannot be used: .*224 x 224"):
        list(builder._generate_examples(builder.items()["validation"]))


@pytest.mark.parametrize("content", [b"", b"<html>", b"\x89PNG\r\n\x1a\n\0\0"])
def test_damaged_images_are_refused(root, tmp_path, content):
    copy = Path(shutil.copytree(root, tmp_path / "copy"))
    path = copy / "images_001/images/00099991_000.png"
    path.write_bytes(content)
    builder = build(copy, tmp_path, missing="skip")
    names = [key for key, _ in builder._generate_examples(builder.items()["validation"])]
    assert names == ["00099991_002", "00099993_001"]
    with pytest.raises(RejectedRecord, match="cannot be decoded"):
        builder.load_image(path)


def test_images_of_16_bits_are_refused(root, tmp_path):
    path = tmp_path / "deep.png"
    PIL.Image.fromarray(np.full((1024, 1024), 30_000, dtype=np.uint16)).save(path)
    with pytest.raises(RejectedRecord, match="more than 8 bits .*use the original file"):
        build(root, tmp_path).load_image(path)


def test_missing_images_are_an_error_with_their_number_or_left_out(root, tmp_path):
    copy = Path(shutil.copytree(root, tmp_path / "copy"))
    (copy / "images_001/images/00099991_000.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 5 images are missing, such as .*00099991_000.png"):
        build(copy, tmp_path).download_and_prepare()
    builder = build(copy, tmp_path, missing="skip")
    builder.download_and_prepare()
    assert builder.as_dataset(split="validation")["sample_id"][:] == ["00099991_002", "00099993_001"]


def test_missing_folder_is_an_error_that_says_what_is_expected(tmp_path, monkeypatch):
    monkeypatch.delenv("CXR14_DIR", raising=False)
    with pytest.raises(FileNotFoundError, match=r"BBox_List_2017.csv.*CXR14_DIR"):
        build(tmp_path, tmp_path)


def test_changed_labels_are_a_new_build(tmp_path):
    root = write_nih(tmp_path / "nih", images=False)
    first = build(root, tmp_path).cache_dir
    write_nih(root, entries=ENTRIES[:-1], images=False)
    assert build(root, tmp_path).cache_dir != first
