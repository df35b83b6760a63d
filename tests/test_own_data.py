"""Own data: JSON lines in the common record, any part of it, and mistakes named with file and line."""

import csv
import json
import logging
import re
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from processing_chex.vocabulary import ANATOMY_NAMES
from training.data.own_data import KEYS, OwnData
from training.data.preparation import prepare
from training.data.raw import RejectedRecord
from training.data.record import record_classes

from .image_factory import gradient, save_dicom, save_image


DOC = Path(__file__).parents[1] / "docs/own-data.md"
REGION = {name: index for index, name in enumerate(ANATOMY_NAMES)}
# Rows x columns of all images.
HEIGHT, WIDTH = 40, 60


@pytest.fixture
def folder(tmp_path) -> Path:
    root = tmp_path / "mydata"
    (root / "scans").mkdir(parents=True)
    for name in "abc":
        save_image(root / f"scans/{name}.png", gradient(HEIGHT, WIDTH))
    return root


def write(folder: Path, lines: list, name: str = "train.jsonl") -> Path:
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    (folder / name).write_text(text, encoding="utf-8")
    return folder


def own(folder: Path, **kwargs) -> OwnData:
    return OwnData(own_dir=folder, cache_dir=folder.parent / "cache", **kwargs)


def build(folder: Path, num_proc: int | None = None, **kwargs):
    builder = own(folder, **kwargs)
    builder.download_and_prepare(num_proc=num_proc)
    return builder.as_dataset()


def documented_line() -> dict:
    """The complete line of the documentation."""
    return json.loads(re.search(r"```json\n(.*?)```", DOC.read_text(encoding="utf-8"), re.DOTALL)[1])


def test_the_documented_line_gives_the_record_that_it_says(tmp_path):
    folder = tmp_path / "mydata"
    (folder / "scans").mkdir(parents=True)
    PIL.Image.new("L", (3056, 2544)).save(folder / "scans/0001.png")
    assert set(documented_line()) == set(KEYS)
    row = build(write(folder, [documented_line()], "records.jsonl"))["train"][0]
    assert row.pop("image").size == (3056, 2544)
    boxes, present, labels, sentences = (
        row.pop(f"anatomy_{name}") for name in ("boxes", "present", "labels", "sentences")
    )
    assert row == {
        "sample_id": "case-1",
        "subject_id": "patient-7",
        "study_id": "study-9",
        "image_id": "0001",
        "height": 2544,
        "width": 3056,
        "view": 0,
        "sentences": ["There is a small right pleural effusion.", "The heart is of normal size."],
        "objects": [{"bbox": [400, 1900, 1000, 2300], "category": 0, "phrase": "Small right effusion"}],
        "class_labels": [1],
    }
    lung, heart = REGION["right lung"], REGION["cardiac silhouette"]
    assert [index for index, value in enumerate(present) if value] == [lung, heart]
    assert boxes[lung] == [330, 270, 1350, 2310] and boxes[heart] == [1200, 1100, 2100, 2000]
    assert boxes[REGION["spine"]] == [0, 0, 0, 0]
    assert labels == [[int(index == lung)] for index in range(29)]
    assert sentences[lung] == ["Small right pleural effusion."] and sum(map(len, sentences)) == 1


def test_documentation_lists_every_key():
    text = DOC.read_text(encoding="utf-8")
    assert [key for key in KEYS if f"`{key}`" not in text] == []


def test_an_image_alone_is_a_record_in_which_nothing_is_annotated(folder):
    row = build(write(folder, [{"image": "scans/a.png"}]))["train"][0]
    image = row.pop("image")
    assert np.array_equal(np.asarray(image), gradient(HEIGHT, WIDTH))
    known = {"sample_id": "scans/a.png", "height": HEIGHT, "width": WIDTH, "view": -1}
    assert row == dict.fromkeys(row) | known


