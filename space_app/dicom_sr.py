"""
DICOM structured reports: sentences and boxes of ChEX as a Comprehensive SR after template TID 1500, which refers to
the radiograph that was asked about. Marked as research, preliminary and unverified.
"""

import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from processing_chex.errors import ChexInputError


if TYPE_CHECKING:
    from highdicom.sr import ComprehensiveSR
    from pydicom import Dataset

NOTICE = "Output of an algorithm for research. Not verified by a physician, not for clinical use."
SCHEME = "99CHEX"  # private codes begin with 99 (PS3.16, section 8.2)
TOLERANCE = 0.51  # pixels by which a rounded box may exceed the image
# Attributes without which a report cannot be filed with its study.
NEEDED = ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "SOPClassUID", "Rows", "Columns")
# Type 2 attributes that highdicom copies from the image; empty where the image leaves them away.
COPIED = (
    *("PatientID", "PatientName", "PatientBirthDate", "PatientSex", "AccessionNumber"),
    *("StudyID", "StudyDate", "StudyTime", "ReferringPhysicianName"),
)


@dataclass(frozen=True)
class Statement:
    """
    A sentence with its regions.

    Attributes:
        prompt: What the model was asked.
        asked_by_box: Whether the region was given and not found.
        text: The sentence, None if none was asked for.
        score: Of the query as a whole.
        regions: (box, score); xyxy in pixels of the image.
        edited: Whether a person has changed the sentence.
    """

    prompt: str
    asked_by_box: bool
    text: str | None
    score: float
    regions: tuple[tuple[tuple[float, float, float, float], float], ...]
    edited: bool = False


def write_structured_report(
    result: Mapping[str, Any],
    source: str | Path,
    out: str | Path,
    model: str = "ChEX",
    overwrite: bool = False,
) -> Path:
    """
    Write a structured report about a DICOM image; the file appears when it is complete.

    Args:
        result: `Explanation.to_dict()`, `Report.to_dict()`, or what the page saves as JSON.
        source: The DICOM file that was asked about. Patient and study are taken over from it.
        out: File to write.
        model: Name of the model, as the report shows it.
        overwrite: Replace a file that is there.

    Raises:
        ChexInputError: The source is no DICOM image that can be referred to, the result is about an image of another
            size, or highdicom is not installed.
    """
    source, out = Path(source), Path(out)
    if out.exists() and (out.is_dir() or not overwrite):
        raise ChexInputError(f"{out} is there already: name another file, or replace it with --overwrite.")
    if not out.parent.is_dir():
        raise ChexInputError(f"The folder {out.parent} does not exist: create it first.")
    if out.exists() and out.samefile(source):
        raise ChexInputError(f"{out} is the image itself: name another file.")
    document = structured_report(result, read_source(source), model)
    temporary = out.with_name(f".{out.name}.{secrets.token_hex(4)}.partial")
    try:
        document.save_as(temporary, enforce_file_format=True)
        temporary.replace(out)
    finally:
        temporary.unlink(missing_ok=True)
    return out


def read_source(source: Path) -> "Dataset":
    """
    The DICOM file without its pixels.

    Raises:
        ChexInputError: No DICOM file, no single image, or attributes are missing that a reference needs.
    """
    import pydicom

    from processing_chex.dicom import is_dicom, may_be_bare_dicom

    if not source.is_file():
        raise ChexInputError(f"There is no file {source}.")
    if not (is_dicom(source) or may_be_bare_dicom(source)):
        raise ChexInputError(f"{source} is no DICOM file: a structured report refers to the DICOM image.")
    try:
        # Values of the source are copied as they are, odd ones included.
        dataset = pydicom.dcmread(source, force=True, stop_before_pixels=True)
    except Exception as error:  # damaged files raise nearly anything
        raise ChexInputError(f"{source} is a damaged DICOM file ({type(error).__name__}): export it again.") from error
    check_source(dataset, source)
    return dataset


def check_source(dataset: "Dataset", name: str | Path) -> None:
    """
    Args:
        name: What messages call the file.

    Raises:
        ChexInputError: No single image, or attributes are missing that a reference needs.
    """
    try:
        missing = [attribute for attribute in NEEDED if dataset.get(attribute) in (None, "")]
        frames = int(dataset.get("NumberOfFrames") or 1)
    except Exception as error:  # values are parsed when they are asked for
        raise ChexInputError(f"{name} is a damaged DICOM file ({type(error).__name__}): export it again.") from error
    if missing:
        raise ChexInputError(f"{name} cannot be referred to: it has no {', '.join(missing)}.")
    if frames != 1:
        raise ChexInputError(f"{name} has several frames, but ChEX explains single images.")


