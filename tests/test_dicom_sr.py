"""DICOM structured reports: written about a real radiograph and read back with pydicom and highdicom."""

import builtins
import json
import shutil

import numpy as np
import pydicom
import pytest
from typer.testing import CliRunner

from processing_chex.errors import ChexInputError
from space_app.cli import app
from space_app.dicom_sr import NOTICE, find_result, read_source, read_statements, write_structured_report

from .image_factory import gradient, pydicom_sample, save_image
from .test_cli import save_tiny_model


highdicom = pytest.importorskip(
    "highdicom", reason="highdicom is not installed: pip install 'chex-transformers[dicom]'"
)
WIDTH, HEIGHT = 1841, 1955


@pytest.fixture(scope="module")
def radiograph():
    return pydicom_sample("RG1_UNCR.dcm")


def sentence(text="There is a pleural effusion.", prompt="Pleural effusion", boxes=((10, 20, 300.5, 400),), **more):
    regions = [{"box": list(box), "score": 0.9 - 0.1 * number} for number, box in enumerate(boxes)]
    return {"text": text, "prompt": prompt, "kind": "finding", "score": 0.75, "regions": regions} | more


def result_of(*sentences, width=WIDTH, height=HEIGHT, image="scan.dcm"):
    return {"image": image, "width": width, "height": height, "sentences": list(sentences)}


def groups_of(document):
    (measurements,) = (item for item in document.ContentSequence if name(item) == "Imaging Measurements")
    return list(measurements.ContentSequence)


def name(item):
    return item.ConceptNameCodeSequence[0].CodeMeaning


def item_of(group, meaning):
    (item,) = (item for item in group.ContentSequence if name(item) == meaning)
    return item


def test_every_sentence_and_box_comes_back(radiograph, tmp_path):
    sentences = [
        sentence(boxes=((10, 20, 300.5, 400), (900.25, 1000, 1841.3, 1955))),
        sentence("Größe des Herzens: normal.", "Heart", boxes=((600, 800, 1500, 1600),), kind="region"),
        sentence("No nodule.", "Nodule", boxes=()),
    ]
    out = write_structured_report(result_of(*sentences), radiograph, tmp_path / "report.dcm", "tiny model")
    document = pydicom.dcmread(out)
    first, second, heart, nodule = groups_of(document)
    for group, box, score in (
        (first, (10, 20, 300.5, 400), 0.9),
        (second, (900.25, 1000, WIDTH, HEIGHT), 0.8),
        (heart, (600, 800, 1500, 1600), 0.9),
    ):
        region = item_of(group, "Image Region")
        corners = np.array(region.GraphicData).reshape(-1, 2)
        assert region.GraphicType == "POLYLINE" and np.array_equal(corners[0], corners[-1]) and len(corners) == 5
        assert (*corners.min(axis=0), *corners.max(axis=0)) == box
        assert item_of(group, "Score of the model, no calibrated probability").MeasuredValueSequence[
            0
        ].NumericValue == pytest.approx(score)
    assert [item_of(group, "Comment").TextValue for group in (first, second, heart, nodule)] == [
        sentences[0]["text"],
        sentences[0]["text"],
        "Größe des Herzens: normal.",
        "No nodule.",
    ]
    assert item_of(nodule, "Nothing was located") and item_of(nodule, "Prompt").TextValue == "Nodule"
    assert not [item for item in nodule.ContentSequence if name(item) == "Image Region"]


def test_report_belongs_to_the_study_and_is_marked(radiograph, tmp_path):
    document = pydicom.dcmread(write_structured_report(result_of(sentence()), radiograph, tmp_path / "report.dcm"))
    source = pydicom.dcmread(radiograph, stop_before_pixels=True)
    assert document.SOPClassUID.name == "Comprehensive SR Storage" and document.Modality == "SR"
    flags = (document.VerificationFlag, document.PreliminaryFlag, document.ContentQualification)
    assert flags == ("UNVERIFIED", "PRELIMINARY", "RESEARCH") and "VerifyingObserverSequence" not in document
    for attribute in ("StudyInstanceUID", "PatientID", "PatientName", "PatientBirthDate", "AccessionNumber"):
        assert document[attribute].value == source[attribute].value, attribute
    assert document.SeriesInstanceUID != source.SeriesInstanceUID
    (study,) = document.CurrentRequestedProcedureEvidenceSequence
    evidence = study.ReferencedSeriesSequence[0].ReferencedSOPSequence[0]
    region = item_of(groups_of(document)[0], "Image Region")
    for reference in (evidence, region.ContentSequence[0].ReferencedSOPSequence[0]):
        assert reference.ReferencedSOPInstanceUID == source.SOPInstanceUID
        assert reference.ReferencedSOPClassUID == source.SOPClassUID
    assert item_of(document, "Notice").TextValue == NOTICE
    assert item_of(document, "Observer Type").ConceptCodeSequence[0].CodeMeaning == "Device"
    assert item_of(groups_of(document)[0], "Algorithm Name").TextValue == "ChEX"


