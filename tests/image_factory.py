"""Images and DICOM files for the tests, made on the fly."""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pydicom
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import DigitalXRayImageStorageForPresentation, ExplicitVRLittleEndian, generate_uid


def gradient(height: int, width: int, maximum: int = 255, dtype: type = np.uint8) -> np.ndarray:
    """A ramp from 0 at the top left to `maximum` at the bottom right."""
    ramp = np.add.outer(np.arange(height), np.arange(width)) / max(height + width - 2, 1)
    return np.rint(ramp * maximum).astype(dtype)


def rectangle_image(height: int, width: int, box_xyxy: tuple[int, int, int, int]) -> np.ndarray:
    """Black uint8 image with a white box."""
    image = np.zeros((height, width), dtype=np.uint8)
    x0, y0, x1, y1 = box_xyxy
    image[y0:y1, x0:x1] = 255
    return image


def save_image(path: Path, array: np.ndarray, **kwargs: Any) -> Path:
    PIL.Image.fromarray(array).save(path, **kwargs)
    return path


def save_dicom(
    path: Path, pixels: np.ndarray | None, bits_stored: int | None = None, preamble: bool = True, **attributes: Any
) -> Path:
    """Write a minimal DX file; `attributes` are DICOM keywords, None removes one."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = DigitalXRayImageStorageForPresentation
    meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=[path.name])
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    dataset.SOPClassUID = meta.MediaStorageSOPClassUID
    dataset.SOPInstanceUID = meta.MediaStorageSOPInstanceUID
    dataset.StudyInstanceUID = generate_uid(entropy_srcs=[path.name, "study"])
    dataset.SeriesInstanceUID = generate_uid(entropy_srcs=[path.name, "series"])
    dataset.Modality = "DX"
    dataset.PatientName = "Phantom^Test"
    if pixels is not None:
        allocated = 8 * pixels.dtype.itemsize
        dataset.Rows, dataset.Columns = pixels.shape[:2]
        dataset.SamplesPerPixel = 1
        dataset.PhotometricInterpretation = "MONOCHROME2"
        dataset.BitsAllocated = allocated
        dataset.BitsStored = bits_stored or allocated
        dataset.HighBit = dataset.BitsStored - 1
        dataset.PixelRepresentation = int(np.issubdtype(pixels.dtype, np.signedinteger))
        dataset.PixelData = pixels.tobytes()
        dataset["PixelData"].VR = "OB" if allocated == 8 else "OW"
    for keyword, value in attributes.items():
        if value is None:
            delattr(dataset, keyword)
        else:
            setattr(dataset, keyword, value)
    if preamble:
        dataset.save_as(path, enforce_file_format=True)
    else:
        del dataset.file_meta
        dataset.preamble = None
        pydicom.dcmwrite(path, dataset, implicit_vr=True, little_endian=True)
    return path


def lookup_table(entries: np.ndarray, first_mapped: int, bits: int) -> Sequence:
    """A modality or VOI LUT sequence of one item."""
    item = pydicom.Dataset()
    item.add_new("LUTDescriptor", "US", [len(entries), first_mapped, bits])
    item.add_new("LUTData", "US", entries.astype(int).tolist())
    return Sequence([item])


def pydicom_sample(name: str) -> Path:
    """A file of the `pydicom-data` package."""
    return Path(importlib.util.find_spec("data_store").submodule_search_locations[0]) / "data" / name