def structured_report(result: Mapping[str, Any], source: "Dataset", model: str = "ChEX") -> "ComprehensiveSR":
    """
    The report as a dataset; see `write_structured_report`.

    Each region is a measurement group (TID 1410) with a closed polygon on the image, the prompt, the sentence and the
    score; a sentence without a region is a group (TID 1501) that refers to the whole image.

    Raises:
        ChexInputError: The result says nothing, or does not fit the image.
    """
    highdicom = _highdicom()
    from highdicom import sr
    from pydicom.sr.codedict import codes
    from pydicom.uid import generate_uid

    statements = read_statements(result, int(source.Columns), int(source.Rows))
    if not statements:
        raise ChexInputError("There is nothing to write: the result has no answer and no sentence.")
    for name in COPIED:
        if name not in source:
            setattr(source, name, None)
    algorithm = sr.AlgorithmIdentification(name="ChEX", version=_version(), parameters=[f"model: {model}"[:1024]])
    groups = [
        group
        for number, statement in enumerate(statements, 1)
        for group in _groups(number, statement, source, algorithm)
    ]
    observer = sr.ObserverContext(
        observer_type=codes.DCM.Device,
        observer_identifying_attributes=sr.DeviceObserverIdentifyingAttributes(
            uid=generate_uid(), name="ChEX", manufacturer_name="none (research software)", model_name=model[:64]
        ),
    )
    content = sr.MeasurementReport(
        observation_context=sr.ObservationContext(observer_device_context=observer),
        procedure_reported=codes.SCT.ChestImaging,
        imaging_measurements=groups,
        title=codes.DCM.ImagingMeasurementReport,
        # No image library: highdicom asks for attributes, such as ImagerPixelSpacing, that real images leave away.
    )
    content[0].ContentSequence.append(_text("NOTICE", "Notice", NOTICE))
    return sr.ComprehensiveSR(
        evidence=[source],
        content=content[0],
        series_instance_uid=generate_uid(),
        series_number=9001,
        sop_instance_uid=generate_uid(),
        instance_number=1,
        manufacturer="none (research software)",
        is_complete=True,
        is_final=False,
        is_verified=False,
        content_qualification=highdicom.ContentQualificationValues.RESEARCH,
        series_description="ChEX: algorithm output, research only, unverified",
        software_versions=f"chex-transformers {_version()}",
        # Prompts and sentences may hold any letters; highdicom writes text in UTF-8.
        specific_character_set="ISO_IR 192",
    )


def _groups(number: int, statement: Statement, source: "Dataset", algorithm: Any) -> list[Any]:
    import numpy as np
    from highdicom import sr
    from pydicom.sr.codedict import codes
    from pydicom.uid import generate_uid

    tracking_uid = generate_uid()

    def tracking(part: int | None = None) -> Any:
        name = f"Sentence {number}" + (f", region {part}" if part is not None else "")
        return sr.TrackingIdentifier(uid=tracking_uid if part is None else generate_uid(), identifier=name)

    kind = ("GIVEN", "Region given by the user") if statement.asked_by_box else ("ANSWER", "Answer to a text prompt")
    shared = {"finding_type": sr.CodedConcept(kind[0], SCHEME, kind[1]), "algorithm_id": algorithm}

    def score(value: float) -> list[Any]:
        concept = sr.CodedConcept("SCORE", SCHEME, "Score of the model, no calibrated probability")
        return [sr.Measurement(name=concept, value=round(float(value), 4), unit=codes.UCUM.NoUnits)]

    groups = []
    for part, (box, value) in enumerate(statement.regions, 1):
        x0, y0, x1, y1 = box
        corners = np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1], [x0, y0]], dtype=np.float32)
        region = sr.ImageRegion(
            graphic_type=sr.GraphicTypeValues.POLYLINE,
            graphic_data=corners,
            source_image=sr.SourceImageForRegion.from_source_image(source),
        )
        groups.append(
            sr.PlanarROIMeasurementsAndQualitativeEvaluations(
                tracking_identifier=tracking(part), referenced_region=region, measurements=score(value), **shared
            )
        )
    if not groups:
        groups = [
            sr.MeasurementsAndQualitativeEvaluations(
                tracking_identifier=tracking(),
                measurements=score(statement.score),
                source_images=[sr.SourceImageForMeasurementGroup.from_source_image(source)],
                **shared,
            )
        ]
    for group in groups:
        items = group[0].ContentSequence
        items.append(_text("PROMPT", "Prompt", statement.prompt))
        if statement.text:
            items.append(
                sr.TextContentItem(
                    name=codes.DCM.Comment,
                    value=statement.text,
                    relationship_type=sr.RelationshipTypeValues.CONTAINS,
                )
            )
        if not statement.regions:
            items.append(_text("NOTFOUND", "Nothing was located", "The model located nothing for this prompt."))
        if statement.edited:
            items.append(_text("EDITED", "Edited", "A person has changed the sentence of the model."))
    return groups


