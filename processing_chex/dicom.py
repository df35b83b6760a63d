"""Projection radiographs from DICOM files, as they would appear on a viewer.

The grey value pipeline is the one of DICOM PS3.3 C.11: stored values -> modality transform -> window or VOI LUT ->
inversion of MONOCHROME1, in this order.
"""

from collections.abc import Callable
from os import PathLike

import numpy as np

from .errors import ChexInputError


try:
    import pydicom
except ImportError:
    pydicom = None


# Modalities that are projection radiographs of the body. Files that were stripped of the tag are accepted too.
RADIOGRAPH_MODALITIES = ("CR", "DX", "RG")
MODALITY_NAMES = {
    "CT": "computed tomography",
    "MG": "mammography",
    "MR": "magnetic resonance",
    "NM": "nuclear medicine",
    "OT": "other",
    "PT": "positron emission tomography",
    "RF": "fluoroscopy",
    "SC": "secondary capture",
    "SR": "structured report",
    "US": "ultrasound",
    "XA": "angiography",
}
# Without the 128-byte preamble a data set starts with its lowest group: file meta (0002) or identification (0008).
BARE_DATASET_STARTS = (b"\x02\x00", b"\x08\x00")


def is_dicom(path: str | PathLike) -> bool:
    """Whether the file carries the DICOM marker `DICM` after its preamble; the file name is not looked at."""
    with open(path, "rb") as file:
        return file.read(132)[128:] == b"DICM"


def may_be_bare_dicom(path: str | PathLike) -> bool:
    """Whether the file could be a DICOM data set that was written without preamble and marker."""
    with open(path, "rb") as file:
        return file.read(2) in BARE_DATASET_STARTS


def bit_depth_maximum(largest_value: float) -> float:
    """The full scale of the smallest usual detector depth (8, 10, 12, 14, 16 bits) that holds a value."""
    return next((2.0**bits - 1 for bits in (8, 10, 12, 14) if largest_value <= 2**bits - 1), 65535.0)


def read_dicom(path: str | PathLike) -> np.ndarray:
    """Read one radiograph.

    Accepts single-frame grey images of modality CR, DX or RG (or without a modality). The first window or VOI LUT is
    applied if the file has one; otherwise the range of the stored bits becomes [0, 1].

    Returns:
        float32 (height, width) in [0, 1], 0 = black.

    Raises:
        ChexInputError: for an unreadable file, another modality, several frames, colour, missing or undecodable
            pixels, or when pydicom is not installed.
    """
    if pydicom is None:
        raise ChexInputError(f"{path} is a DICOM file, and pydicom is not installed: run `pip install pydicom`.")
    try:
        dataset = pydicom.dcmread(path, force=True)
        modality = str(dataset.get("Modality", "") or "").strip().upper()
        frames, samples = _integer(dataset, "NumberOfFrames", 1), _integer(dataset, "SamplesPerPixel", 1)
        photometric = str(dataset.get("PhotometricInterpretation", "MONOCHROME2") or "MONOCHROME2").strip()
        syntax = dataset.file_meta.get("TransferSyntaxUID") or pydicom.uid.ImplicitVRLittleEndian
        dataset.file_meta.TransferSyntaxUID = syntax = pydicom.uid.UID(syntax)
    except Exception as error:  # damaged files raise nearly anything, from EOFError to struct.error
        raise ChexInputError(f"{path} is a damaged DICOM file ({_one_line(error)}): export it again.") from error

    if modality and modality not in RADIOGRAPH_MODALITIES:
        name = f"{modality} ({MODALITY_NAMES[modality]})" if modality in MODALITY_NAMES else modality
        raise ChexInputError(
            f"{path} has the modality {name}, but ChEX reads chest radiographs "
            f"({', '.join(RADIOGRAPH_MODALITIES)}). If it does show a radiograph, export it as PNG."
        )
    if not any(keyword in dataset for keyword in ("PixelData", "FloatPixelData", "DoubleFloatPixelData")):
        raise ChexInputError(f"{path} is a DICOM file without pixel data: choose the file that holds the image.")
    if frames > 1:
        raise ChexInputError(f"{path} has {frames} frames, but ChEX explains single images: export one as PNG.")
    if photometric not in ("MONOCHROME1", "MONOCHROME2") or samples != 1:
        raise ChexInputError(
            f"{path} is a colour image ({photometric}), but a radiograph has one grey channel: "
            "export the original radiograph, or convert it to a grey PNG."
        )

    stored = _stored_values(dataset, syntax, path)
    try:
        unit = _window(dataset, *_modality_transform(dataset, stored))
    except Exception as error:  # malformed numbers or tables, which pydicom only parses on access
        raise ChexInputError(
            f"{path} has unusable grey scale attributes ({_one_line(error)}): export the image as PNG."
        ) from error
    return (1.0 - unit if photometric == "MONOCHROME1" else unit).astype(np.float32)


