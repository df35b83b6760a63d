"""MIMIC-CXR, Chest ImaGenome and MS-CXR: records that are built from small downloads in the raw formats."""

import contextlib
import json
import logging
import multiprocessing
import os
import pickle
import re
import zipfile
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import PIL.ImageFile
import pytest

from processing_chex.vocabulary import ANATOMY_NAMES, CHEXPERT_CLASSES, CIG_CLASSES, MSCXR_CLASSES
from tests.raw_trees.mimic import (
    METADATA_COLUMNS,
    MSCXR_COLUMNS,
    REPORT_SENTENCES,
    RawImage,
    mention,
    plain_regions,
    region,
    sample_boxes,
    sample_images,
    scene_graph,
    table_bytes,
    write_all,
    write_file,
    write_imagenome,
    write_jpg,
    write_members,
    write_mscxr,
    write_reports,
)
from training.data import builder_class
from training.data.chest_imagenome import ChestImagenome
from training.data.mimic_cxr import FileStore, MimicCxr
from training.data.ms_cxr import MsCxr
from training.data.preparation import PreparationError, prepare, read_record
from training.data.raw import RawBuilder, RejectedRecord
from training.data.record import record_features


LOGIN_PAGE = b"<!DOCTYPE html>\n<html><head><title>Log in</title></head></html>\n"
METADATA = "mimic-cxr-jpg-2.0.0/mimic-cxr-2.0.0-metadata.csv.gz"
SPLIT = "mimic-cxr-jpg-2.0.0/mimic-cxr-2.0.0-split.csv.gz"
CHEXPERT = "mimic-cxr-jpg-2.0.0/mimic-cxr-2.0.0-chexpert.csv.gz"
GRAPHS = "chest-imagenome-dataset-1.0.0/silver_dataset/scene_graph.zip"
REPORTS = "mimic-cxr-2.0.0/mimic-cxr-reports.zip"
ALL_NONE = dict.fromkeys(
    ("sentences", "anatomy_boxes", "anatomy_present", "anatomy_labels", "anatomy_sentences", "objects", "class_labels")
)


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    for variable in ("MIMIC_CXR_JPG_DIR", "MIMIC_CXR_REPORT_DIR", "CHEST_IMAGENOME_DIR", "MS_CXR_DIR"):
        monkeypatch.delenv(variable, raising=False)
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """All four downloads; not to be changed."""
    return write_all(tmp_path_factory.mktemp("raw"))


def build(
    builder: type[RawBuilder], cache: Path, num_proc: int | None = None, **options: object
) -> tuple[dict[str, list[dict]], RawBuilder]:
    """Records of all splits, with images as (height, width), and the builder."""
    made = builder(cache_dir=str(cache), **{name: str(v) if isinstance(v, Path) else v for name, v in options.items()})
    made.download_and_prepare(num_proc=num_proc)
    splits = {name: list(split) for name, split in made.as_dataset().items()}
    for record in (record for records in splits.values() for record in records):
        record["image"] = np.asarray(record["image"]).shape
    return splits, made


def letters(splits: dict[str, list[dict]]) -> dict[str, str]:
    return {name: "".join(record["image_id"][0] for record in records) for name, records in splits.items()}


def columns_of(image: RawImage, **annotation: object) -> dict:
    """The record of an image with these annotations."""
    return {
        "sample_id": image.sample_id,
        "subject_id": str(image.subject),
        "study_id": str(image.study),
        "image_id": image.dicom_id,
        "image": (image.height, image.width),
        "height": image.height,
        "width": image.width,
        "view": {"PA": 0, "AP": 1}[image.view],
        **ALL_NONE,
        **annotation,
    }


def vector(classes: tuple[str, ...], *positive: str) -> list[int]:
    assert set(positive) <= set(classes)
    return [int(name in positive) for name in classes]


IMAGES = {image.letter: image for image in sample_images()}