def _text(code: str, meaning: str, value: str) -> Any:
    from highdicom import sr

    return sr.TextContentItem(
        name=sr.CodedConcept(code, SCHEME, meaning),
        value=value,
        relationship_type=sr.RelationshipTypeValues.CONTAINS,
    )


def _highdicom() -> Any:
    try:
        import highdicom
    except ImportError as error:
        raise ChexInputError(
            "DICOM structured reports need the package highdicom, which cannot be imported: run "
            "`pip install 'chex-transformers[dicom]'`."
        ) from error
    return highdicom


def _version() -> str:
    try:
        return version("chex-transformers")
    except PackageNotFoundError:
        return "0"


# Reading results


def read_statements(result: Mapping[str, Any], width: int, height: int) -> list[Statement]:
    """
    Sentences with their boxes from a result in any of the package's forms.

    Args:
        width, height: Of the image in pixels.

    Raises:
        ChexInputError: It is about an image of another size, holds a box outside it, or is damaged.
    """
    size = result.get("image") if isinstance(result.get("image"), Mapping) else result  # as the page saves it
    try:
        given = (int(size["width"]), int(size["height"]))
        entries: Sequence[Any] = result["sentences"] if "sentences" in result else result["answers"]
        statements = [_statement(entry) for entry in entries]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ChexInputError(
            f"The result is damaged ({type(error).__name__}: {error}): write it again with `chex report --json`."
        ) from error
    if given != (width, height):
        raise ChexInputError(
            f"The result is about an image of {given[0]} x {given[1]} pixels, but the DICOM image has "
            f"{width} x {height}: name the image that was asked about."
        )
    return [
        Statement(
            statement.prompt,
            statement.asked_by_box,
            statement.text,
            statement.score,
            tuple((_inside(box, width, height), score) for box, score in statement.regions),
            statement.edited,
        )
        for statement in statements
    ]


def _statement(entry: Mapping[str, Any]) -> Statement:
    regions = []
    for region in entry["regions"]:
        x0, y0, x1, y1 = (float(edge) for edge in region["box"])
        regions.append(((x0, y0, x1, y1), float(region["score"])))
    text = entry["text"] if "text" in entry else entry["sentence"]
    if text is not None and not isinstance(text, str):
        raise TypeError("a sentence is no text")
    return Statement(
        str(entry["prompt"] if "prompt" in entry else entry["query"]),
        entry.get("kind") == "box",
        text,
        float(entry["score"]),
        tuple(regions),
        bool(entry.get("edited", False)),
    )


def _inside(box: tuple[float, float, float, float], width: int, height: int) -> tuple[float, float, float, float]:
    x0, y0, x1, y1 = box
    inside = -TOLERANCE <= x0 < x1 <= width + TOLERANCE and -TOLERANCE <= y0 < y1 <= height + TOLERANCE
    if not inside:
        raise ChexInputError(
            f"The box {', '.join(f'{edge:g}' for edge in box)} does not lie in the image of {width} x {height} pixels."
        )
    return max(x0, 0.0), max(y0, 0.0), min(x1, float(width)), min(y1, float(height))


def find_result(path: str | Path, image: str | Path) -> dict[str, Any]:
    """
    The result about an image in a file of `chex report` or `chex explain` (--json or --out .jsonl) or of the page.

    Args:
        path: JSON or JSON Lines.
        image: Known by its path, or else by its name; a file with one result needs neither.

    Raises:
        ChexInputError: The file cannot be read, or holds no result about this image, or several.
    """
    path, image = Path(path), Path(image)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ChexInputError(f"{path} cannot be read ({type(error).__name__}): name a JSON file.") from error
    try:
        try:
            content = json.loads(text)
            results = content["images"] if isinstance(content, dict) and "images" in content else [content]
        except json.JSONDecodeError:
            results = [json.loads(line) for line in text.splitlines() if line.strip()]
    except ValueError as error:
        raise ChexInputError(f"{path} is no JSON ({error}): write it with `chex report IMAGE --json`.") from error
    if not all(isinstance(result, dict) for result in results):
        raise ChexInputError(f"{path} holds no results: write it with `chex report IMAGE --json`.")
    if len(results) == 1:
        return results[0]
    for same in (lambda name: Path(name).resolve() == image.resolve(), lambda name: Path(name).name == image.name):
        found = [result for result in results if isinstance(result.get("image"), str) and same(result["image"])]
        if len(found) == 1:
            return found[0]
    raise ChexInputError(f"{path} holds {len(results):,} results and not exactly one about {image}.")


__all__ = [
    "NOTICE",
    "Statement",
    "check_source",
    "find_result",
    "read_source",
    "read_statements",
    "structured_report",
    "write_structured_report",
]