@pytest.mark.parametrize(
    ("annotated", "column", "expected"),
    [
        ({"sentences": ["One two."]}, "sentences", ["One two."]),
        ({"sentences": []}, "sentences", []),
        ({"class_labels": ["Mass"]}, "class_labels", [0, 1]),
        ({"class_labels": {"Mass": 0, "Edema": 1}}, "class_labels", [1, 0]),
        ({"class_labels": []}, "class_labels", [0, 0]),
        ({"objects": []}, "objects", []),
        (
            {"objects": [{"bbox": [1, 2, 3, 4.5], "category": "Mass"}]},
            "objects",
            [{"bbox": [1, 2, 3, 4.5], "category": 1, "phrase": ""}],
        ),
        ({"anatomy_labels": {}}, "anatomy_labels", [[0, 0]] * 29),
        ({"anatomy_labels": {"carina": {"Edema": 1}}}, "anatomy_labels", [[0, 0]] * 27 + [[1, 0], [0, 0]]),
        ({"anatomy_sentences": {"carina": ["A b."]}}, "anatomy_sentences", [[]] * 27 + [["A b."], []]),
        ({"anatomy_boxes": {"abdomen": [0, 0, 5, 5]}}, "anatomy_boxes", [[0] * 4] * 28 + [[0, 0, 5, 5]]),
        (
            {"anatomy_boxes": [None] * 27 + [[0, 0, 0, 0], [0, 0, 5, 5]]},
            "anatomy_present",
            [False] * 28 + [True],
        ),
    ],
)
def test_any_one_annotation_is_enough(folder, annotated, column, expected):
    (folder / "classes.json").write_text('["Edema", "Mass"]', encoding="utf-8")
    row = build(write(folder, [{"image": "scans/a.png"} | annotated]))["train"][0]
    assert row[column] == expected
    others = set(row) - {column, *annotated, "anatomy_present", "image", "sample_id", "height", "width", "view"}
    assert [name for name in others if row[name] is not None] == []


def test_null_is_the_same_as_left_out(folder):
    line = dict.fromkeys(KEYS) | {"image": "scans/a.png"}
    full, bare = own(write(folder, [line])), {"image": "scans/a.png"}
    record = full.record(full.items()["train"][0])
    plain = own(write(folder, [bare]))
    assert record == plain.record(plain.items()["train"][0])


def test_one_file_for_each_split_and_two_processes(folder):
    lines = {name: [{"image": f"scans/{letter}.png"}] for name, letter in zip(("train", "test"), "ab", strict=True)}
    lines["train"].append({"image": "scans/c.png", "sample_id": 7})
    for name, of_split in lines.items():
        write(folder, of_split, f"{name}.jsonl")
    rows = build(folder, num_proc=2)
    assert {name: split["sample_id"][:] for name, split in rows.items()} == {
        "train": ["scans/a.png", "7"],
        "test": ["scans/b.png"],
    }


@pytest.mark.parametrize("name", ["records.jsonl", "metadata.jsonl"])
def test_one_file_with_splits_and_train_where_none_is_named(folder, name):
    lines = [{"image": "scans/a.png"}, {"image": "scans/b.png", "split": "validation"}]
    rows = build(write(folder, lines, name))
    assert {split: list(of_split["sample_id"]) for split, of_split in rows.items()} == {
        "train": ["scans/a.png"],
        "validation": ["scans/b.png"],
    }


def test_classes_are_those_that_occur_sorted(folder):
    lines = [
        {"image": "scans/a.png", "objects": [{"bbox": [1, 2, 3, 4], "category": "nodule"}]},
        {"image": "scans/b.png", "class_labels": {"Edema": 0}, "anatomy_labels": {"spine": ["Scoliosis"]}},
    ]
    rows = build(write(folder, lines))["train"]
    assert record_classes(rows.features) == ["Edema", "Scoliosis", "nodule"]
    assert rows[0]["objects"][0]["category"] == 2
    assert rows[1]["anatomy_labels"][REGION["spine"]] == [0, 1, 0]
    assert OwnData.CLASSES == ()