class TestMimicCxr:
    def test_records(self, tree, tmp_path):
        splits, builder = build(MimicCxr, tmp_path, data_dir=tree)
        assert splits == {
            "train": [
                columns_of(
                    IMAGES["a"],
                    sentences=REPORT_SENTENCES,
                    class_labels=vector(CHEXPERT_CLASSES, "Atelectasis", "Edema"),
                ),
                columns_of(IMAGES["h"], sentences=REPORT_SENTENCES, class_labels=[0] * 14),
            ],
            "validation": [
                columns_of(IMAGES["d"], sentences=["Mild edema."], class_labels=vector(CHEXPERT_CLASSES, "Edema")),
                columns_of(
                    IMAGES["e"],
                    sentences=["Lines are in place."],
                    class_labels=vector(CHEXPERT_CLASSES, "Support Devices"),
                ),
            ],
            "test": [
                columns_of(IMAGES["f"], sentences=REPORT_SENTENCES, class_labels=vector(CHEXPERT_CLASSES, "Pneumonia"))
            ],
        }
        assert builder.info.features == record_features(CHEXPERT_CLASSES)
        assert builder.funnel() == (
            "train: 4 images -> 3 frontal -> 3 with a report\n"
            "validation: 2 images -> 2 frontal -> 2 with a report\n"
            "test: 2 images -> 2 frontal -> 1 with a report"
        )

    def test_image_is_the_raw_file(self, tree, tmp_path):
        builder = MimicCxr(cache_dir=str(tmp_path), data_dir=str(tree))
        builder.download_and_prepare()
        row = builder.as_dataset(split="test").cast_column("image", datasets.Image(decode=False))[0]
        assert row["image"]["path"] == str(tree / "mimic-cxr-jpg-2.0.0" / IMAGES["f"].path)

    def test_uncertain_labels_can_be_negative(self, tree, tmp_path):
        splits, _ = build(MimicCxr, tmp_path, data_dir=tree, uncertain="negative")
        assert splits["train"][0]["class_labels"] == vector(CHEXPERT_CLASSES, "Atelectasis")
        assert splits["validation"][0]["class_labels"] == [0] * 14
        with pytest.raises(ValueError, match="'positive' or 'negative', not 'maybe'"):
            MimicCxr(cache_dir=str(tmp_path), data_dir=str(tree), uncertain="maybe")

    def test_without_reports_no_reports_are_needed(self, tmp_path, caplog):
        root = write_jpg(tmp_path / "jpg", sample_images())
        splits, _ = build(MimicCxr, tmp_path / "cache", data_dir=root, reports=False)
        assert letters(splits) == {"train": "abh", "validation": "de", "test": "fg"}
        assert all(record["sentences"] is None for records in splits.values() for record in records)
        # The study of g has no row in the table of labels: that is not the same as nothing being mentioned.
        assert splits["test"][1] == columns_of(IMAGES["g"])
        assert "1 images have no row in the CheXpert table" in caplog.text

    def test_studies_without_usable_report_are_dropped_and_counted(self, tmp_path, caplog):
        root = write_all(tmp_path / "raw")
        with zipfile.ZipFile(root / REPORTS, "a") as archive:
            archive.writestr("files/p19/p19000006/s50000006.txt", b" IMPRESSION:\n \n FINAL REPORT\n")
        splits, builder = build(MimicCxr, tmp_path / "cache", data_dir=root)
        assert letters(splits) == {"train": "ah", "validation": "de", "test": "f"}
        assert builder.counts["test"]["with a report"] == 2
        assert caplog.text.count("1 images were left out (1: the report has no sentences of findings") == 2

    def test_report_that_is_not_utf8_is_read_with_replacements(self, tmp_path):
        images = sample_images()
        root = write_jpg(tmp_path / "raw", images)
        write_reports(root, images, archive=None)
        report = b" FINAL REPORT\n FINDINGS: \n Caf\xe9 au lait.\n"
        write_file(root / "files/p19/p19000005/s50000005.txt", report)
        splits, _ = build(MimicCxr, tmp_path / "cache", data_dir=root)
        assert splits["test"][0]["sentences"] == ["Caf\ufffd au lait."]