def _stored_values(dataset: "pydicom.Dataset", syntax: "pydicom.uid.UID", path: str | PathLike) -> np.ndarray:
    """The decoded pixels (height, width); pydicom clears the bits beyond `BitsStored`."""
    try:
        pixels = dataset.pixel_array
    except Exception as error:  # each decoder plugin has its own exceptions
        is_plain = syntax.is_transfer_syntax and not syntax.is_compressed
        remedy = (
            "the file seems to be cut off or damaged, so export it again"
            if is_plain
            else "decompress it, or run `pip install pylibjpeg pylibjpeg-libjpeg pylibjpeg-openjpeg`"
        )
        raise ChexInputError(f"The pixels of {path} ({syntax.name}) cannot be decoded: {remedy}.") from error
    if pixels.ndim != 2 or pixels.size == 0:
        raise ChexInputError(f"{path} holds pixels of shape {pixels.shape}, not one grey image: export it as PNG.")
    return pixels


def _modality_transform(dataset: "pydicom.Dataset", stored: np.ndarray) -> tuple[np.ndarray, float, float]:
    """Apply the modality LUT or rescale; returns the values and the range that they can take."""
    if dataset.get("ModalityLUTSequence"):
        values, highest = _look_up(dataset, stored, dataset.ModalityLUTSequence[0])
        return values, 0.0, highest
    if np.issubdtype(stored.dtype, np.integer):
        bits = _integer(dataset, "BitsStored", 8 * stored.itemsize)
        lowest = -(2 ** (bits - 1)) if _integer(dataset, "PixelRepresentation", 0) == 1 else 0
        ends = np.array([lowest, lowest + 2**bits - 1], dtype=np.float64)
    else:
        ends = np.array([stored.min(), stored.max()], dtype=np.float64)
        if not np.isfinite(ends).all():
            raise ValueError("pixels that are not finite")
    slope = float(dataset.get("RescaleSlope", 1) or 1)
    intercept = float(dataset.get("RescaleIntercept", 0) or 0)
    ends = ends * slope + intercept
    return stored.astype(np.float64) * slope + intercept, ends.min(), ends.max()


def _window(dataset: "pydicom.Dataset", values: np.ndarray, lowest: float, highest: float) -> np.ndarray:
    """Apply the first VOI LUT or window (PS3.3 C.11.2.1), or else map the value range; returns values in [0, 1]."""
    if dataset.get("VOILUTSequence"):
        values, highest = _look_up(dataset, values, dataset.VOILUTSequence[0])
        return values / highest
    center, width = _first_number(dataset, "WindowCenter"), _first_number(dataset, "WindowWidth")
    if center is not None and width is not None and width > 0:
        function = WINDOW_FUNCTIONS.get(str(dataset.get("VOILUTFunction", "")).strip(), _linear)
        return function(values, center, width)
    span = highest - lowest
    return np.clip((values - lowest) / (span if span > 0 else 1.0), 0.0, 1.0)


def _look_up(dataset: "pydicom.Dataset", values: np.ndarray, item: "pydicom.Dataset") -> tuple[np.ndarray, float]:
    """Map values through a LUT item; returns the result and its full scale.

    Not pydicom's own function: that one wraps around where an 8-bit table has more than 256 entries. The full scale
    comes from the entries because the depth in the descriptor is often wrong.
    """
    entries, first_mapped, _ = (int(number) for number in item.LUTDescriptor)
    table = item.LUTData
    if isinstance(table, bytes):
        little_endian = dataset.file_meta.TransferSyntaxUID.is_little_endian
        table = np.frombuffer(table, dtype="<u2" if little_endian else ">u2")
    table = np.asarray(table, dtype=np.float64)[: entries or 2**16]
    indices = np.clip(np.rint(values).astype(np.int64) - first_mapped, 0, len(table) - 1)
    return table[indices], bit_depth_maximum(float(table.max()))


def _linear(values: np.ndarray, center: float, width: float) -> np.ndarray:
    if width <= 1:
        return (values > center - 0.5).astype(np.float64)
    return np.clip((values - (center - 0.5)) / (width - 1) + 0.5, 0.0, 1.0)


def _linear_exact(values: np.ndarray, center: float, width: float) -> np.ndarray:
    return np.clip((values - center) / width + 0.5, 0.0, 1.0)


def _sigmoid(values: np.ndarray, center: float, width: float) -> np.ndarray:
    return 1.0 / (1.0 + np.exp(np.clip(-4.0 * (values - center) / width, -700.0, 700.0)))


WINDOW_FUNCTIONS: dict[str, Callable[[np.ndarray, float, float], np.ndarray]] = {
    "LINEAR": _linear,
    "LINEAR_EXACT": _linear_exact,
    "SIGMOID": _sigmoid,
}


def _integer(dataset: "pydicom.Dataset", keyword: str, default: int) -> int:
    value = dataset.get(keyword)
    return default if value is None or value == "" else int(value)


def _first_number(dataset: "pydicom.Dataset", keyword: str) -> float | None:
    value = dataset.get(keyword)
    if isinstance(value, pydicom.multival.MultiValue):
        value = value[0] if len(value) else None
    return None if value is None or value == "" else float(value)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