def test_labels_without_any_class_are_not_annotated(folder):
    rows = build(write(folder, [{"image": "scans/a.png", "class_labels": [], "anatomy_labels": {"spine": []}}]))[
        "train"
    ]
    assert record_classes(rows.features) == []
    assert (rows[0]["class_labels"], rows[0]["anatomy_labels"]) == (None, None)


@pytest.mark.parametrize(("name", "text"), [("classes.json", '["b", "a"]'), ("classes.txt", "b\n\n a \n")])
def test_classes_of_a_file_keep_their_order(folder, name, text):
    (folder / name).write_text(text, encoding="utf-8")
    builder = own(write(folder, [{"image": "scans/a.png", "class_labels": ["a"]}]))
    assert builder.CLASSES == ("b", "a")
    assert builder.record(builder.items()["train"][0])["class_labels"] == [0, 1]


@pytest.mark.parametrize("text", ['{"a": 1}', '["a", "a"]', '["a"', '["a", 1]'])
def test_wrong_files_of_classes_are_named(folder, text):
    (folder / "classes.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"classes.json"):
        own(write(folder, [{"image": "scans/a.png"}]))


def test_boxes_that_stick_out_are_clipped(folder):
    line = {
        "image": "scans/a.png",
        "objects": [{"bbox": [-5, 10, 70.5, 45], "category": "Mass", "phrase": "p"}],
        "anatomy_boxes": {"spine": [10, -1, 20, 41]},
    }
    row = build(write(folder, [line]))["train"][0]
    assert row["objects"] == [{"bbox": [0, 10, 60, 40], "category": 0, "phrase": "p"}]
    assert row["anatomy_boxes"][REGION["spine"]] == [10, 0, 20, 40]


IMAGE = '{"image": "scans/b.png"'
MISTAKES = [
    ('{"image": "scans/b.png"', "not a JSON object on one line"),
    ("[1]", r"must be a JSON object, but it is \[1\]"),
    ("{}", "`image` must be the path"),
    ('{"image": 5}', "`image` must be the path"),
    (f'{IMAGE}, "sentence": []}}', "unknown key of the line \"sentence\"; did you mean 'sentences'?"),
    (f'{IMAGE}, "xyzzy": 1}}', 'unknown key of the line "xyzzy"; Known: image, split'),
    (f'{IMAGE}, "view": "pa"}}', "unknown `view` \"pa\"; did you mean 'PA'?"),
    (f'{IMAGE}, "split": "validate"}}', "unknown split \"validate\"; did you mean 'validation'?"),
    (f'{IMAGE}, "split": "test"}}', "in the file of another split"),
    (f'{IMAGE}, "subject_id": 1.5}}', "`subject_id` must be a string or an integer, but it is 1.5"),
    (f'{IMAGE}, "height": "40"}}', '`height` must be a number of pixels, but it is "40"'),
    (f'{IMAGE}, "sentences": "One."}}', '`sentences` must be a list, but it is "One."'),
    (f'{IMAGE}, "sentences": [""]}}', '`sentences` must hold sentences, but "" is none'),
    (f'{IMAGE}, "class_labels": ["Maas"]}}', "unknown class in `class_labels`: \"Maas\"; did you mean 'Mass'?"),
    (f'{IMAGE}, "class_labels": "Mass"}}', "`class_labels` must be a list of class names"),
    (f'{IMAGE}, "class_labels": {{"Mass": 2}}}}', "'Mass' must be 0 or 1, but it is 2"),
    (f'{IMAGE}, "anatomy_boxes": {{"left lnug": [1, 2, 3, 4]}}}}', "\"left lnug\"; did you mean 'left lung'?"),
    (f'{IMAGE}, "anatomy_boxes": [[1, 2, 3, 4]]}}', "must have 29 entries, but it has 1"),
    (
        f'{IMAGE}, "anatomy_boxes": {{"spine": [1, 2, 3]}}}}',
        r"the box of spine in .* must be four numbers .*\[1, 2, 3\]",
    ),
    (f'{IMAGE}, "anatomy_labels": {{"spine": ["Flu"]}}}}', 'unknown class in spine in `anatomy_labels`: "Flu"'),
    (f'{IMAGE}, "anatomy_sentences": {{"spine": "A."}}}}', "spine in `anatomy_sentences` must be a list"),
    (f'{IMAGE}, "objects": {{}}}}', "`objects` must be a list"),
    (f'{IMAGE}, "objects": [{{"box": [1, 2, 3, 4]}}]}}', "key of an entry of `objects` \"box\"; did you mean 'bbox'?"),
    (f'{IMAGE}, "objects": [{{"bbox": [1, 2, 3, 4]}}]}}', "unknown category in `objects`: null; Known: Edema, Mass"),
    (f'{IMAGE}, "objects": [{{"category": "Mass"}}]}}', "the box of Mass must be four numbers .* it is null"),
    (f'{IMAGE}, "objects": [{{"category": "Mass", "bbox": [3, 2, 1, 4]}}]}}', r"with x0 < x1 .*\[3, 2, 1, 4\]"),
    (f'{IMAGE}, "objects": [{{"category": "Mass", "bbox": [1, 2, NaN, 4]}}]}}', r"with x0 < x1 .*\[1, 2, NaN, 4\]"),
    (f'{IMAGE}, "objects": [{{"category": "Mass", "bbox": [1, 2, "3", 4]}}]}}', r"four numbers .*\[1, 2, \"3\", 4\]"),
    (f'{IMAGE}, "objects": [{{"category": "Mass", "bbox": [1, 2, 3, 4], "phrase": 1}}]}}', "must be a string"),
    ("[" * 100_000, "not a JSON object on one line .*recursion"),
    (f'{IMAGE}, "sentences": ["Half a \\ud800 here."]}}', "surrogates not allowed"),
    ('{"image": "scans/b.png", "sample_id": "one"}', "the sample_id 'one' stands in .*train.jsonl, line 1 already"),
]


@pytest.mark.parametrize(("line", "problem"), MISTAKES)
def test_mistakes_are_named_with_file_and_line(folder, line, problem):
    (folder / "classes.json").write_text('["Edema", "Mass"]', encoding="utf-8")
    write(folder, [{"image": "scans/a.png", "sample_id": "one"}, "", line])
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        own(folder).items()
    assert f"{folder / 'train.jsonl'}, line 3" in str(error.value)
    assert re.search(problem, str(error.value)), error.value


def test_mistakes_are_found_without_a_file_of_classes_too(folder):
    write(folder, [{"image": "scans/a.png"}, {"image": "scans/b.png", "objects": 3, "class_labels": [1]}])
    with pytest.raises(ValueError, match=r"train.jsonl, line 2: `objects` must be a list"):
        own(folder).items()


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        (
            {"objects": [{"category": "Mass", "bbox": [60, 0, 70, 10]}]},
            r"the box of Mass \(60, 0, 70, 10\) is outside",
        ),
        ({"anatomy_boxes": {"spine": [0, 40, 5, 50]}}, r"the box of spine \(0, 40, 5, 50\) is outside the image"),
        ({"height": 41}, r"height is 41, but the image has 60 x 40 pixels"),
        ({"height": 40, "width": 40}, r"width is 40, but the image has 60 x 40 pixels"),
    ],
)
def test_annotations_that_do_not_fit_their_image_are_named_or_left_out(folder, changed, problem):
    lines = [{"image": "scans/a.png"}, {"image": "scans/b.png"} | changed]
    builder = own(write(folder, lines))
    with pytest.raises(ValueError, match=rf"scans/b.png cannot be used: .*train.jsonl, line 2: {problem}"):
        list(builder._generate_examples(builder.items()["train"]))
    assert list(build(folder, missing="skip")["train"]["sample_id"]) == ["scans/a.png"]