class TestChestImagenome:
    def test_findings_phrases_and_boxes_of_regions(self, tree, tmp_path):
        splits, builder = build(ChestImagenome, tmp_path, data_dir=tree)
        assert letters(splits) == {"train": "a", "test": "f"}
        boxes = {
            "right lung": [4, 5, 16, 30],
            "left lung": [20, 5, 36, 30],
            "cardiac silhouette": [14, 18, 30, 32],
            "spine": [17, 0, 22, 40],
        }
        no_labels = [0] * len(CIG_CLASSES)
        assert splits["train"] == [
            columns_of(
                IMAGES["a"],
                sentences=REPORT_SENTENCES,
                anatomy_boxes=[boxes.get(name, [0, 0, 0, 0]) for name in ANATOMY_NAMES],
                anatomy_present=[name in boxes for name in ANATOMY_NAMES],
                anatomy_labels=[
                    vector(CIG_CLASSES, "lung opacity", "pneumonia") if name == "right lung" else no_labels
                    for name in ANATOMY_NAMES
                ],
                anatomy_sentences=[
                    ["Opacity on the right.", "No pneumothorax.", "Opacity, likely pneumonia."]
                    if name == "right lung"
                    else []
                    for name in ANATOMY_NAMES
                ],
            )
        ]
        # The image of 44 x 60 pixels cuts the box of the abdomen on three sides; five other boxes are unusable, that
        # of the carina with its finding.
        boxes["abdomen"] = [0, 35, 60, 44]
        assert splits["test"] == [
            columns_of(
                IMAGES["f"],
                sentences=REPORT_SENTENCES,
                anatomy_boxes=[boxes.get(name, [0, 0, 0, 0]) for name in ANATOMY_NAMES],
                anatomy_present=[name in boxes for name in ANATOMY_NAMES],
                anatomy_labels=[
                    vector(CIG_CLASSES, "sub-diaphragmatic air") if name == "abdomen" else no_labels
                    for name in ANATOMY_NAMES
                ],
                anatomy_sentences=[["Free air is seen."] if name == "abdomen" else [] for name in ANATOMY_NAMES],
            )
        ]
        assert builder.info.features == record_features(CIG_CLASSES)

    def test_what_is_left_out_is_counted(self, tree, tmp_path, caplog):
        _, builder = build(ChestImagenome, tmp_path, data_dir=tree)
        assert builder.funnel() == (
            "train: 4 images -> 3 frontal -> 3 with a report -> 2 with a scene graph\n"
            "validation: 2 images -> 2 frontal -> 2 with a report -> 2 with a scene graph\n"
            "test: 2 images -> 2 frontal -> 1 with a report -> 1 with a scene graph\n"
            "scene graphs: 6 files -> 5 of images above"
        )
        assert "2 images were left out (1: fewer than 5 regions have a valid box; 1: a region has two boxes)" in (
            caplog.text
        )
        assert "left out of records: 5 boxes without area in their image." in caplog.text
        assert "1 labels anatomicalfinding|yes|unheard of (not among the classes)." in caplog.text
        # A split without images cannot be opened, so it is not there, which is said.
        assert "no images are left in the validation split.\ntrain: 4 images" in caplog.text

    def test_evaluation_set_needs_no_reports(self, tmp_path):
        images = sample_images()
        root = tmp_path / "raw"
        write_jpg(root, images)
        write_imagenome(root, images)
        splits, builder = build(ChestImagenome, tmp_path / "cache", data_dir=root, reports=False)
        assert letters(splits) == {"train": "ab", "test": "fg"}
        assert all(record["sentences"] is None for records in splits.values() for record in records)
        # Nothing is mentioned in the scene graph of g, which is annotated all the same.
        assert splits["test"][1]["anatomy_present"].count(True) == 4
        assert splits["test"][1]["anatomy_labels"] == [[0] * len(CIG_CLASSES)] * len(ANATOMY_NAMES)
        assert splits["test"][1]["anatomy_sentences"] == [[]] * len(ANATOMY_NAMES)

    def test_several_processes_give_the_same(self, tree, tmp_path):
        alone, _ = build(ChestImagenome, tmp_path / "1", data_dir=tree, reports=False)
        together, _ = build(ChestImagenome, tmp_path / "2", data_dir=tree, reports=False, num_proc=2)
        assert together == alone

    def test_every_known_region_counts_as_found(self, tmp_path):
        """Of the five regions with boxes one may be among the seven that are no queries, but not an unknown one."""
        image = IMAGES["f"]
        images = [
            RawImage("1", 10000011, 50000011, "PA", 40, 40, "train"),
            RawImage("2", 10000012, 50000012, "PA", 40, 40, "train"),
        ]
        images[0].graph = scene_graph(images[0], [*plain_regions()[:4], region("left upper abdomen", 1, 1, 5, 5)])
        images[1].graph = scene_graph(images[1], [*plain_regions()[:4], region("left elbow", 1, 1, 5, 5)])
        root = write_jpg(tmp_path / "raw", [*images, image])
        write_imagenome(root, images)
        splits, _ = build(ChestImagenome, tmp_path / "cache", data_dir=root, reports=False)
        assert letters(splits) == {"train": "1"}

    def test_lateral_scene_graph_is_dropped(self, tmp_path, caplog):
        images = [RawImage(letter, 10000011, 50000011, "PA", 40, 40, "train") for letter in "12"]
        images[0].graph = scene_graph(images[0], plain_regions(), viewpoint="LATERAL")
        images[1].graph = scene_graph(images[1], plain_regions())
        root = write_jpg(tmp_path / "raw", images)
        write_imagenome(root, images)
        splits, _ = build(ChestImagenome, tmp_path / "cache", data_dir=root, reports=False)
        assert letters(splits) == {"train": "2"}
        assert "(1: the scene graph is not of a frontal view)" in caplog.text

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b'{"image_id": "aaaa', r"aaaaaaaa_SceneGraph.json in .*scene_graph.zip is truncated or damaged"),
            (b"[" * 100_000, r"aaaaaaaa_SceneGraph.json in .*scene_graph.zip is truncated or damaged"),
            (b"\xff\xfe\xff", "aaaaaaaa_SceneGraph.json in .*scene_graph.zip is truncated or damaged"),
            (b'{"image_id": "another"}', "aaaaaaaa_SceneGraph.json in .* is not the scene graph of aaaaaaaa"),
            (json.dumps({"image_id": IMAGES["a"].dicom_id}).encode(), "another structure than expected.*viewpoint"),
            (
                json.dumps(scene_graph(IMAGES["a"], [{"bbox_name": "spine"}])).encode(),
                "another structure than expected.*original_x1",
            ),
            (
                json.dumps(scene_graph(IMAGES["a"], plain_regions(), [mention("spine", [3], [[]])])).encode(),
                "another structure than expected.*AttributeError",
            ),
        ],
    )
    def test_damaged_scene_graph_is_named(self, tmp_path, content, message, caplog):
        root = write_all(tmp_path / "raw")
        with zipfile.ZipFile(root / GRAPHS) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile(root / GRAPHS, "w") as archive:
            for name, data in members.items():
                archive.writestr(name, content if IMAGES["a"].dicom_id in name else data)
        with pytest.raises(datasets.exceptions.DatasetGenerationError) as caught:
            build(ChestImagenome, tmp_path / "cache", data_dir=root)
        assert isinstance(caught.value.__cause__, ValueError)
        with pytest.raises(ValueError, match=f"{IMAGES['a'].sample_id} cannot be used: .*{message}"):
            raise caught.value.__cause__
        splits, _ = build(ChestImagenome, tmp_path / "cache", data_dir=root, missing="skip")
        assert letters(splits) == {"test": "f"}
        assert re.search(message, caplog.text)


