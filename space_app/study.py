"""One radiograph that is asked about again and again: read and encoded once, every question uses what is there."""

import base64
import io
import secrets
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import PIL.Image
import torch

from modeling_chex.pipeline_chex import Answer, ChexPipeline
from processing_chex import ChexInputError
from processing_chex.dicom import is_dicom, may_be_bare_dicom
from processing_chex.image_loading import load_image
from space_app.dicom_sr import check_source, structured_report


if TYPE_CHECKING:
    from pydicom import Dataset

# A radiograph has at most about 18 megapixels; beyond this, memory would suffer.
MAX_MEGAPIXELS = 40
MAX_QUERIES = 40
MAX_STATEMENTS = 400  # in a structured report
SHOWN_SIDE = 1280  # the longer side of the picture that is sent to the browser


@dataclass
class Study:
    """
    An image and its features on the model's device.

    Attributes:
        name: What the user calls it; no path.
        width, height: Of the original image in pixels.
        frame: The part that the model sees, xyxy in pixels.
        picture: Data URI of the image for the browser.
        image_features: As from `ChexModel.get_image_features`.
        original_sizes, image_frames: As from `ChexProcessor`.
        seconds: That reading and encoding took.
        header: What the DICOM file says besides its pixels, patient included; None of other files.
        key: Tells answers about this study from those about another.
    """

    name: str
    width: int
    height: int
    frame: tuple[float, ...]
    picture: str
    image_features: Any
    original_sizes: torch.Tensor
    image_frames: torch.Tensor
    seconds: float
    header: "Dataset | None" = field(default=None, repr=False)
    key: str = field(default_factory=lambda: secrets.token_hex(8))

    def for_viewer(self) -> dict[str, Any]:
        """What the viewer needs to show the image."""
        size = {"width": self.width, "height": self.height, "frame": list(self.frame)}
        return {"url": self.picture, **size, "study": self.key}


class StudyReader:
    """
    Answers questions about studies with one model, one at a time: the model is shared by all users.

    Args:
        pipeline: `ChexPipeline` or `ChexExplainer` with the model on its device.
    """

    def __init__(self, pipeline: ChexPipeline):
        self.pipeline = pipeline
        self.lock = threading.Lock()

    @property
    def writes_sentences(self) -> bool:
        return self.pipeline.model.config.generator_config is not None

    @torch.inference_mode()
    def open(self, image: str | Path | PIL.Image.Image, name: str | None = None, geometry: str | None = None) -> Study:
        """
        Reads and encodes an image.

        Args:
            image: Path of a PNG, JPEG, TIFF or DICOM file, or an image.
            name: What error messages call it, instead of the path.

        Raises:
            ChexInputError: It cannot be read or is too large; the message has no path in it.
        """
        start = time.perf_counter()
        shown = name or (Path(image).name if isinstance(image, (str, Path)) else "the image")
        try:
            check_pixels(image, shown)
            values = load_image(image, shown)
            header = None if isinstance(image, PIL.Image.Image) else _dicom_header(Path(image))
            options = {"geometry": geometry} if geometry is not None else {}
            with self.lock:
                inputs = self.pipeline.processor(images=[values], return_tensors="pt", **options)
                features = self.pipeline.model.get_image_features(inputs["pixel_values"].to(self.pipeline.device))
        except ChexInputError as error:
            raise ChexInputError(str(error).replace(str(image), shown)) from error
        height, width = values.shape
        return Study(
            name=shown,
            width=width,
            height=height,
            frame=tuple(inputs["image_frames"][0].tolist()),
            picture=data_uri(values),
            image_features=features,
            original_sizes=inputs["original_sizes"],
            image_frames=inputs["image_frames"],
            seconds=time.perf_counter() - start,
            header=header,
        )

    @torch.inference_mode()
    def ask(
        self, study: Study, prompts: Sequence[str] = (), boxes: Sequence[Sequence[float]] = ()
    ) -> tuple[list[dict[str, Any]], float]:
        """
        Answers prompts and boxes (xyxy pixels of the original image) about an image that is encoded.

        Returns:
            An answer for each query, ready for the viewer, with all regions that are no duplicates, whatever their
            score; and the seconds that it took.

        Raises:
            ChexInputError: An unusable prompt or box, none, or too many.
        """
        start = time.perf_counter()
        if not len(prompts) and not len(boxes):
            raise ChexInputError("Nothing is asked: type what to look for, choose from the lists, or draw a box.")
        if len(prompts) + len(boxes) > MAX_QUERIES:
            raise ChexInputError(
                f"These are {len(prompts) + len(boxes)} questions at once, of at most {MAX_QUERIES}: ask in parts."
            )
        pipeline = self.pipeline
        with self.lock:
            queries: dict[str, Any] = {}
            if prompts:
                queries |= pipeline.processor(text=list(prompts), return_tensors="pt").to(pipeline.device)
            if len(boxes):
                queries |= pipeline.processor.encode_boxes(
                    [list(boxes)], study.original_sizes, study.image_frames, [study.name], return_tensors="pt"
                ).to(pipeline.device)
            outputs = pipeline.model(image_features=study.image_features, **queries)
            token_ids = None
            if self.writes_sentences:
                token_ids = pipeline.model.generate(
                    query_features=outputs.query_features, query_mask=outputs.query_mask
                )
                token_ids = getattr(token_ids, "sequences", token_ids)
        answers = pipeline.answers(
            outputs, token_ids, study.original_sizes, study.image_frames, list(prompts), list(boxes), threshold=0.0
        )
        shown = [for_viewer(answer) for answer in answers]
        for answer, box in zip(shown[len(prompts) :], boxes, strict=True):
            answer["asked"] = [float(edge) for edge in box]
        return shown, time.perf_counter() - start

    @torch.inference_mode()
    def report(self, study: Study, findings: str) -> tuple[list[dict[str, Any]], float]:
        """
        A report about an image that is encoded.

        Args:
            findings: Name of the classes that are looked for, besides the report regions.

        Returns:
            The sentences, ready for the viewer, with the regions of the query that each answers; and the seconds.
        """
        start = time.perf_counter()
        with self.lock:
            written = self.pipeline.report_about(
                study.image_features, study.original_sizes, study.image_frames, findings=findings, threshold=0.5
            )
        shown = [
            {
                "query": sentence.prompt,
                "kind": "prompt",
                "prompt_type": sentence.kind,
                "report": True,
                "score": sentence.score,
                "sentence": sentence.text,
                "regions": [{"box": list(region.box), "score": region.score} for region in sentence.regions],
            }
            for sentence in written
        ]
        return shown, time.perf_counter() - start