def test_missing_images_are_counted_and_may_be_left_out(folder):
    write(folder, [{"image": "scans/a.png"}, {"image": "scans/x.png"}, {"image": "y.png"}])
    with pytest.raises(
        FileNotFoundError, match=r"2 of 3 images are missing, such as .*x.png \(.*train.jsonl, line 2\)"
    ):
        build(folder)
    assert list(build(folder, missing="skip")["train"]["sample_id"]) == ["scans/a.png"]


@pytest.mark.parametrize("name", ["scans/x.png", "scans", "scans/\0.png", "x" * 300])
def test_a_missing_image_is_rejected_like_a_damaged_one(folder, tmp_path, name):
    write(folder, [{"image": "scans/a.png"}, {"image": name}])
    prepare("own", tmp_path / "out", data_dir=folder, num_proc=1, max_rejected=50)
    with (tmp_path / "out" / "rejected.csv").open(encoding="utf-8", newline="") as file:
        rejected = list(csv.reader(file))
    assert rejected[1:] == [["train", name, f"{folder}/{name}", "the image file is missing"]]


@pytest.mark.parametrize("content", [b"", b"no image at all", b"\x89PNG\r\n\x1a\n\0\0"])
def test_damaged_images_are_named_with_their_line(folder, content):
    (folder / "scans/b.png").write_bytes(content)
    builder = own(write(folder, [{"image": "scans/a.png"}, {"image": "scans/b.png"}]))
    with pytest.raises(RejectedRecord, match=r"train.jsonl, line 2: "):
        builder.record(builder.items()["train"][1])
    with pytest.raises(RejectedRecord, match="b.png"):
        builder.load_image(folder / "scans/b.png")