class TestMsCxr:
    def expected(self) -> dict[str, list[dict]]:
        def found(category: str, phrase: str, *box: int) -> dict:
            return {"bbox": list(box), "category": MSCXR_CLASSES.index(category), "phrase": phrase}

        return {
            "validation": [
                columns_of(
                    IMAGES["a"],
                    objects=[
                        found("Pneumonia", "patchy opacities in both lungs", 5, 10, 15, 30),
                        found("Pneumonia", "patchy opacities in both lungs", 40, 10, 52, 32),
                        found("Lung Opacity", "opacity, right base", 6, 20, 14, 29),
                    ],
                )
            ],
            "test": [
                columns_of(IMAGES["d"], objects=[found("Edema", "mild edema", 2, 4, 32, 44)]),
                columns_of(
                    IMAGES["f"],
                    objects=[
                        found("Cardiomegaly", "enlarged heart", 50, 30, 60, 44),
                        found("Pneumothorax", "apical pneumothorax", 10, 0, 25, 6),
                    ],
                ),
            ],
        }

    def test_records(self, tree, tmp_path, caplog):
        splits, builder = build(MsCxr, tmp_path, data_dir=tree)
        assert splits == self.expected()
        assert builder.info.features == record_features(MSCXR_CLASSES)
        # c is lateral, one image is unknown.
        assert builder.funnel() == (
            "validation: 2 images -> 1 frontal\ntest: 2 images -> 2 frontal\nannotated: 5 images -> 3 of images above"
        )
        assert "left out of records: 1 boxes without area in their image." in caplog.text

    @pytest.mark.parametrize("suffix", [".csv", ".csv.gz"])
    def test_later_release_has_the_same_splits(self, tmp_path, suffix):
        images = sample_images()
        write_jpg(tmp_path / "jpg", images)
        path = write_mscxr(tmp_path / "ms", sample_boxes(images), "v1.1.0") / "MS_CXR_Local_Alignment_v1.1.0.csv"
        if suffix != ".csv":
            write_file(path.with_suffix(suffix), path.read_bytes())
            path.unlink()
        splits, _ = build(MsCxr, tmp_path / "cache", jpg_dir=tmp_path / "jpg", mscxr_dir=tmp_path / "ms")
        assert splits == self.expected()

    def test_of_two_releases_that_of_the_paper_is_read(self, tmp_path):
        images = sample_images()
        root = write_mscxr(write_jpg(tmp_path / "raw", images), sample_boxes(images))
        write_mscxr(root, sample_boxes(images)[:1], "v1.1.0")
        assert build(MsCxr, tmp_path / "cache", data_dir=root)[0] == self.expected()

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"image_width": 999}, "size as 48 x 999 pixels, but the metadata of MIMIC-CXR-JPG as 48 x 64"),
            ({"x": "left"}, "MS_CXR_Local_Alignment_v1.0.0.csv is not made of numbers"),
        ],
    )
    def test_contradictory_rows_are_rejected(self, tmp_path, change, message):
        images = sample_images()
        root = write_jpg(tmp_path / "raw", images)
        boxes = sample_boxes(images)
        boxes[0] |= change
        write_mscxr(root, boxes)
        with pytest.raises(datasets.exceptions.DatasetGenerationError) as caught:
            build(MsCxr, tmp_path / "cache", data_dir=root)
        assert message in str(caught.value.__cause__)
        splits, _ = build(MsCxr, tmp_path / "cache", data_dir=root, missing="skip")
        assert letters(splits) == {"test": "df"}

    def test_missing_coordinates_drop_the_box_with_its_phrase(self, tmp_path):
        images = sample_images()
        root = write_jpg(tmp_path / "raw", images)
        boxes = sample_boxes(images)
        boxes[0] |= {"w": ""}  # of a, which has two more
        boxes[1] |= {"h": "nan"}  # of d, whose other box has no width
        write_mscxr(root, boxes)
        splits, _ = build(MsCxr, tmp_path / "cache", data_dir=root)
        assert letters(splits) == {"validation": "a", "test": "f"}
        assert [found["phrase"] for found in splits["validation"][0]["objects"]] == [
            "patchy opacities in both lungs",
            "opacity, right base",
        ]

    def test_unknown_category(self, tmp_path):
        images = sample_images()
        root = write_jpg(tmp_path / "raw", images)
        write_mscxr(root, [sample_boxes(images)[0] | {"category_name": "Effusion"}])
        with pytest.raises(
            ValueError, match=r"v1.0.0.csv: unknown category 'Effusion' of image aaaaaaaa.*Known: Atel"
        ):
            build(MsCxr, tmp_path / "cache", data_dir=root)

    def test_missing_columns(self, tmp_path):
        images = sample_images()
        root = write_jpg(tmp_path / "raw", images)
        rows = [{"dicom_id": "x", "label_text": "y"}]
        write_file(root / "MS_CXR_Local_Alignment_v1.0.0.csv", table_bytes(("dicom_id", "label_text"), rows))
        with pytest.raises(ValueError, match="lacks the columns category_name, x, y, w, h.*found: dicom_id, label_te"):
            build(MsCxr, tmp_path / "cache", data_dir=root)