def test_highdicom_reads_it_as_a_measurement_report(radiograph, tmp_path):
    result = result_of(sentence(), sentence("No nodule.", "Nodule", boxes=()))
    document = highdicom.sr.srread(write_structured_report(result, radiograph, tmp_path / "report.dcm"))
    assert isinstance(document, highdicom.sr.ComprehensiveSR)
    source = pydicom.dcmread(radiograph, stop_before_pixels=True)
    (group,) = document.content.get_planar_roi_measurement_groups(
        graphic_type=highdicom.sr.GraphicTypeValues.POLYLINE, referenced_sop_instance_uid=source.SOPInstanceUID
    )
    assert group.roi.value.tolist() == [[10, 20], [300.5, 20], [300.5, 400], [10, 400], [10, 20]]
    assert group.tracking_identifier == "Sentence 1, region 1"
    assert [measurement.value for measurement in group.get_measurements()] == [0.9]
    (other,) = document.content.get_image_measurement_groups()
    assert other.tracking_identifier == "Sentence 2"


def test_answers_and_what_the_page_saves(radiograph, tmp_path):
    answer = {"query": "10,20,300,400", "kind": "box", "score": 1.0, "sentence": None, "regions": []}
    answer["regions"] = [{"box": [10, 20, 300, 400], "score": 1.0}]
    page = {"notice": "", "image": {"width": WIDTH, "height": HEIGHT, "frame": []}, "threshold": 0.5}
    page["answers"] = [answer | {"sentence": "Changed.", "edited": True}]
    explanation = {"image": "x", "width": WIDTH, "height": HEIGHT, "answers": [answer]}
    for number, result in enumerate((explanation, page)):
        out = write_structured_report(result, radiograph, tmp_path / f"{number}.dcm")
        (group,) = groups_of(pydicom.dcmread(out))
        assert item_of(group, "Finding").ConceptCodeSequence[0].CodeValue == "GIVEN"
        names = [name(item) for item in group.ContentSequence]
        assert ("Comment" in names, "Edited" in names) == ((False, False) if number == 0 else (True, True))


def test_names_of_patients_keep_their_letters(radiograph, tmp_path):
    source = pydicom.dcmread(radiograph)
    source.SpecificCharacterSet = "ISO_IR 100"
    source.PatientName = "Müller^Jürgen"
    del source.StudyID, source.ReferringPhysicianName, source.AccessionNumber
    source.save_as(tmp_path / "source.dcm")
    out = write_structured_report(result_of(sentence()), tmp_path / "source.dcm", tmp_path / "report.dcm")
    document = pydicom.dcmread(out)
    assert document.PatientName == "Müller^Jürgen" and document.StudyID in (None, "")


def test_report_without_sentences_is_not_written(radiograph, tmp_path):
    with pytest.raises(ChexInputError, match="nothing to write"):
        write_structured_report(result_of(), radiograph, tmp_path / "report.dcm")
    assert not (tmp_path / "report.dcm").exists()


# Wrong input


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (result_of(sentence(), width=100, height=80), "image of 100 x 80 pixels, but the DICOM image has 1841 x 1955"),
        (result_of(sentence(boxes=((0, 0, 2000, 10),))), "does not lie in the image"),
        (result_of(sentence(boxes=((50, 0, 40, 10),))), "does not lie in the image"),
        (result_of(sentence(boxes=((float("nan"), 0, 40, 10),))), "does not lie in the image"),
        (result_of({"prompt": "x"}), "damaged"),
        (result_of(sentence(text=5)), "damaged"),
        ({"width": WIDTH, "height": HEIGHT}, "damaged"),
        ({"image": "x", "answers": []}, "damaged"),
    ],
)
def test_results_that_do_not_fit(result, message):
    with pytest.raises(ChexInputError, match=message):
        read_statements(result, WIDTH, HEIGHT)