def test_a_damaged_dicom_header_does_not_stop_the_preparation(folder, tmp_path):
    path = save_dicom(folder / "scans/d.dcm", gradient(HEIGHT, WIDTH))
    content = path.read_bytes()
    assert content.count(b"\x28\0\x02\0US") == 1
    path.write_bytes(content.replace(b"\x28\0\x02\0US", b"\x28\0\x02\0\x55\xbb"))  # a type that there is not
    write(folder, [{"image": "scans/a.png"}, {"image": "scans/d.dcm"}])
    info = prepare("own", tmp_path / "out", data_dir=folder, num_proc=1, max_rejected=50)
    assert info.splits["train"].records == info.splits["train"].rejected == 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("classes.txt", b"\xd6dem\n", "classes.txt is not text in UTF-8"),
        ("classes.json", b'["Edema"', "classes.json is not JSON in UTF-8"),
        ("classes.json", b"[" * 100_000, "classes.json is not JSON in UTF-8 .*recursion"),
    ],
)
def test_unreadable_files_of_classes_are_named(folder, name, content, message):
    write(folder, [{"image": "scans/a.png"}])
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        own(folder)


def test_subject_in_two_splits_is_a_warning_that_names_it(folder, caplog):
    lines = [
        {"image": "scans/a.png", "subject_id": 11},
        {"image": "scans/b.png", "subject_id": "11", "split": "test"},
        {"image": "scans/c.png", "subject_id": 12},
    ]
    own(write(folder, lines, "records.jsonl")).items()
    assert "1 subjects are in several splits, such as 11 (test, train)" in caplog.text
    caplog.clear()
    own(write(folder, [lines[0], lines[2]], "records.jsonl")).items()
    assert "several splits" not in caplog.text


def test_image_in_two_splits_is_a_warning(folder, caplog):
    lines = [{"image": "scans/a.png"}, {"image": "scans/a.png", "sample_id": "other", "split": "test"}]
    own(write(folder, lines, "records.jsonl")).items()
    assert "1 images are in several splits" in caplog.text