class TestFolders:
    """Each way in which the downloads may lie gives the same records."""

    @pytest.fixture(scope="class")
    def expected(self, tree, tmp_path_factory) -> dict:
        return build(ChestImagenome, tmp_path_factory.mktemp("cache"), data_dir=tree)[0]

    def test_everything_unpacked_into_one_folder(self, tmp_path, expected):
        images = sample_images()
        root = write_jpg(tmp_path / "mimic", images, suffix=".csv")
        write_reports(root, images, archive=None)
        write_imagenome(root, images, archive=None)
        splits, builder = build(ChestImagenome, tmp_path / "cache", data_dir=root)
        assert splits == expected
        assert builder.config.report_dir == builder.config.jpg_dir == str(root)

    def test_levels_that_wget_makes(self, tmp_path, expected, monkeypatch):
        images = sample_images()
        root = tmp_path / "data"
        site = root / "physionet.org" / "files"
        write_jpg(site / "mimic-cxr-jpg" / "2.0.0", images)
        write_reports(site / "mimic-cxr" / "2.0.0", images)
        write_imagenome(site / "chest-imagenome" / "1.0.0", images)
        monkeypatch.setenv("CHEST_IMAGENOME_DIR", str(tmp_path / "nowhere"))
        splits, _ = build(ChestImagenome, tmp_path / "cache", data_dir=root)
        assert splits == expected

    def test_environment_variables_and_arguments(self, tmp_path, expected, monkeypatch):
        images = sample_images()
        monkeypatch.setenv("MIMIC_CXR_JPG_DIR", str(write_jpg(tmp_path / "a", images)))
        monkeypatch.setenv("MIMIC_CXR_REPORT_DIR", str(write_reports(tmp_path / "b", images, archive=None)))
        monkeypatch.setenv("CHEST_IMAGENOME_DIR", str(tmp_path / "nowhere"))
        silver = write_imagenome(tmp_path / "c", images) / "silver_dataset"
        splits, _ = build(ChestImagenome, tmp_path / "cache", imagenome_dir=silver)
        assert splits == expected

    def test_archives_with_further_levels(self, tmp_path, expected):
        images = sample_images()
        root = write_all(tmp_path / "raw")
        for path, top in ((root / REPORTS, "mimic-cxr-reports"), (root / GRAPHS, "silver_dataset")):
            with zipfile.ZipFile(path) as archive:
                members = {name: archive.read(name) for name in archive.namelist()}
            with zipfile.ZipFile(path, "w") as archive:
                archive.writestr("__MACOSX/files/scene_graph/._x", b"")
                for name, data in members.items():
                    archive.writestr(f"{top}/{name}", data)
        splits, _ = build(ChestImagenome, tmp_path / "cache", data_dir=root)
        assert splits == expected
        # Unpacked into a folder that is named as the archive.
        write_imagenome(tmp_path / "more" / "scene_graph", images, archive=None)
        nested = tmp_path / "more" / "scene_graph" / "silver_dataset" / "scene_graph"
        nested.rename(tmp_path / "more" / "scene_graph" / "scene_graph")
        splits, _ = build(ChestImagenome, tmp_path / "cache", data_dir=root, imagenome_dir=tmp_path / "more")
        assert splits == expected

    def test_unpacked_reports_beside_the_images(self, tmp_path, expected):
        """Both have folders `files`; only one of them holds texts."""
        images = sample_images()
        root = tmp_path / "raw"
        write_jpg(root / "a", images)
        write_reports(root / "b", images, archive=None)
        write_imagenome(root / "c", images)
        splits, builder = build(ChestImagenome, tmp_path / "cache", data_dir=root)
        assert splits == expected
        assert (builder.folders["jpg"], builder.folders["report"]) == (root / "a", root / "b")

    def test_image_folders_are_not_searched(self, tmp_path):
        write_jpg(tmp_path / "files" / "p10", sample_images())
        with pytest.raises(FileNotFoundError, match="MIMIC-CXR needs MIMIC-CXR-JPG, which was not found"):
            MimicCxr(cache_dir=str(tmp_path / "cache"), data_dir=str(tmp_path))

    def test_archive_stays_readable_in_a_copy_of_the_builder(self, tree, tmp_path):
        builder = ChestImagenome(cache_dir=str(tmp_path), data_dir=str(tree))
        item = builder.items()["train"][0]
        record = builder.record(item)
        assert pickle.loads(pickle.dumps(builder)).record(item) == record

    def test_forked_processes_read_one_archive_at_the_same_time(self, tmp_path):
        contents = {f"{index}.bin": np.random.default_rng(index).bytes(30_000) for index in range(20)}
        write_members(tmp_path, {f"files/{name}": data for name, data in contents.items()}, "all.zip")
        store = FileStore(tmp_path, "files", "all.zip")
        assert sorted(store.names()) == sorted(contents)  # opened before the processes start

        def read_all(failures) -> None:
            start.wait()
            try:
                wrong = sum(store.read(name) != data for _ in range(60) for name, data in contents.items())
            except Exception:
                wrong = 1
            failures.value += wrong

        context = multiprocessing.get_context("fork")
        start = context.Barrier(3)
        failures = [context.Value("i", 0) for _ in range(3)]
        processes = [context.Process(target=read_all, args=(value,)) for value in failures]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        assert [process.exitcode for process in processes] == [0, 0, 0]
        assert [value.value for value in failures] == [0, 0, 0]


@contextlib.contextmanager
def without_privileges():
    """Files may be read as their permissions say, also where the tests run as root."""
    privileged = os.geteuid() == 0
    if privileged:
        os.seteuid(65534)
    try:
        yield
    finally:
        if privileged:
            os.seteuid(0)


