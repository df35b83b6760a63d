"""Tables of raw downloads as other programs leave them: blank lines, whole numbers with a decimal point."""

import csv
import gzip
import io

import pytest

from tests.raw_trees.mimic import sample_images, write_all
from tests.raw_trees.nih import BOX_HEADER, BOXES, ENTRIES, ENTRY_HEADER, write_lines, write_nih
from tests.raw_trees.vindr import write_vindr
from training.data.mimic_cxr import MimicCxr
from training.data.nih_cxr14 import NihCxr14
from training.data.raw import read_numbered_table, read_table
from training.data.vindr_cxr import VindrCxr


METADATA = "mimic-cxr-jpg-2.0.0/mimic-cxr-2.0.0-metadata.csv.gz"


def items(builder, root, tmp_path, **options):
    return builder(cache_dir=str(tmp_path / "cache"), data_dir=str(root), **options).items()


def insert_blank_lines(path, before):
    """Two blank lines before the line of this number, counted from 1."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text("".join([*lines[: before - 1], "\n", "\r\n", *lines[before - 1 :]]), encoding="utf-8")


def test_rows_are_numbered_as_an_editor_does(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text('a,b\n1,2\n\n\n3,4\n"5\n",6\n7,8\n', encoding="utf-8")
    found = list(read_numbered_table(path, ["a"]))
    assert [line for line, _ in found] == [2, 5, 7, 8]  # of a row with a line break the last line
    assert [row for _, row in found] == read_table(path, ["a"])
    assert found[2][1] == {"a": "5\n", "b": "6"}


@pytest.mark.parametrize("line", ["00099991_000.png,Hernia,1,2,3,4", "00099991_000.png,Mass,1,2,3,four"])
def test_nih_boxes_after_blank_lines(tmp_path, line):
    root = write_nih(tmp_path / "nih", images=False)
    write_lines(root / "BBox_List_2017.csv", [BOX_HEADER, "", *BOXES[:3], "", "", *BOXES[3:], line])
    with pytest.raises(ValueError, match=r"BBox_List_2017.csv, line 11: "):
        items(NihCxr14, root, tmp_path)


def test_nih_labels_after_blank_lines(tmp_path):
    root = write_nih(tmp_path / "nih", images=False)
    flu = "00099997_000.png,Flu,0,99997,1,F,PA,1,1,1,1"
    write_lines(root / "Data_Entry_2017_v2020.csv", [ENTRY_HEADER, *ENTRIES[:2], "", *ENTRIES[2:], flu])
    with pytest.raises(ValueError, match=r"v2020.csv, line 11: there is no finding 'Flu'"):
        items(NihCxr14, root, tmp_path)


@pytest.mark.parametrize(
    ("table", "old", "new", "line"),
    [("image_labels_test", ",0", ",-1", 5), ("annotations_train", "Cardiomegaly", "Cardiomegali", None)],
)
def test_vindr_tables_after_blank_lines(tmp_path, table, old, new, line):
    root = write_vindr(tmp_path / "vindr", images=False)
    path = root / "annotations" / f"{table}.csv"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    number = next(index for index, text in enumerate(lines[2:], start=2) if old in text)
    lines[number] = lines[number].replace(old, new, 1)
    path.write_text("".join(lines), encoding="utf-8")
    insert_blank_lines(path, before=2)
    expected = number + 1 + 2
    assert line in (None, expected)
    with pytest.raises(ValueError, match=rf"{table}.csv, line {expected}: "):
        items(VindrCxr, root, tmp_path)


def rewritten(path, **changed):
    """Rows of a compressed table with other values in some columns."""
    with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(row | {name: change(row[name]) for name, change in changed.items()} for row in rows)
    path.write_bytes(gzip.compress(text.getvalue().encode()))


def test_sizes_with_a_decimal_point(tmp_path):
    root = write_all(tmp_path / "raw", sample_images())
    expected = items(MimicCxr, root, tmp_path)
    rewritten(root / METADATA, Rows=lambda value: f"{value}.0", Columns=lambda value: f" {value}. ")
    found = items(MimicCxr, root, tmp_path)
    assert found == expected
    assert all(type(item["height"]) is int for split in found.values() for item in split)


@pytest.mark.parametrize("value", ["620.5", "nan", "inf", "1e400", "", "many"])
def test_sizes_that_are_no_whole_numbers(tmp_path, value):
    root = write_all(tmp_path / "raw", sample_images())
    rewritten(root / METADATA, Rows=lambda _: value)
    with pytest.raises(ValueError, match=rf"Rows and Columns of .* are '{value}' and .* instead of whole numbers"):
        items(MimicCxr, root, tmp_path)