def test_files_of_splits_and_one_for_all_exclude_each_other(folder):
    write(write(folder, [{"image": "scans/a.png"}]), [{"image": "scans/b.png"}], "records.jsonl")
    with pytest.raises(ValueError, match=r"it holds records.jsonl, train.jsonl"):
        own(folder)


def test_file_of_another_name_is_an_error(folder):
    with pytest.raises(ValueError, match=r"validation.jsonl.*it holds val.jsonl"):
        own(write(folder, [{"image": "scans/a.png"}], "val.jsonl"))


def test_folder_without_lines_is_an_error(folder, monkeypatch):
    monkeypatch.delenv("OWN_DATA_DIR", raising=False)
    with pytest.raises(FileNotFoundError, match=r"train.jsonl, validation.jsonl.*OWN_DATA_DIR"):
        own(folder)
    with pytest.raises(ValueError, match="no images are left"):
        own(write(folder, [])).items()


def test_lines_that_are_not_utf8_are_named_and_a_mark_at_the_start_is_no_matter(folder):
    (folder / "train.jsonl").write_bytes(b'\xef\xbb\xbf{"image": "scans/a.png"}\n{"image": "\xe9.png"}\n')
    with pytest.raises(ValueError, match=r"train.jsonl, line 2: .*utf-8"):
        own(folder)
    (folder / "train.jsonl").write_bytes(b'\xef\xbb\xbf{"image": "scans/a.png"}')
    builder = own(folder)
    assert builder.record(builder.items()["train"][0])["sample_id"] == "scans/a.png"


def test_changed_lines_are_a_new_build(folder):
    first = build(write(folder, [{"image": "scans/a.png", "sentences": ["One two."]}]))
    second = build(write(folder, [{"image": "scans/a.png", "sentences": ["Three four five."]}]))
    assert first["train"][0]["sentences"] == ["One two."]
    assert second["train"][0]["sentences"] == ["Three four five."]


@pytest.mark.parametrize("preamble", [True, False])
def test_dicom_images_are_read_as_on_a_viewer_and_become_png_files(folder, preamble, caplog):
    pixels = gradient(HEIGHT, WIDTH, 4095, np.uint16)
    kwargs = {"bits_stored": 12, "PhotometricInterpretation": "MONOCHROME1"}
    save_dicom(folder / "scans/d", pixels, preamble=preamble, **kwargs)
    with caplog.at_level(logging.WARNING):
        rows = build(write(folder, [{"image": "scans/d", "objects": [{"bbox": [0, 0, 9, 9], "category": "Mass"}]}]))
    row = rows["train"][0]
    assert (row["height"], row["width"]) == (HEIGHT, WIDTH)
    expected = np.rint((4095 - pixels) / 4095 * 255)
    assert row["image"].mode == "L" and np.abs(np.asarray(row["image"]) - expected).max() <= 1
    assert Path(row["image"].filename).is_relative_to(folder.parent / "cache")
    assert sorted(path.name for path in (folder / "scans").iterdir()) == ["a.png", "b.png", "c.png", "d"]


def test_images_of_16_bits_become_png_files_of_8(folder):
    save_image(folder / "scans/deep.png", gradient(HEIGHT, WIDTH, 65535, np.uint16))
    image = build(write(folder, [{"image": "scans/deep.png"}]))["train"][0]["image"]
    assert image.mode == "L"
    assert np.array_equal(np.asarray(image), np.rint(gradient(HEIGHT, WIDTH, 65535, np.uint16) / 65535 * 255))


def test_orientation_tag_counts_for_the_size(folder):
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    save_image(folder / "scans/turned.jpg", gradient(HEIGHT, WIDTH), exif=exif)
    builder = own(write(folder, [{"image": "scans/turned.jpg"}]))
    record = builder.record(builder.items()["train"][0])
    assert (record["height"], record["width"]) == (WIDTH, HEIGHT) == builder.load_image(record["image"]).shape