class TestUnusableFiles:
    """They make their own image unusable, whatever is wrong with them."""

    @pytest.fixture
    def unpacked(self, tmp_path) -> Path:
        images = sample_images()
        root = write_jpg(tmp_path / "raw", images)
        write_reports(root, images, archive=None)
        return write_imagenome(root, images, archive=None)

    @pytest.mark.parametrize("kind", ["folder of an image", "image", "report", "scene graph"])
    def test_what_may_not_be_read(self, unpacked, tmp_path, kind):
        builder = ChestImagenome(cache_dir=str(tmp_path / "cache"), data_dir=str(unpacked))
        item = builder.items()["train"][0]
        read_record(builder, item)
        image = Path(item["image_path"])
        path = {
            "folder of an image": image.parent,
            "image": image,
            "report": Path(item["report_path"]),
            "scene graph": Path(item["graph_path"]),
        }[kind]
        path.chmod(0)
        try:
            with without_privileges(), pytest.raises(RejectedRecord, match="Permission denied"):
                read_record(builder, item)
        finally:
            path.chmod(0o755)

    def test_member_of_an_archive_that_is_encrypted(self, tmp_path):
        root = write_all(tmp_path / "raw")
        data = bytearray((root / REPORTS).read_bytes())
        start = 0
        while (start := data.find(b"PK\x01\x02", start)) >= 0:
            data[start + 8] |= 1
            start += 4
        (root / REPORTS).write_bytes(data)
        builder = MimicCxr(cache_dir=str(tmp_path / "cache"), data_dir=str(root))
        with pytest.raises(RejectedRecord, match="reports.zip cannot be unpacked .*encrypted"):
            read_record(builder, builder.items()["train"][0])

    def test_truncated_images_are_accepted_if_asked_for(self, tmp_path):
        root = write_all(tmp_path / "raw")
        path = root / "mimic-cxr-jpg-2.0.0" / IMAGES["a"].path
        PIL.Image.effect_noise((IMAGES["a"].width, IMAGES["a"].height), 60).save(path)
        whole = np.asarray(PIL.Image.open(path))
        path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
        builder = MimicCxr(cache_dir=str(tmp_path / "cache"), data_dir=str(root))
        with pytest.raises(RejectedRecord, match="truncated"):
            builder.load_image(path)
        builder = MimicCxr(cache_dir=str(tmp_path / "cache"), data_dir=str(root), truncated="accept")
        part = builder.load_image(path)
        assert part.shape == whole.shape and (part[:8] == whole[:8]).all() and (part[-8:] != whole[-8:]).any()
        assert not PIL.ImageFile.LOAD_TRUNCATED_IMAGES
        with pytest.raises(ValueError, match="truncated must be 'reject' or 'accept', not 'yes'"):
            MimicCxr(cache_dir=str(tmp_path / "cache"), data_dir=str(root), truncated="yes")

    def test_changed_report_or_scene_graph_is_prepared_again(self, unpacked, tmp_path):
        out = tmp_path / "out"
        options = {"data_dir": unpacked, "num_proc": 1, "max_rejected": 0}
        first = prepare("chest-imagenome", out, **options)
        item = ChestImagenome(cache_dir=str(tmp_path / "cache"), data_dir=str(unpacked)).items()["train"][0]
        report = Path(item["report_path"])
        report.write_bytes(b" FINAL REPORT\n IMPRESSION:  Something else is seen.\n")
        with pytest.raises(PreparationError, match="prepared from other raw files"):
            prepare("chest-imagenome", out, **options)
        assert prepare("chest-imagenome", out, overwrite=True, **options).content != first.content
        graph = Path(item["graph_path"])
        graph.write_bytes(graph.read_bytes() + b" ")
        with pytest.raises(PreparationError, match="prepared from other raw files"):
            prepare("chest-imagenome", out, **options)


