"""Formats of prepared images: what they hold, reading them, and folders of an earlier version."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from processing_chex import ChexImageProcessor
from space_app.data_command import data_app
from training.collate import RecordDataset, TextTable
from training.data import preparation
from training.data.phantom import encode_png, render_phantom
from training.data.preparation import IMAGE_FORMATS, PreparationError, encode_image, prepare
from training.data.prepared import file_sha256, open_prepared, read_info


FORMATS = {"pgm": "PPM", "png": "PNG", "jpeg": "JPEG"}  # with their names in Pillow
PHANTOM = {"num_train": 3, "num_validation": 0, "num_test": 0, "seed": 5}


def phantom(out, **options):
    return prepare("phantom", out, size=64, num_proc=1, options=PHANTOM, say=lambda message: None, **options)


def batch(records, **options):
    dataset = RecordDataset(records, ChexImageProcessor(size=32), TextTable(), side=64, **options)
    return dataset.__getitems__([2, 0, 1])[0]


@pytest.fixture(scope="module")
def drawn():
    return np.stack([render_phantom(5, index, 64).image for index in (2, 0, 1)])


@pytest.mark.parametrize("image_format", FORMATS)
def test_prepared_images_are_those_that_were_drawn(image_format, drawn, tmp_path):
    out = tmp_path / "out"
    info = phantom(out, image_format=image_format)
    assert info.image_format == read_info(out).image_format == image_format.upper()
    assert f"Images are grey {image_format.upper()}, 64 pixels" in (out / "README.md").read_text(encoding="utf-8")
    records = open_prepared(out, "train", cache_dir=tmp_path / "cache")
    assert records[0]["image"].mode == "L" and records[0]["image"].format == FORMATS[image_format]
    for in_memory in (True, False):
        images = batch(records, in_memory=in_memory).images[:, 0].numpy()
        difference = np.abs(images.astype(int) - drawn)
        assert (0 < difference.mean() < 3) if image_format == "jpeg" else (difference.max() == 0)


def test_pgm_is_the_default_and_the_largest(drawn, tmp_path):
    assert phantom(tmp_path / "default").content == phantom(tmp_path / "pgm", image_format="pgm").content
    assert tuple(FORMATS) == IMAGE_FORMATS
    pgm, png, jpeg = (sum(len(encode_image(image, name)) for image in drawn) for name in FORMATS)
    assert pgm == 3 * (64 * 64 + 13) and pgm > png > jpeg


def test_another_format_is_another_folder(tmp_path):
    out = tmp_path / "out"
    before = phantom(out, image_format="png")
    said = []
    options = {"size": 64, "num_proc": 1, "options": PHANTOM, "say": said.append}
    assert prepare("phantom", out, image_format="png", **options) == before
    assert "already prepared" in said[-1]
    with pytest.raises(PreparationError, match=r"with other options. Replace it with --overwrite"):
        prepare("phantom", out, **options)
    assert prepare("phantom", out, overwrite=True, **options).image_format == "PGM"


def test_a_folder_of_an_earlier_version_is_recognised(tmp_path, monkeypatch):
    """PNG was once the only format, and the fingerprint said nothing about it."""
    seen = []
    monkeypatch.setattr(preparation, "_digest", lambda value: seen.append(value) or json.dumps(str(value))[:9])
    phantom(tmp_path / "out", image_format="png")
    settings = [value for value in seen if isinstance(value, dict)]
    assert settings and all("image_format" not in value for value in settings)


@pytest.mark.parametrize("name", ["PGM", "tiff", "", None])
def test_an_unknown_format_is_named(name, tmp_path):
    with pytest.raises(ValueError, match=r"image_format must be one of pgm, png, jpeg, got"):
        phantom(tmp_path / "out", image_format=name)
    assert not (tmp_path / "out").exists()


def test_the_command_knows_the_formats(tmp_path):
    options = [f"--option={name}={value}" for name, value in PHANTOM.items()]
    arguments = ["prepare", "phantom", "--out", str(tmp_path / "out"), "--size", "64", *options, "--num-proc", "1"]
    done = CliRunner().invoke(data_app, [*arguments, "--image-format", "jpeg"])
    assert done.exit_code == 0 and "train: 3 images" in done.output
    assert read_info(tmp_path / "out").image_format == "JPEG"
    shard = pq.read_table(next((tmp_path / "out" / "data").glob("*.parquet")))
    assert shard["image"][0]["bytes"].as_py()[:3] == b"\xff\xd8\xff"


def test_files_that_look_like_pgm(tmp_path):
    """Written by others: with comments, of 16 bits, in plain text, cut off, or with more than one line in a header."""
    grey = np.random.default_rng(0).integers(0, 256, (64, 74), dtype=np.uint8)
    pixels = grey.tobytes()
    ours = encode_image(grey, "pgm")
    assert ours == b"P5\n74 64\n255\n" + pixels
    same = {
        "ours": ours,
        "comment": b"P5\n# a comment\n74 64\n255\n" + pixels,
        "blanks": b"P5 74\n64 255\n" + pixels,
        "more bytes": ours + b"\n",
        "plain": b"P2\n74 64\n255\n" + " ".join(map(str, grey.ravel())).encode(),
        "png": encode_png(grey),
        "16 bits": b"P5\n74 64\n65535\n" + (grey.astype(">u2") * 257).tobytes(),
    }
    records = open_prepared(prepared_with(same, tmp_path / "good"), cache_dir=tmp_path / "cache")["train"]
    dataset = RecordDataset(records, ChexImageProcessor(size=64), TextTable(), in_memory=False)
    images = dataset.__getitems__(range(len(same)))[0].images[:, 0].numpy()
    for name, image in zip(same, images, strict=True):
        assert np.array_equal(image, grey[:, 5:69]), name

    records = open_prepared(prepared_with({"cut": ours[:-1]}, tmp_path / "bad"), cache_dir=tmp_path / "cache")["train"]
    with pytest.raises(OSError, match="truncated"):
        RecordDataset(records, ChexImageProcessor(size=64), TextTable(), in_memory=False)[0]


def prepared_with(images, out):
    """A prepared folder in which the images have been replaced by these files."""
    options = PHANTOM | {"num_train": len(images)}
    prepare("phantom", out, size=64, num_proc=1, options=options, say=lambda message: None)
    manifest = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
    (shard,) = manifest["splits"]["train"]["shards"]
    table = pq.read_table(out / shard["file"])
    column = pa.array([{"bytes": data, "path": None} for data in images.values()], table.schema.field("image").type)
    table = table.set_column(table.schema.get_field_index("image"), table.schema.field("image"), column)
    pq.write_table(table, out / shard["file"])
    shard |= {"bytes": (out / shard["file"]).stat().st_size, "sha256": file_sha256(out / shard["file"])}
    (out / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    return out