def test_sources_that_cannot_be_referred_to(radiograph, tmp_path):
    with pytest.raises(ChexInputError, match="no file"):
        read_source(tmp_path / "nothing.dcm")
    with pytest.raises(ChexInputError, match="no DICOM file"):
        read_source(save_image(tmp_path / "scan.png", gradient(20, 20)))
    source = pydicom.dcmread(radiograph)
    del source.StudyInstanceUID
    source.save_as(tmp_path / "no_study.dcm")
    with pytest.raises(ChexInputError, match="it has no StudyInstanceUID"):
        read_source(tmp_path / "no_study.dcm")
    source.StudyInstanceUID, source.NumberOfFrames = "1.2.3", 3
    source.save_as(tmp_path / "frames.dcm")
    with pytest.raises(ChexInputError, match="several frames"):
        read_source(tmp_path / "frames.dcm")


def test_nothing_is_replaced_or_left_behind(radiograph, tmp_path, monkeypatch):
    source = shutil.copy(radiograph, tmp_path / "scan.dcm")
    before = (tmp_path / "scan.dcm").read_bytes()
    with pytest.raises(ChexInputError, match="the image itself"):
        write_structured_report(result_of(sentence()), source, tmp_path / "scan.dcm", overwrite=True)
    with pytest.raises(ChexInputError, match="--overwrite"):
        write_structured_report(result_of(sentence()), source, tmp_path / "scan.dcm")
    with pytest.raises(ChexInputError, match="does not exist"):
        write_structured_report(result_of(sentence()), source, tmp_path / "no" / "report.dcm")

    def fail(self, path, **kwargs):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(highdicom.sr.ComprehensiveSR, "save_as", fail)
    with pytest.raises(OSError, match="disk full"):
        write_structured_report(result_of(sentence()), source, tmp_path / "report.dcm")
    assert [path.name for path in tmp_path.iterdir()] == ["scan.dcm"]
    assert (tmp_path / "scan.dcm").read_bytes() == before


def test_missing_highdicom_is_named(radiograph, tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.split(".")[0] == "highdicom":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ChexInputError, match=r"chex-transformers\[dicom\]"):
        write_structured_report(result_of(sentence()), radiograph, tmp_path / "report.dcm")
    assert not list(tmp_path.iterdir())


def test_results_are_found_by_image(tmp_path):
    one, two = result_of(image="a/one.dcm"), result_of(image="b/two.dcm")
    (tmp_path / "document.json").write_text(json.dumps({"images": [one, two]}), encoding="utf-8")
    (tmp_path / "lines.jsonl").write_text(json.dumps(one) + "\n" + json.dumps(two) + "\n", encoding="utf-8")
    (tmp_path / "single.json").write_text(json.dumps(two), encoding="utf-8")
    for file in ("document.json", "lines.jsonl"):
        assert find_result(tmp_path / file, "elsewhere/two.dcm") == two
        assert find_result(tmp_path / file, "a/one.dcm") == one
        with pytest.raises(ChexInputError, match="not exactly one about"):
            find_result(tmp_path / file, "three.dcm")
    assert find_result(tmp_path / "single.json", "anything.dcm") == two
    for broken in ("", "[1]", "{", "\xff"):
        (tmp_path / "broken.json").write_bytes(broken.encode("latin-1"))
        with pytest.raises(ChexInputError):
            find_result(tmp_path / "broken.json", "one.dcm")


def test_command_on_a_real_radiograph(radiograph, tmp_path, monkeypatch):
    """`chex report --json`, then `chex sr`: the boxes of the answer are those of the report."""
    model = save_tiny_model(tmp_path / "model", stage=3)
    asked = CliRunner().invoke(
        app, ["explain", str(radiograph), "--model", str(model), "--prompt", "Heart", "--threshold", "0.2", "--json"]
    )
    assert asked.exit_code == 0, asked.stderr
    (tmp_path / "answers.json").write_text(asked.stdout, encoding="utf-8")
    out = tmp_path / "report.dcm"
    arguments = ["sr", str(radiograph), "--report", str(tmp_path / "answers.json"), "--out", str(out)]
    written = CliRunner().invoke(app, [*arguments, "--model", "tiny"])
    assert written.exit_code == 0 and "unverified" in written.stdout, written.stderr
    (answer,) = json.loads(asked.stdout)["images"][0]["answers"]
    groups = groups_of(pydicom.dcmread(out))
    assert len(groups) == len(answer["regions"]) > 0
    for group, region in zip(groups, answer["regions"], strict=True):
        corners = np.array(item_of(group, "Image Region").GraphicData).reshape(-1, 2)
        assert [*corners.min(axis=0), *corners.max(axis=0)] == pytest.approx(region["box"], abs=0.01)
        assert item_of(group, "Comment").TextValue == answer["sentence"]
    again = CliRunner().invoke(app, arguments)
    assert again.exit_code == 2 and again.stderr.startswith("Error: ") and again.stderr.count("\n") == 1