def write_sr(study: Study, result: Any, model: str) -> bytes:
    """
    The file of a DICOM structured report.

    Args:
        study: Of a DICOM image.
        result: What the page saves as JSON. It comes from the browser, so that anything may be in it.
        model: Name of the model, as the report shows it.

    Raises:
        ChexInputError: The image cannot be referred to, the result is none, or highdicom is not installed.
    """
    if study.header is None:
        raise ChexInputError(f"{study.name} is no DICOM file: a structured report refers to the DICOM image.")
    answers = result.get("answers") if isinstance(result, dict) else None
    if not isinstance(answers, list) or not answers:
        raise ChexInputError("There is nothing to write: no answer is shown.")
    if len(answers) > MAX_STATEMENTS:
        raise ChexInputError(f"These are {len(answers)} answers, of at most {MAX_STATEMENTS} in a report: hide some.")
    check_source(study.header, study.name)
    buffer = io.BytesIO()
    structured_report(result, study.header, model).save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def for_viewer(answer: Answer) -> dict[str, Any]:
    """An answer as the viewer takes it."""
    return {
        "query": answer.query,
        "kind": answer.kind,
        "score": answer.score,
        "sentence": answer.sentence,
        "regions": [{"box": list(region.box), "score": region.score} for region in answer.regions],
    }


def check_pixels(image: str | Path | PIL.Image.Image, name: str) -> None:
    """Refuses an image that is too large, from its header alone.

    Raises:
        ChexInputError: More than `MAX_MEGAPIXELS`.
    """
    width, height = image.size if isinstance(image, PIL.Image.Image) else _size_in_header(Path(image))
    if width * height > MAX_MEGAPIXELS * 1e6:
        raise ChexInputError(
            f"{name} has {width} x {height} pixels, {width * height / 1e6:.0f} megapixels, of at most "
            f"{MAX_MEGAPIXELS}: scale it down."
        )


def _size_in_header(path: Path) -> tuple[int, int]:
    """(0, 0) where there is none to be read: `load_image` says then what is wrong."""
    try:
        if is_dicom(path) or may_be_bare_dicom(path):
            import pydicom

            header = pydicom.dcmread(path, stop_before_pixels=True, force=True)
            return int(header.get("Columns", 0)), int(header.get("Rows", 0))
        with PIL.Image.open(path) as file:
            return file.size
    except PIL.Image.DecompressionBombError as error:
        raise ChexInputError(f"{path} has far too many pixels for a radiograph: scale it down.") from error
    except Exception:
        return 0, 0


def _dicom_header(path: Path) -> "Dataset | None":
    """None of a file of another kind. `load_image` has read it: what is damaged has been refused."""
    if not (is_dicom(path) or may_be_bare_dicom(path)):
        return None
    import pydicom

    return pydicom.dcmread(path, stop_before_pixels=True, force=True)


def data_uri(values: np.ndarray) -> str:
    """Grey values (H, W) in [0, 1] as a JPEG of at most `SHOWN_SIDE` pixels, as a data URI."""
    image = PIL.Image.fromarray(np.rint(values * 255).astype(np.uint8))
    image.thumbnail((SHOWN_SIDE, SHOWN_SIDE), PIL.Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=92)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


__all__ = [
    "MAX_MEGAPIXELS",
    "MAX_QUERIES",
    "MAX_STATEMENTS",
    "Study",
    "StudyReader",
    "check_pixels",
    "data_uri",
    "for_viewer",
    "write_sr",
]