class TestMessages:
    @pytest.mark.parametrize(
        ("name", "needs", "variable", "tree"),
        [
            ("mimic_cxr", "MIMIC-CXR needs MIMIC-CXR-JPG", "MIMIC_CXR_JPG_DIR", "metadata.csv.gz"),
            ("chest-imagenome", "Chest ImaGenome needs the reports", "MIMIC_CXR_REPORT_DIR", "reports.zip"),
            ("chest-imagenome", "Chest ImaGenome needs Chest ImaGenome", "CHEST_IMAGENOME_DIR", "scene_graph.zip"),
            ("ms-cxr", "MS-CXR needs MS-CXR", "MS_CXR_DIR", "MS_CXR_Local_Alignment_v1.0.0.csv"),
        ],
    )  # fmt: skip
    def test_source_not_found_says_where_it_was_searched(self, tmp_path, monkeypatch, name, needs, variable, tree):
        images = sample_images()
        root = tmp_path / "raw"
        root.mkdir()
        if variable != "MIMIC_CXR_JPG_DIR":
            write_jpg(root, images)
        if variable == "CHEST_IMAGENOME_DIR":
            write_reports(root, images)
        monkeypatch.setenv(variable, str(tmp_path / "nowhere"))
        with pytest.raises(FileNotFoundError) as caught:
            builder_class(name)(cache_dir=str(tmp_path / "cache"), data_dir=str(root))
        message = str(caught.value)
        assert needs in message
        assert f"Searched {root}, {tmp_path / 'nowhere'} (which does not exist)" in message
        assert tree in message
        assert f"the environment variable {variable}" in message
        assert "https://physionet.org/content/" in message

    @pytest.mark.parametrize("table", [METADATA, SPLIT, CHEXPERT])
    def test_login_page_in_place_of_a_table(self, tmp_path, table):
        root = write_all(tmp_path / "raw")
        (root / table).write_bytes(LOGIN_PAGE)
        with pytest.raises(ValueError, match=f"{Path(table).name} is a saved web page.*access is not granted"):
            build(MimicCxr, tmp_path / "cache", data_dir=root)

    @pytest.mark.parametrize("archive", [REPORTS, GRAPHS])
    def test_login_page_or_part_in_place_of_an_archive(self, tmp_path, archive):
        root = write_all(tmp_path / "raw")
        whole = (root / archive).read_bytes()
        (root / archive).write_bytes(LOGIN_PAGE)
        with pytest.raises(ValueError, match=f"{Path(archive).name} is a saved web page.*access is not granted"):
            build(ChestImagenome, tmp_path / "cache", data_dir=root)
        (root / archive).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(ValueError, match=f"{Path(archive).name} is truncated or damaged.*download it again"):
            build(ChestImagenome, tmp_path / "cache", data_dir=root)

    def test_damaged_member_of_an_archive(self, tmp_path):
        root = write_all(tmp_path / "raw")
        with zipfile.ZipFile(root / REPORTS) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile(root / REPORTS, "w", zipfile.ZIP_STORED) as archive:
            for name, data in members.items():
                archive.writestr(name, data)
        damaged = (root / REPORTS).read_bytes().replace(b"Mild edema", b"Mild enema")
        (root / REPORTS).write_bytes(damaged)
        with pytest.raises(datasets.exceptions.DatasetGenerationError) as caught:
            build(MimicCxr, tmp_path / "cache", data_dir=root)
        assert "s50000003.txt in" in str(caught.value.__cause__)
        assert "cannot be unpacked (Bad CRC-32" in str(caught.value.__cause__)
        splits, _ = build(MimicCxr, tmp_path / "cache", data_dir=root, missing="skip")
        assert letters(splits) == {"train": "ah", "validation": "e", "test": "f"}

    def test_archive_of_something_else(self, tmp_path):
        root = write_all(tmp_path / "raw")
        with zipfile.ZipFile(root / GRAPHS, "w") as archive:
            archive.writestr("scene_tabular/gold.csv", b"x")
        with pytest.raises(ValueError, match="scene_graph.zip holds no folder scene_graph"):
            build(ChestImagenome, tmp_path / "cache", data_dir=root)

    def test_truncated_table(self, tmp_path):
        root = write_all(tmp_path / "raw")
        packed = (root / METADATA).read_bytes()
        (root / METADATA).write_bytes(packed[: len(packed) // 2])
        with pytest.raises(ValueError, match="metadata.csv.gz is truncated or damaged"):
            build(MimicCxr, tmp_path / "cache", data_dir=root)
        (root / METADATA).write_bytes(packed[:60] + bytes(255 - value for value in packed[60:90]) + packed[90:])
        with pytest.raises(ValueError, match="metadata.csv.gz is truncated or damaged .*download it again"):
            build(MimicCxr, tmp_path / "cache", data_dir=root)
        (root / METADATA).write_bytes(b"")
        with pytest.raises(ValueError, match="metadata.csv.gz is empty"):
            build(MimicCxr, tmp_path / "cache", data_dir=root)
        (root / METADATA).unlink()
        rows = [{"dicom_id": image.dicom_id, "ViewPosition": image.view} for image in sample_images()]
        text = table_bytes(METADATA_COLUMNS, rows)
        write_file(root / METADATA.removesuffix(".gz"), text[:-6])
        with pytest.raises(ValueError, match=r"metadata.csv, line 9: 7 fields where the header has 12"):
            build(MimicCxr, tmp_path / "cache", data_dir=root)
        write_file(root / METADATA.removesuffix(".gz"), text.replace(b"aaaa", b"\xff\xff\xff\xff"))
        with pytest.raises(ValueError, match=r"metadata.csv is not a csv file in UTF-8"):
            build(MimicCxr, tmp_path / "cache", data_dir=root)

    def test_quotation_mark_that_is_never_closed(self, tmp_path):
        root = write_all(tmp_path / "raw")
        text = table_bytes(METADATA_COLUMNS, [{"dicom_id": "a", "ViewPosition": '"'}]).replace(b'""""', b'"')
        for length in (10, 200_000):
            write_file(root / METADATA, text + b"b" * length)
            with pytest.raises(
                ValueError, match=r"metadata.csv.gz.*(line 3: \d fields|after line \d).*download it again"
            ):
                build(MimicCxr, tmp_path / "cache", data_dir=root)

    def test_missing_columns(self, tmp_path):
        root = write_all(tmp_path / "raw")
        write_file(root / METADATA, table_bytes(("dicom_id", "subject_id", "study_id", "Rows"), []))
        with pytest.raises(
            ValueError, match="lacks the columns ViewPosition, Columns; found: dicom_id, subject_id, st"
        ):
            build(MimicCxr, tmp_path / "cache", data_dir=root)

    def test_missing_table(self, tmp_path):
        root = write_all(tmp_path / "raw")
        (root / CHEXPERT).unlink()
        MsCxr(cache_dir=str(tmp_path / "cache"), data_dir=str(root))  # needs no CheXpert labels
        with pytest.raises(
            FileNotFoundError, match=r"2.0.0 has no mimic-cxr-2.\*-chexpert.csv.gz \(or .csv\): complete"
        ):
            MimicCxr(cache_dir=str(tmp_path / "cache"), data_dir=str(root))

    def test_values_that_should_not_be_there(self, tmp_path):
        images = sample_images()
        images[0].split = "val"
        root = write_all(tmp_path / "1", images)
        with pytest.raises(
            ValueError, match=r"split: 'val', the first that of aaaa.*. Known: train, validate, test. .*download"
        ):
            build(MimicCxr, tmp_path / "cache", data_dir=root)
        images = sample_images()
        images[0].labels = {"Edema": "2.0"}
        root = write_all(tmp_path / "2", images)
        with pytest.raises(
            ValueError, match=r"chexpert.csv.gz: study 5\d+ has the unknown label '2.0' of Edema. Known: 1.0"
        ):
            build(MimicCxr, tmp_path / "cache", data_dir=root)
        rows = [{"dicom_id": IMAGES["a"].dicom_id, "ViewPosition": "PA", "Rows": "48", "Columns": ""}]
        write_file(root / METADATA, table_bytes(METADATA_COLUMNS, rows))
        (root / REPORTS).unlink()
        with pytest.raises(ValueError, match="Rows and Columns of aaaaaaaa.* are '48' and ''"):
            build(MimicCxr, tmp_path / "cache", data_dir=root, reports=False)

    def test_repeated_ids(self, tmp_path):
        images = sample_images()
        root = write_all(tmp_path / "1", [*images, images[0]])
        with pytest.raises(ValueError, match="split.csv.gz: 1 values of dicom_id stand more than once, such as aaaa"):
            build(MimicCxr, tmp_path / "cache", data_dir=root)
        write_jpg(root / "mimic-cxr-jpg-2.0.0", images)
        repeated = [{"study_id": "50000001"}, {"study_id": "50000001"}]
        write_file(root / CHEXPERT, table_bytes(("subject_id", "study_id", *CHEXPERT_CLASSES), repeated))
        with pytest.raises(ValueError, match="chexpert.csv.gz: 1 values of study_id stand more than once"):
            build(MimicCxr, tmp_path / "cache", data_dir=root)

    def test_images_without_split_are_left_out(self, tmp_path, caplog):
        images = sample_images()
        images[0].split = None
        splits, _ = build(MimicCxr, tmp_path / "cache", data_dir=write_all(tmp_path / "raw", images))
        assert letters(splits) == {"train": "h", "validation": "de", "test": "f"}
        assert "1 images of the metadata have no split" in caplog.text

    def test_nothing_left_after_the_filters(self, tmp_path):
        images = sample_images()
        for image in images:
            image.view = "LL"
        root = write_all(tmp_path / "raw", images)
        with pytest.raises(
            ValueError, match="MIMIC-CXR: no images are left after the filters.\ntrain: 4 images -> 0 f"
        ):
            build(MimicCxr, tmp_path / "cache", data_dir=root)

    def test_nothing_left_after_reading(self, tmp_path):
        images = [image for image in sample_images() if image.letter in "de"]
        root = tmp_path / "raw"
        write_jpg(root, images)
        write_imagenome(root, images)
        with pytest.raises(ValueError, match=r"left after their files were read[\s\S]+2 with a scene graph"):
            build(ChestImagenome, tmp_path / "cache", data_dir=root, reports=False)

    def test_missing_images(self, tmp_path, caplog):
        root = write_all(tmp_path / "raw")
        for letter in "abdegf":
            (root / "mimic-cxr-jpg-2.0.0" / IMAGES[letter].path).unlink()
        with pytest.raises(FileNotFoundError) as caught:
            build(MimicCxr, tmp_path / "cache", data_dir=root)
        assert str(caught.value).startswith(f"MIMIC-CXR: 5 of 6 images are missing, such as {root}")
        assert str(caught.value).count(".jpg") == 5
        with caplog.at_level(logging.WARNING):
            splits, _ = build(MimicCxr, tmp_path / "cache", data_dir=root, missing="skip")
        assert letters(splits) == {"train": "h"}
        assert "2 images were left out (2: the image file is missing)" in caplog.text

    @pytest.mark.parametrize("builder", [MimicCxr, ChestImagenome, MsCxr])
    def test_image_of_another_size_than_the_metadata_say(self, tmp_path, builder):
        root = write_all(tmp_path / "raw")
        jpg = root / "mimic-cxr-jpg-2.0.0"
        (jpg / IMAGES["a"].path).write_bytes((jpg / IMAGES["d"].path).read_bytes())
        with pytest.raises(datasets.exceptions.DatasetGenerationError) as caught:
            build(builder, tmp_path / "cache", data_dir=root)
        assert (
            f"{IMAGES['a'].sample_id} cannot be used: the image has 50 x 40 pixels (height x width), but by the "
            "metadata it should have 48 x 64"
        ) in str(caught.value.__cause__)
        splits, _ = build(builder, tmp_path / "cache", data_dir=root, missing="skip")
        assert "a" not in "".join(letters(splits).values())

    def test_unreadable_image_is_rejected(self, tmp_path, caplog):
        root = write_all(tmp_path / "raw")
        (root / "mimic-cxr-jpg-2.0.0" / IMAGES["a"].path).write_bytes(b"no image")
        splits, _ = build(MsCxr, tmp_path / "cache", data_dir=root, missing="skip")
        assert letters(splits) == {"test": "df"}
        assert "1 images were left out (1: the image cannot be opened" in caplog.text

    def test_changed_tables_are_another_build(self, tmp_path):
        root = write_all(tmp_path / "raw")
        splits, first = build(MsCxr, tmp_path / "cache", data_dir=root)
        table = next(root.glob("ms-cxr-*/*.csv"))
        rows = [row for row in sample_boxes(sample_images()) if row["dicom_id"] == IMAGES["f"].dicom_id]
        write_file(table, table_bytes(MSCXR_COLUMNS, rows))
        changed, second = build(MsCxr, tmp_path / "cache", data_dir=root)
        assert letters(splits) == {"validation": "a", "test": "df"}
        assert letters(changed) == {"test": "f"}
        assert first.cache_dir != second.cache_dir
        for builder, files in ((MimicCxr, (METADATA, SPLIT, CHEXPERT, REPORTS)), (ChestImagenome, (GRAPHS,))):
            assert set(files) <= {
                str(path.relative_to(root))
                for path in builder(cache_dir=str(tmp_path / "cache"), data_dir=str(root)).table_files()
            }
